"""Chat completions: the answer in the body of a response, from a server or a batch file."""

import re
from collections.abc import Mapping
from typing import Any

from train.llm.finish_reasons import FinishClass, classify_finish_reason
from train.llm.request import Answer

REASONING_FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks")
"""Fields of a message in which servers send reasoning beside the content."""

_TEXT_PARTS = ("text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning", "redacted_thinking", "reasoning_text", "summary_text")
_TOOL_PARTS = ("tool_use", "tool_call", "tool_calls", "function_call")

_OVERRIDDEN_BY: dict[FinishClass, tuple[FinishClass, ...]] = {
    "complete": ("cut", "refused", "error", "tool"),
    "unknown": ("cut", "refused", "error", "tool"),
    "unstated": ("complete", "cut", "refused", "error", "tool"),
    "error": ("refused",),
}
"""Classes of the model's native finish reason that replace a gateway's: `stop` for an answer that the token limit cut,
`error` for one that the model's filter refused."""


class UnusableReplyError(ValueError):
    """A chat completion without an answer; the message gives the reason, for users."""


def parse_completion(body: Any, seconds: float) -> Answer:
    """Return the answer in a chat completion: that of its first choice.

    Of content in parts (Magistral, Anthropic, Bedrock) the text parts are joined; parts of reasoning are no text, and
    other parts beside a text (Mistral's references) are ignored. Also reads the completions form (`text` in place of a
    message) and a prompt that Gemini blocked, which has no choices: a refusal.

    Raises:
        UnusableReplyError: the server broke the answer off (finish_reason abort or error, an error in the choice), or
            the content has parts, and none of them can be read.
        ValueError: `body` is no chat completion.
    """
    if isinstance(body, Mapping) and not body.get("choices") and (block_reason := _block_reason(body)):
        return Answer("", f"content_filter: {block_reason}", None, None, None, seconds)
    try:
        choice = body["choices"][0]
        message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
        content, usage = message.get("content"), body.get("usage") or {}
        reason, refusal = choice.get("finish_reason"), message.get("refusal")
        reasoning = next((name for name in REASONING_FIELDS if message.get(name)), "")
        has_tool_calls = bool(message.get("tool_calls") or message.get("function_call"))
        error = choice.get("error")
        prompt_tokens, completion_tokens = (
            count if isinstance(count := usage.get(name), int) else None
            for name in ("prompt_tokens", "completion_tokens")
        )
    except (LookupError, TypeError, AttributeError) as malformed:
        raise ValueError("not a chat completion") from malformed
    text = "" if content is None else content
    ignored = ""
    if not isinstance(text, str):
        parts = _Parts(text)
        ignored = parts.ignored
        text, refusal, has_tool_calls = parts.text, refusal or parts.refusal, has_tool_calls or parts.has_tool_call
        reasoning = reasoning or (parts.has_reasoning and "content parts") or ""
    if isinstance(reason, Mapping):  # SGLang's own API: {"type": "length", "length": 16}
        reason = reason.get("type")
    finish_reason = str(reason or "")
    native_reason = _native_reason(choice)
    native_class = classify_finish_reason(native_reason)
    if native_class in _OVERRIDDEN_BY.get(classify_finish_reason(finish_reason), ()):
        finish_reason, error = native_reason, error if native_class == "error" else None
    finish_class = classify_finish_reason(finish_reason)
    if error or finish_class == "error":
        raise UnusableReplyError(_describe_error(finish_reason, error))
    if has_tool_calls and finish_class in ("complete", "unstated"):
        finish_reason = "tool_calls"  # some servers send "stop"
    return Answer(
        text=_replace_surrogates(text),
        finish_reason=_replace_surrogates(finish_reason),
        refusal=_replace_surrogates(str(refusal)) if refusal else None,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        seconds=seconds,
        reasoning_in=reasoning,
        ignored_part=ignored,
    )


def _native_reason(choice: Mapping[str, Any]) -> str:
    """Return the finish reason of the model's own API beside a gateway's: OpenRouter's field, or LiteLLM's."""
    fields = choice.get("provider_specific_fields")
    inner = fields.get("native_finish_reason") if isinstance(fields, Mapping) else None
    return str(choice.get("native_finish_reason") or inner or "")


def _block_reason(body: Mapping[str, Any]) -> str:
    """Return the reason why Gemini blocked a prompt; empty if it did not."""
    feedback = body.get("promptFeedback") or body.get("prompt_feedback")
    reason = feedback.get("blockReason") or feedback.get("block_reason") if isinstance(feedback, Mapping) else None
    return str(reason or "")


class _Parts:
    """Content that is a list of parts, or a single one. `ignored`: the type of the first unreadable part."""

    def __init__(self, content: Any) -> None:
        self.text = self.refusal = self.ignored = ""
        self.has_tool_call = self.has_reasoning = False
        for part in content if isinstance(content, list) else [content]:
            is_object = isinstance(part, Mapping)
            kind = part.get("type") or "text" if is_object else "text"
            if kind in _REASONING_PARTS:
                self.has_reasoning = True
            elif kind in _TOOL_PARTS:
                self.has_tool_call = True
            elif kind in _TEXT_PARTS and isinstance(text := part.get("text") if is_object else part, str):
                self.text += text
            elif kind == "refusal" and isinstance(text := part.get("refusal"), str):
                self.refusal += text
            elif is_object:
                self.ignored = self.ignored or str(kind)
            else:
                raise ValueError("content is no text")
        if self.ignored and not (self.text or self.refusal or self.has_tool_call):
            raise UnusableReplyError(f"the answer's content has an unreadable part of type {self.ignored!r}")


def describe_empty(answer: Answer) -> str:
    """Return the reason why an answer holds no text, for users."""
    if answer.reasoning_in:
        return (
            f"an empty answer, all of it in {answer.reasoning_in}: the server's reasoning parser and the template's "
            "setting (enable_thinking) do not match. Start the server without the parser, or let the model reason"
        )
    if not answer.blank:
        return "an empty answer: nothing but reasoning or control tokens"
    return f"an empty answer (finish_reason {answer.finish_reason or 'missing'})"


def _describe_error(finish_reason: str, error: Any) -> str:
    """Describe an answer that the server broke off."""
    if isinstance(error, Mapping):
        error = ": ".join(str(error[name]) for name in ("code", "message") if error.get(name)) or error
    detail = f": {error}" if error else ""
    return f"the server broke the answer off (finish_reason {finish_reason or 'missing'}){detail}"


def _replace_surrogates(text: str) -> str:
    """Return `text` with lone surrogates replaced: JSON can hold them, a file can't."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
