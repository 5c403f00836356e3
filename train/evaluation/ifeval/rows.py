"""IFEval's rows and verdicts: constraints in the system message (S-IFEval), its user-turn control, or IFEval itself.

The verdicts are those of lm-evaluation-harness's own checkers (lm_eval.tasks.ifeval): nothing is re-implemented here.
Three things that they leave to chance are settled, so that the same answer always gets the same verdict:

- langdetect, which `change_case:english_*` and `language:response_language` ask, draws at random unless it is seeded
  (its documentation says so); its seed is 0.
- A threshold or letter that a row lacks, or gives as 0, is drawn at random by the checkers. Such a row is refused.
- So is a letter that is none (`#`, `!`: two rows of the published file). Those rows are kept, as everyone's published
  figures hold them; Python's generator is seeded for each verdict, and the report names the rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError

SKIPPED = ("language:response_language", "combination:repeat_prompt")
"""What the official scoring of S-IFEval leaves out, with every prompt that has one of them: 470 of 541 are left."""
PLACES = {"system": "in the system message", "user": "in the user turn"}
"""Where constraints stand, in words."""
_ROLES = ("system", "user", "assistant")


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
        """Whether the official scoring leaves it out."""
        return not set(SKIPPED).isdisjoint(self.instructions)

    @property
    def system(self) -> str:
        """What its system messages say; nothing where it has none, or an empty one."""
        return "\n\n".join(message["content"] for message in self.messages if message["role"] == "system").strip()

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages of the others than the system."""
        return [message for message in self.messages if message["role"] != "system"]


def read_rows(path: Path) -> list[IFEvalRow]:
    """The rows of a jsonl file: key, prompt, instruction_id_list, kwargs and messages, as published.

    A row without `messages` (IFEval's own) asks its prompt in the user turn. Raises UserError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut a text at U+2028
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: can't be read: {getattr(fault, 'strerror', None) or fault}") from fault
    rows: dict[int | str, IFEvalRow] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = _row(json.loads(line), place)
        except ValueError as fault:
            raise UserError(
                f"{place}: {fault}. A row holds key, prompt, instruction_id_list (rule names), kwargs (one mapping for "
                "each rule) and messages, which end with a user turn."
            ) from fault
        if row.key in rows:
            raise UserError(f"{place}: the key {row.key} is that of {rows[row.key].place} already; keys are unique")
        rows[row.key] = row
    if not rows:
        raise UserError(f"{path}: there are no rows in it")
    return list(rows.values())


def _row(found: Any, place: str) -> IFEvalRow:
    """One row. Raises ValueError with what is wrong with it."""
    if not isinstance(found, dict):
        raise ValueError("it is no mapping")
    missing = [name for name in ("key", "prompt", "instruction_id_list", "kwargs") if name not in found]
    if missing:
        raise ValueError(f"it has no `{'`, no `'.join(missing)}`")
    key, prompt, instructions = found["key"], found["prompt"], found["instruction_id_list"]
    if not isinstance(key, int | str) or not isinstance(prompt, str):
        raise ValueError("key must be a number or a text, and prompt a text")
    if not (isinstance(instructions, list) and instructions and all(isinstance(name, str) for name in instructions)):
        raise ValueError("instruction_id_list must be a list of at least one rule name")
    arguments = found["kwargs"]
    if not (isinstance(arguments, list) and all(isinstance(given, dict) for given in arguments)):
        raise ValueError("kwargs must be a list of mappings")
    if len(arguments) != len(instructions):
        raise ValueError(f"kwargs has {len(arguments)} entries for {len(instructions)} rules")
    messages = found.get("messages") or [{"role": "user", "content": prompt}]
    if not (
        isinstance(messages, list)
        and all(
            isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
            for message in messages
        )
        and messages[-1]["role"] == "user"
    ):
        raise ValueError("messages must be a list of {role, content} that ends with a user turn")
    # The published files hold role and content in either order; what is asked is the same.
    plain = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    # Files from the hub name every argument of every rule, with null where it has none.
    given = tuple({name: value for name, value in one.items() if value is not None} for one in arguments)
    return IFEvalRow(key, prompt, tuple(instructions), given, plain, place)


def same_rows(rows: Sequence[IFEvalRow], control: Sequence[IFEvalRow], path: Path) -> list[IFEvalRow]:
    """The rows of `control`, in the order of `rows`. Raises UserError where one is missing or has other constraints."""
    known = {row.key: row for row in control}
    found = []
    for row in rows:
        other = known.get(row.key)
        if other is None:
            raise UserError(f"--control {path}: the row with key {row.key} ({row.place}) is missing there")
        if (other.instructions, other.arguments) != (row.instructions, row.arguments):
            raise UserError(
                f"--control {other.place}: the row with key {row.key} has other constraints than {row.place}"
            )
        found.append(other)
    return found


def refuse_other_turns(rows: Sequence[IFEvalRow], control: Sequence[IFEvalRow]) -> None:
    """Raise UserError where `rows` don't have their constraints in the system message, or `control`, the same rows in
    the same order, not in the user turn: a gap between the two would be of something else.

    A control may have a system message (a persona, say), but none that holds what that of its row says.
    """
    meant = (
        "With --control, --data is the file with the constraints in the system message, and --control that with the "
        "same in the user turn"
    )
    for row, other in zip(rows, control, strict=True):
        if not row.system:
            exchanged = ". Were the two exchanged?" if other.system else "."
            raise UserError(f"--data {row.place}: the row with key {row.key} has no system message. {meant}{exchanged}")
        if row.system in other.system:
            raise UserError(
                f"--control {other.place}: the row with key {row.key} has its constraints in the system message. "
                f"{meant}."
            )
        if other.turns == row.turns:
            raise UserError(
                f"--control {other.place}: the row with key {row.key} asks in its user turn what {row.place} asks, so "
                f"the constraints aren't there. {meant}."
            )


def place_of_constraints(rows: Sequence[IFEvalRow], path: Path) -> tuple[str, str]:
    """Where rows without a control have their constraints, `system` or `user`, and that in words.

    Raises UserError where some have a system message and others have none: that is two figures.
    """
    without = [row for row in rows if not row.system]
    if not without:
        return "system", PLACES["system"]
    if len(without) < len(rows):
        have = "has" if len(without) == 1 else "have"
        raise UserError(
            f"--data {path}: {len(without):,} of {len(rows):,} rows {have} no system message (the first "
            f"{without[0].place}), so one figure would be of two things. Give each kind in a file of its own."
        )
    # Of other rows nothing tells that the user turn has them: a system message may have been taken out.
    asks_all = all([message["content"] for message in row.messages] == [row.prompt] for row in rows)
    return "user", PLACES["user"] if asks_all else "without a system message"
