"""Rows of IFEval: constraints in the system message (S-IFEval), in the user turn of its control, or IFEval itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from train.errors import UserError
from train.storage.jsonl_rows import ChatMessage, read_jsonl_rows

SKIPPED = ("language:response_language", "combination:repeat_prompt")
"""Rules that the official scoring of S-IFEval skips, with every prompt that has one: 470 of 541 prompts stay."""
PLACES = {"system": "in the system message", "user": "in the user turn"}
"""Turn -> its name in reports."""
_CONTENTS = (
    "A row holds key, prompt, instruction_id_list (rule names), kwargs (one mapping for each rule) and messages, which "
    "end with a user turn."
)


@dataclass(frozen=True)
class IFEvalRow:
    """One prompt with its constraints. `messages` end with a user turn; `place` is file and line, for errors."""

    key: int | str
    prompt: str
    instructions: tuple[str, ...]
    arguments: tuple[Mapping[str, Any], ...]
    messages: tuple[dict[str, Any], ...]
    place: str

    @property
    def skipped(self) -> bool:
        """Return whether the official scoring skips the row."""
        return not set(SKIPPED).isdisjoint(self.instructions)

    @property
    def system(self) -> str:
        """Return the text of its system messages; empty if there is none."""
        return "\n\n".join(message["content"] for message in self.messages if message["role"] == "system").strip()

    @property
    def turns(self) -> list[dict[str, Any]]:
        """Return the messages other than the system's."""
        return [message for message in self.messages if message["role"] != "system"]


class _PublishedRow(BaseModel):
    """A line of a published file."""

    model_config = ConfigDict(strict=True)

    key: Any
    prompt: str
    instruction_id_list: list[str] = Field(min_length=1)
    arguments: list[dict[str, Any]] = Field(validation_alias=AliasChoices("kwargs"))
    messages: list[ChatMessage] | None = None

    @field_validator("key")
    @classmethod
    def _check_key(cls, key: Any) -> int | str:
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise ValueError("must be an integer or text")
        return key

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.arguments) != len(self.instruction_id_list):
            raise ValueError(f"kwargs has {len(self.arguments)} entries for {len(self.instruction_id_list)} rules")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("messages must end with a user turn")
        return self


def read_rows(path: Path) -> list[IFEvalRow]:
    """Return the rows of a jsonl file with key, prompt, instruction_id_list, kwargs and messages, as published.

    A row without `messages` (IFEval's own) asks its prompt in the user turn. Raises UserError that names the line.
    """
    rows: dict[int | str, IFEvalRow] = {}
    for place, _, published in read_jsonl_rows(path, _PublishedRow, _CONTENTS):
        if published.key in rows:
            raise UserError(
                f"{place}: duplicate key {published.key}, first in {rows[published.key].place}. Keys must be unique."
            )
        # The published files hold role and content in either order.
        messages = published.messages or [ChatMessage(role="user", content=published.prompt)]
        rows[published.key] = IFEvalRow(
            published.key,
            published.prompt,
            tuple(published.instruction_id_list),
            # Files from the hub hold every argument of every rule, null if the rule has none.
            tuple({name: value for name, value in given.items() if value is not None} for given in published.arguments),
            tuple(message.model_dump() for message in messages),
            place,
        )
    return list(rows.values())


def match_rows(rows: Sequence[IFEvalRow], control: Sequence[IFEvalRow], path: Path) -> list[IFEvalRow]:
    """Return the rows of `control` in the order of `rows`.

    Raises UserError if a row is missing or has other constraints.
    """
    by_key = {row.key: row for row in control}
    matches = []
    for row in rows:
        match = by_key.get(row.key)
        if match is None:
            raise UserError(f"--control {path}: the row with key {row.key} ({row.place}) is missing there")
        if (match.instructions, match.arguments) != (row.instructions, row.arguments):
            raise UserError(
                f"--control {match.place}: the row with key {row.key} has other constraints than {row.place}"
            )
        matches.append(match)
    return matches


def refuse_swapped_control(rows: Sequence[IFEvalRow], control: Sequence[IFEvalRow]) -> None:
    """Raise UserError if `rows` lack system messages, or if `control` has its constraints there.

    The gap between the two would measure something else. A control may have a system message (a persona, say), but
    none that contains that of its row. `control`: the same rows in the same order.
    """
    expected = (
        "With --control, --data is the file with the constraints in the system message, and --control that with the "
        "same in the user turn"
    )
    for row, other in zip(rows, control, strict=True):
        if not row.system:
            swapped = ". Were the two swapped?" if other.system else "."
            raise UserError(
                f"--data {row.place}: the row with key {row.key} has no system message. {expected}{swapped}"
            )
        if row.system in other.system:
            raise UserError(
                f"--control {other.place}: the row with key {row.key} has its constraints in the system message. "
                f"{expected}."
            )
        if other.turns == row.turns:
            raise UserError(
                f"--control {other.place}: the row with key {row.key} has the same user turn as {row.place}, so the "
                f"constraints are not in it. {expected}."
            )


def place_of_constraints(rows: Sequence[IFEvalRow], path: Path) -> tuple[str, str]:
    """Return the turn that holds the constraints of rows without a control, and its name in reports.

    Raises UserError if only some rows have a system message: one figure would mix two measurements.
    """
    without = [row for row in rows if not row.system]
    if not without:
        return "system", PLACES["system"]
    if len(without) < len(rows):
        have = "has" if len(without) == 1 else "have"
        raise UserError(
            f"--data {path}: {len(without):,} of {len(rows):,} rows {have} no system message (the first "
            f"{without[0].place}), so one figure would mix two measurements. Put each kind in a file of its own."
        )
    # In other rows a system message may have been removed, so the user turn need not hold the constraints.
    asks_all = all([message["content"] for message in row.messages] == [row.prompt] for row in rows)
    return "user", PLACES["user"] if asks_all else "without a system message"
