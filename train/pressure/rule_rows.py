"""Rows of {messages, rule, held_out}: a system message that states a rule, a question and an answer."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from train.errors import UserError
from train.storage.jsonl_rows import ChatMessage, read_jsonl_rows

_CONTENTS = "A row holds messages, rule and held_out."


class _HeldOutRow(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(strict=True)

    messages: list[ChatMessage]
    rule: str
    held_out: Literal["wording", "rule"]

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        if [message.role for message in self.messages] != ["system", "user", "assistant"]:
            raise ValueError("`messages` must be a system message, a user message and an answer")
        return self


def read_rule_rows(path: Path, rules: Collection[str], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the JSON object of each row.

    `rules`: names that a row may have. `prefix`: the option that names the file, for errors.
    Raises UserError that names the line and the key.
    """
    for place, raw, row in read_jsonl_rows(path, _HeldOutRow, _CONTENTS, prefix):
        if row.rule not in rules:
            raise UserError(f"{place}: `rule` is {row.rule!r}. Allowed: {', '.join(rules)}.")
        yield place, raw
