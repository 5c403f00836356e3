"""Chat completions: the answer in the body of a response, of a server or of a batch file."""

import re
from typing import Any

from train.llm.journal import Answer


def answer_in(body: Any, seconds: float) -> Answer:
    """Return the answer in a chat completion. Raises ValueError where `body` is not one."""
    try:
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        text, refusal = message.get("content"), message.get("refusal")
        if not isinstance(text, str | None) or not isinstance(refusal, str | None):
            raise ValueError("content is no text")
        prompt_tokens, completion_tokens = (
            count if isinstance(count := usage.get(name), int) else None
            for name in ("prompt_tokens", "completion_tokens")
        )
        finish_reason = str(choice.get("finish_reason") or "")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("not a chat completion") from error
    return Answer(
        text=_without_surrogates(text or ""),
        finish_reason=_without_surrogates(finish_reason),
        refusal=None if refusal is None else _without_surrogates(refusal),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        seconds=seconds,
    )


def _without_surrogates(text: str) -> str:
    """Return `text` with lone surrogates replaced: JSON can hold them, a file can't."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
