"""Streamed answers, put together into the form of a whole response."""

import re
from typing import Any

import httpx2
import openai

_EVENTS = re.compile(rb"\s*(?:data|event|id|retry)?:")


class BrokenStreamError(Exception):
    """A stream that ended before its answer did."""


def is_stream(response: httpx2.Response) -> bool:
    """Return whether a response is a stream of events, by its first line: some servers give another content type."""
    return _EVENTS.match(response.content) is not None


async def read_stream(response: httpx2.Response, api: openai.AsyncOpenAI) -> dict[str, Any]:
    """Return the chat completion that the events of a response add up to.

    An error among the events is returned as `{"error": ...}`, as a whole response has it. The end is a finish_reason or
    `[DONE]`; some servers send one of the two only.

    Raises:
        BrokenStreamError: neither came.
        ValueError: an event is not JSON.
    """
    choice: dict[str, Any] = {}
    message: dict[str, Any] = {}
    usage = feedback = None
    try:
        async for chunk in openai.AsyncStream(cast_to=object, response=response, client=api):
            if not isinstance(chunk, dict):
                continue
            if chunk.get("object") == "error":  # vLLM before 0.10: the error itself, not below `error`
                return {"error": chunk}
            usage = chunk.get("usage") or usage
            feedback = chunk.get("promptFeedback") or feedback  # of Gemini, which has blocked the prompt
            for part in chunk.get("choices") or ():
                if part.get("index", 0) == 0:
                    _add(message, part.get("delta") or {})
                    choice |= {name: value for name, value in part.items() if name != "delta" and value is not None}
    except openai.APIError as error:
        return {"error": error.body}
    except AttributeError as error:
        raise ValueError("not a chat completion in chunks") from error
    if not choice.get("finish_reason") and not feedback and not response.content.rstrip().endswith(b"[DONE]"):
        raise BrokenStreamError
    return {"choices": [{**choice, "message": message}] if choice else [], "usage": usage, "promptFeedback": feedback}


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a delta to the message: text to text, parts to parts. The role comes once, or with every delta."""
    for name, value in delta.items():
        before = message.get(name)
        if name == "role" or not before:
            if value is not None:
                message[name] = value
        elif isinstance(before, str) and isinstance(value, str):
            message[name] = before + value
        elif isinstance(before, str | list) and isinstance(value, str | list):  # Mistral: parts, then text
            message[name] = _parts(before) + _parts(value)


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
