"""Chat completions: the answer in the body of a response, of a server or of a batch file."""

import re
from collections.abc import Mapping
from typing import Any

from train.llm.finish_reasons import Ending, classify_finish_reason
from train.llm.journal import Answer

REASONING_FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks")
"""Fields of a message in which servers send what a model reasoned, beside the content."""

_TEXT_PARTS = ("text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning", "redacted_thinking", "reasoning_text", "summary_text")
_TOOL_PARTS = ("tool_use", "tool_call", "tool_calls", "function_call")


class UnusableReplyError(ValueError):
    """A chat completion that holds no answer; the message says why, in words for the user."""


def parse_completion(body: Any, seconds: float) -> Answer:
    """Return the answer in a chat completion: that of its first choice.

    Content in parts (Magistral, Anthropic, Bedrock) is the text parts joined; parts of reasoning are no text, and other
    parts beside a text (Mistral's references) are ignored. The completions form (`text` in place of a message) is read
    too, and so is a prompt that Gemini has blocked, which has no choices: a refusal.

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
        failure = choice.get("error")
        prompt_tokens, completion_tokens = (
            count if isinstance(count := usage.get(name), int) else None
            for name in ("prompt_tokens", "completion_tokens")
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("not a chat completion") from error
    text = "" if content is None else content
    ignored = ""
    if not isinstance(text, str):
        parts = _Parts(text)
        ignored = parts.ignored
        text, refusal, has_tool_calls = parts.text, refusal or parts.refusal, has_tool_calls or parts.calls_tool
        reasoning = reasoning or (parts.holds_reasoning and "content parts") or ""
    if isinstance(reason, Mapping):  # SGLang's own API: {"type": "length", "length": 16}
        reason = reason.get("type")
    finish_reason = str(reason or "")
    native = _native_reason(choice)
    if classify_finish_reason(native) in _NATIVE_COUNTS.get(classify_finish_reason(finish_reason), ()):
        finish_reason, failure = native, failure if classify_finish_reason(native) == "fault" else None
    if failure or classify_finish_reason(finish_reason) == "fault":
        raise UnusableReplyError(_words_of_fault(finish_reason, failure))
    elif has_tool_calls and classify_finish_reason(finish_reason) in ("complete", "unstated"):
        finish_reason = "tool_calls"  # some say "stop" all the same
    return Answer(
        text=_without_surrogates(text),
        finish_reason=_without_surrogates(finish_reason),
        refusal=_without_surrogates(str(refusal)) if refusal else None,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        seconds=seconds,
        reasoning_in=reasoning,
        ignored_part=ignored,
    )


_NATIVE_COUNTS: dict[Ending, tuple[Ending, ...]] = {
    "complete": ("cut", "refused", "fault", "tool"),
    "unknown": ("cut", "refused", "fault", "tool"),
    "unstated": ("complete", "cut", "refused", "fault", "tool"),
    "fault": ("refused",),
}
"""The endings of the model's own reason that count in place of a gateway's: `stop` for what the token limit cut,
`error` for what the model's filter did."""


def _native_reason(choice: Mapping[str, Any]) -> str:
    """Return the reason of the model's own API beside a gateway's: OpenRouter's field, or LiteLLM's."""
    fields = choice.get("provider_specific_fields")
    inner = fields.get("native_finish_reason") if isinstance(fields, Mapping) else None
    return str(choice.get("native_finish_reason") or inner or "")


def _block_reason(body: Mapping[str, Any]) -> str:
    """Return the reason for which Gemini has blocked a prompt; nothing where it has not."""
    feedback = body.get("promptFeedback") or body.get("prompt_feedback")
    reason = feedback.get("blockReason") or feedback.get("block_reason") if isinstance(feedback, Mapping) else None
    return str(reason or "")


class _Parts:
    """Content that is a list of parts, or a single one."""

    def __init__(self, content: Any) -> None:
        self.text = self.refusal = ""
        self.calls_tool = self.holds_reasoning = False
        self.ignored = ""
        """The type of the first part that can't be read."""
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") or "text" if isinstance(part, Mapping) else "text"
            if kind in _REASONING_PARTS:
                self.holds_reasoning = True
            elif kind in _TOOL_PARTS:
                self.calls_tool = True
            elif kind in _TEXT_PARTS and isinstance(said := _member(part, "text"), str):
                self.text += said
            elif kind == "refusal" and isinstance(said := _member(part, "refusal"), str):
                self.refusal += said
            elif isinstance(part, Mapping):
                self.ignored = self.ignored or str(kind)
            else:
                raise ValueError("content is no text")
        if self.ignored and not (self.text or self.refusal or self.calls_tool):
            raise UnusableReplyError(
                f"the answer's content has a part of type {self.ignored!r} that can't be read as text"
            )


def _member(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else part


def describe_empty(answer: Answer) -> str:
    """Return the reason why an answer holds no text, in words for the user."""
    if answer.reasoning_in:
        return (
            f"an empty answer, all of it in {answer.reasoning_in}: the server's reasoning parser and the template's "
            "setting (enable_thinking) do not match. Start the server without the parser, or let the model reason"
        )
    if not answer.blank:
        return "an empty answer: nothing but reasoning or control tokens"
    return f"an empty answer (finish_reason {answer.finish_reason or 'missing'})"


def _words_of_fault(finish_reason: str, failure: Any) -> str:
    """Return the words for an answer that the server broke off."""
    words = f"the server broke the answer off (finish_reason {finish_reason or 'missing'})"
    if isinstance(failure, Mapping):
        said = ": ".join(str(failure[name]) for name in ("code", "message") if failure.get(name))
        return f"{words}: {said or failure}"
    return f"{words}: {failure}" if failure else words


def _without_surrogates(text: str) -> str:
    """Return `text` with lone surrogates replaced: JSON can hold them, a file can't."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
