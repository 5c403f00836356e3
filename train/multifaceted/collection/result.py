"""Result of one instruction with its preference sets, and the rows and pairs that are written from it."""

import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from train.datagen.usage import Usage
from train.multifaceted.collection.hierarchy import PlannedPreference, Preference
from train.multifaceted.collection.instructions import Instruction
from train.pressure.generated import PressureRow


@dataclass(slots=True)
class SetResult:
    """Result of one preference set. A dropped set has a reason; its other fields show how far it came."""

    number: int
    """Number of the set in its instruction, from 0."""
    planned: list[PlannedPreference]
    """One per dimension."""
    preferences: list[Preference] = field(default_factory=list)
    system: str = ""
    output: str = ""
    pressure: list[PressureRow] = field(default_factory=list)
    """The set's plan under pressure, if it was drawn for it, then its aligned twin. Kept ones are written as rows in
    place of `system`, `output`; pairs are of these, so that siblings answer the same turn."""
    reason: str | None = None
    """Reason for dropping the set, as the report shows it; None = it is written."""
    detail: str = ""

    def drop(self, reason: str, detail: str = "") -> bool:
        """Mark the set as dropped; return False, for callers that return whether to continue."""
        self.reason, self.detail = reason, detail
        return False


@dataclass(slots=True)
class InstructionResult:
    """Result of one instruction. A dropped instruction has a reason and no sets."""

    instruction: Instruction
    sets: list[SetResult] = field(default_factory=list)
    reason: str | None = None
    detail: str = ""
    events: Counter[str] = field(default_factory=Counter)
    """Events over all tries, under the report's labels."""
    usage: dict[str, Usage] = field(default_factory=dict)
    """By stage."""

    @property
    def written(self) -> list[SetResult]:
        """The sets that are written; during the pipeline, those not dropped so far."""
        return [preference_set for preference_set in self.sets if preference_set.reason is None]

    @property
    def source_columns(self) -> dict[str, str]:
        """The columns with the instruction's origin."""
        return {
            "main_source": self.instruction.main_source,
            "original_source": self.instruction.original_source,
        }


def build_rows(result: InstructionResult, *, has_pressure: bool = False) -> list[dict[str, Any]]:
    """Return the training rows, in the columns of the published data set.

    `has_pressure`: the configuration asks for rows under pressure, so that all rows have the columns `history` (earlier
    turns, as pairs of question and answer) and `pressure` (what was done, or None).
    """
    rows = []
    for written in result.written:
        columns = {**result.source_columns, "preference_set": _preference_columns(written)}
        kept = [pressure for pressure in written.pressure if pressure.is_kept]
        for pressure in kept:
            system, *turns = [message["content"] for message in pressure.messages]
            pairs = [[turns[at], turns[at + 1]] for at in range(0, len(turns), 2)]
            row = {"system": system, "prompt": pairs[-1][0], "output": pairs[-1][1]}
            rows.append({**columns, **row, "history": pairs[:-1], "pressure": pressure.record()})
        if not kept:
            row = {"system": written.system, "prompt": result.instruction.prompt, "output": written.output}
            rows.append({**columns, **row, **({"history": [], "pressure": None} if has_pressure else {})})
    return rows


def build_dropped_rows(result: InstructionResult) -> list[dict[str, Any]]:
    """Return the rows of left_out.jsonl: the instruction, or each of its dropped sets (numbered from 0)."""
    columns = {**result.source_columns, "place": result.instruction.place, "prompt": result.instruction.prompt}
    if result.reason is not None:
        return [{**columns, "set": None, "reason": result.reason, "detail": result.detail}]
    return [
        {
            **columns,
            "set": dropped.number,
            "reason": dropped.reason,
            "detail": dropped.detail,
            "subdimensions": [planned.subdimension for planned in dropped.planned],
            "preference_set": _preference_columns(dropped),
            "system": dropped.system,
            "output": dropped.output,
        }
        for dropped in result.sets
        if dropped.reason is not None
    ]


def build_pairs(result: InstructionResult, which: Literal["one", "all", "none"], seed: int) -> list[dict[str, Any]]:
    """Return preference pairs in the columns of the published -DPO set.

    The answer to a system message is chosen over the answer to a sibling's. Sets with equal answers make no pair.
    `chosen` and `rejected` include the user turn, as trainers that know these columns expect (argilla's, axolotl's).
    """
    written = result.written
    candidates = [(own, other) for own in written for other in written if own.output != other.output]
    if which == "none" or not candidates:
        return []
    if which == "one":
        rng = random.Random(f"{seed} pair {result.instruction.number}")
        first = rng.choice(list(dict.fromkeys(own.number for own, _ in candidates)))
        candidates = [rng.choice([pair for pair in candidates if pair[0].number == first])]
    prompt = result.instruction.prompt
    return [
        {
            **result.source_columns,
            "system": own.system,
            "prompt": prompt,
            "chosen": [{"content": prompt, "role": "user"}, {"content": own.output, "role": "assistant"}],
            "rejected": [{"content": prompt, "role": "user"}, {"content": other.output, "role": "assistant"}],
        }
        for own, other in candidates
    ]


def _preference_columns(result: SetResult) -> list[dict[str, str]]:
    return [asdict(preference) for preference in result.preferences]
