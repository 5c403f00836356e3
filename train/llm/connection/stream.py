"""Streamed answers, assembled into a complete chat completion."""

import re
from typing import Any

import httpx2
import openai

_EVENTS = re.compile(rb"\s*(?:data|event|id|retry)?:")


class BrokenStreamError(Exception):
    """The end of a stream before the end of its answer."""


def is_stream(response: httpx2.Response) -> bool:
    """Return True for a stream of events, by its first line: some servers send another content type."""
    return _EVENTS.match(response.content) is not None


async def read_stream(response: httpx2.Response, api: openai.AsyncOpenAI) -> dict[str, Any]:
    """Return the chat completion in the events of a response.

    An error among the events is returned as `{"error": ...}`, as in a response without a stream. The answer ends with a
    finish_reason or `[DONE]`; some servers send only one of the two.

    Raises:
        BrokenStreamError: there is neither.
        ValueError: an event is not JSON.
    """
    choice: dict[str, Any] = {}
    message: dict[str, Any] = {}
    usage = feedback = None
    try:
        async for chunk in openai.AsyncStream(cast_to=object, response=response, client=api):
            if not isinstance(chunk, dict):
                continue
            if chunk.get("object") == "error":  # vLLM before 0.10: the error itself, not under `error`
                return {"error": chunk}
            usage = chunk.get("usage") or usage
            feedback = chunk.get("promptFeedback") or feedback  # Gemini blocked the prompt
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
    """Append a delta to the message: text to text, parts to parts. The role comes once, or with every delta."""
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
