"""Requests to a model, their sampling parameters, and the answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from train.llm.finish_reasons import FinishClass, classify_finish_reason, describe_unfinished

KEY_VERSION = 1
"""Part of every request's key; a change would ask everything again."""

NO_LIMIT = 2**63 - 1
"""The token limit of a request without one: answers that an earlier limit cut are asked for again."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Sampling parameters, named as in the OpenAI API.

    None and empty values are not sent: the server's default holds.

    extra: further fields of the request (top_k, min_p, chat_template_kwargs, ...), sent unchanged.
    limit_name: field of the token limit; None = send no limit. A server that refuses max_tokens gets the name that it
        asks for.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    limit_name: str | None = "max_tokens"

    @classmethod
    def from_settings(
        cls,
        max_tokens: int,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Return the decoding of a stage's settings.

        A null in `extra` removes its field from the request; a `max_completion_tokens` there replaces `max_tokens`.
        """
        own = {"temperature": temperature, "top_p": top_p, "seed": seed}
        own |= dict.fromkeys(name for name in own if name in extra)
        rest = {name: value for name, value in extra.items() if value is not None}
        limit = rest.pop("max_completion_tokens", None)
        limit_name: str | None = "max_completion_tokens"
        if limit is None:
            limit, limit_name = (NO_LIMIT, None) if "max_tokens" in extra else (max_tokens, "max_tokens")
        return cls(limit, **own, extra=rest, limit_name=limit_name)  # type: ignore[arg-type]

    def parameters(self, sample: int) -> dict[str, Any]:
        """Return the request's fields besides model, messages and token limit. Each sample has its own seed."""
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": None if self.seed is None else self.seed + sample,
            "stop": list(self.stop) or None,
        }
        return {name: value for name, value in fields.items() if value is not None} | dict(self.extra)


@dataclass(frozen=True, slots=True)
class Request:
    """A request. `sample` numbers several answers to the same messages: 1 is the second try, and so on."""

    stage: str
    messages: Sequence[Mapping[str, Any]]
    decoding: Decoding
    sample: int = 0

    def key(self, model: str) -> bytes:
        """Return the request's key in the journal: a hash of stage, model, messages and decoding.

        The messages hold the prompt itself, so a changed prompt is another request. The token limit is not part of the
        key but stored with the answer (see `Journal.find`): a higher limit asks again only for answers that were cut.
        """
        parameters = self.decoding.parameters(self.sample)
        fields = [KEY_VERSION, self.stage, model, self.sample, parameters, [dict(message) for message in self.messages]]
        return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=20).digest()


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer, as the server sent it.

    prompt_tokens, completion_tokens: None if the server doesn't count them.
    seconds: from sending the request that was answered to its answer, without earlier tries and pauses.
    reasoning_in: field with reasoning beside the text (reasoning_content, ...). Not in the journal.
    ignored_part: type of a part beside the text that can't be read as text. Not in the journal.
    only_reasoning: the text was reasoning without an end, so there is no answer (set by `reasoning.read_answer`).
    """

    text: str
    finish_reason: str
    refusal: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    from_journal: bool = False
    reasoning_in: str = ""
    ignored_part: str = ""
    only_reasoning: bool = False

    @property
    def finish_class(self) -> FinishClass:
        """Return the class of its finish reason."""
        return classify_finish_reason(self.finish_reason)

    @property
    def detail(self) -> str:
        """Return its refusal or text, or the reason why it has none, for reports."""
        reasoning = "its reasoning has no end, " if self.only_reasoning else ""
        return self.refusal or self.text or f"{reasoning}finish_reason {self.finish_reason or 'missing'}"

    @property
    def cut(self) -> bool:
        """Return True if the token limit ended it."""
        return self.finish_class == "cut"

    @property
    def refused(self) -> bool:
        """Return True if the server withheld it (a content filter) or marked it as the model's refusal."""
        return bool(self.refusal) or self.finish_class == "refused"

    @property
    def empty(self) -> bool:
        """Return True for an answer without text that was not cut or withheld, and calls no tool."""
        return self.blank and not self.refusal and self.finish_class in ("complete", "unknown", "unstated")

    @property
    def blank(self) -> bool:
        """Return True for a text of only blanks and invisible characters (U+200B, U+FEFF)."""
        return not any(letter.isprintable() and not letter.isspace() for letter in self.text)

    @property
    def unfinished(self) -> str:
        """Return the reports' text for an answer that is not complete; empty for a complete one."""
        if self.refused:
            return "refused"
        if self.finish_class != "complete":
            return describe_unfinished(self.finish_reason)
        if self.only_reasoning:
            return "without an end to its reasoning"
        if not self.blank:
            return ""
        return f"empty, all of it in {self.reasoning_in}" if self.reasoning_in else "empty"
