"""What became of one instruction and its preference sets, and the rows and pairs that are written of them."""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from train.datagen.usage import Usage
from train.multifaceted.collection.hierarchy import PlannedPreference, Preference
from train.multifaceted.collection.instructions import Instruction


@dataclass(slots=True)
class SetResult:
    """One set of an instruction. One that is left out has a reason; how far it came stands in the rest."""

    number: int
    planned: list[PlannedPreference]
    preferences: list[Preference] = field(default_factory=list)
    system: str = ""
    output: str = ""
    reason: str | None = None
    """Why it is left out, in the words of the report; None: it is written."""
    detail: str = ""

    def leave_out(self, reason: str, detail: str = "") -> bool:
        """This set is not written; False, for whoever asks whether to go on."""
        self.reason, self.detail = reason, detail
        return False


@dataclass(slots=True)
class InstructionResult:
    """What became of one instruction. One that is left out as a whole has a reason and no sets."""

    instruction: Instruction
    sets: list[SetResult] = field(default_factory=list)
    reason: str | None = None
    detail: str = ""
    events: Counter[str] = field(default_factory=Counter)
    """What happened on the way, over all tries, in the words of the report."""
    spent: dict[str, Usage] = field(default_factory=dict)
    """By stage."""

    @property
    def written(self) -> list[SetResult]:
        """The sets that are written; while they are made, those that are not lost so far."""
        return [one for one in self.sets if one.reason is None]

    @property
    def place(self) -> dict[str, str]:
        """The columns that say where it comes from."""
        return {
            "main_source": self.instruction.main_source,
            "original_source": self.instruction.original_source,
        }


def build_rows(result: InstructionResult) -> list[dict[str, Any]]:
    """Rows of the hub's set: its columns, and nothing else."""
    return [
        {
            **result.place,
            "preference_set": _preference_set(one),
            "system": one.system,
            "prompt": result.instruction.prompt,
            "output": one.output,
        }
        for one in result.written
    ]


def build_dropped_rows(result: InstructionResult) -> list[dict[str, Any]]:
    """Rows of left_out.jsonl: the instruction, or each of its sets that is not written (numbered from 0)."""
    of = {**result.place, "place": result.instruction.place, "prompt": result.instruction.prompt}
    if result.reason is not None:
        return [{**of, "set": None, "reason": result.reason, "detail": result.detail}]
    return [
        {
            **of,
            "set": one.number,
            "reason": one.reason,
            "detail": one.detail,
            "subdimensions": [draw.sub.name for draw in one.planned],
            "preference_set": _preference_set(one),
            "system": one.system,
            "output": one.output,
        }
        for one in result.sets
        if one.reason is not None
    ]


def build_pairs(result: InstructionResult, which: Literal["one", "all", "none"], seed: int) -> list[dict[str, Any]]:
    """Preference pairs in the columns of the hub's -DPO set: the answer to a message is chosen over a sibling's.

    Sets whose answers are the same make no pair. `chosen` and `rejected` hold the user's turn too, as the schema of
    these columns has it in the trainers that know it (argilla's, axolotl's).
    """
    written = result.written
    possible = [(own, other) for own in written for other in written if own.output != other.output]
    if which == "none" or not possible:
        return []
    if which == "one":
        rng = random.Random(f"{seed} pair {result.instruction.number}")
        first = rng.choice(list(dict.fromkeys(own.number for own, _ in possible)))
        possible = [rng.choice([pair for pair in possible if pair[0].number == first])]
    prompt = result.instruction.prompt
    return [
        {
            **result.place,
            "system": own.system,
            "prompt": prompt,
            "chosen": [{"content": prompt, "role": "user"}, {"content": own.output, "role": "assistant"}],
            "rejected": [{"content": prompt, "role": "user"}, {"content": other.output, "role": "assistant"}],
        }
        for own, other in possible
    ]


def _preference_set(one: SetResult) -> list[dict[str, str]]:
    return [
        {
            "dimension": preference.dimension,
            "subdimension": preference.subdimension,
            "preference": preference.preference,
            "description": preference.description,
        }
        for preference in one.preferences
    ]
