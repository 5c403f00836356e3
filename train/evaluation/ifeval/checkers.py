"""TODO: train.evaluation.ifeval.rows.checkers."""

import importlib.metadata
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from train.errors import UserError
from train.evaluation.ifeval.punkt import missing_package, provide_punkt
from train.evaluation.ifeval.rows import IFEvalRow

_LISTS = ("keywords", "forbidden_words")


@dataclass(frozen=True)
class ConstraintVerdict:
    """Whether an answer follows each constraint of its row. Loose: also without its first or last line or its `*`."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


class Checkers:
    """lm-evaluation-harness's checkers. `sentences`: where their sentence model is from.

    Raises UserError where what they need is not installed.
    """

    def __init__(self) -> None:
        self.sentences = provide_punkt()
        try:
            from langdetect import DetectorFactory
            from lm_eval.tasks.ifeval import instructions_registry, utils
        except ImportError as fault:
            raise missing_package(fault) from fault
        DetectorFactory.seed = 0
        self._utils: ModuleType = utils
        self._registry: dict[str, Any] = instructions_registry.INSTRUCTION_DICT
        self.version = importlib.metadata.version("lm-eval")

    def drawn_at_random(self, row: IFEvalRow) -> bool:
        """Whether a checker puts something random in the place of what the row asks for, having taken the row.

        Raises UserError where a rule is unknown, or its arguments are missing, too many or of no use.
        """
        drawn = False
        for name, given in zip(row.instructions, row.arguments, strict=True):
            if name not in self._registry:
                raise UserError(f"{row.place}: unknown rule {name!r}. Known: {', '.join(sorted(self._registry))}.")
            checker = self._registry[name](name)
            before = random.getstate()
            try:
                # Without arguments most draw them, and so know their names; this one wants its own at once.
                checker.build_description(**({"prompt_to_repeat": "x"} if name == "combination:repeat_prompt" else {}))
                wanted = set(checker.get_instruction_args_keys())
                self._refuse(row, name, given, wanted)
                random.setstate(before)
                checker.build_description(**given)
                drawn |= random.getstate() != before
                checker.check_following("Probably.")
            except UserError:
                raise
            except Exception as fault:  # whatever a checker does with arguments that it wasn't made for
                raise UserError(
                    f"{row.place}: the checker of {name} can't use {_shown(given)}: {type(fault).__name__}: {fault}"
                ) from fault
            finally:
                random.setstate(before)
        return drawn

    @staticmethod
    def _refuse(row: IFEvalRow, name: str, given: Mapping[str, Any], wanted: set[str]) -> None:
        if set(given) != wanted:
            raise UserError(
                f"{row.place}: kwargs of {name}: found {', '.join(sorted(given)) or 'none'}, "
                f"the checker wants {', '.join(sorted(wanted)) or 'none'}"
            )
        for argument, value in given.items():
            if not value:
                raise UserError(
                    f"{row.place}: kwargs of {name}: {argument} is {json.dumps(value)}, and the checker would put "
                    "something random in its place"
                )
            is_list = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
            if argument in _LISTS and not is_list:
                raise UserError(f"{row.place}: kwargs of {name}: {argument} must be a list of texts")

    def verdict(self, row: IFEvalRow, answer: str) -> ConstraintVerdict:
        """What the checkers say of an answer; an empty one follows nothing."""
        before = random.getstate()
        asked = self._utils.InputExample(
            key=row.key,
            instruction_id_list=list(row.instructions),
            prompt=row.prompt,
            kwargs=[dict(given) for given in row.arguments],
        )
        try:
            random.seed(0)
            strict = self._utils.test_instruction_following_strict(asked, answer).follow_instruction_list
            random.seed(0)
            loose = self._utils.test_instruction_following_loose(asked, answer).follow_instruction_list
        finally:
            random.setstate(before)
        return ConstraintVerdict(tuple(map(bool, strict)), tuple(map(bool, loose)))

    def record(self) -> dict[str, Any]:
        """For JSON: what the verdicts depend on beside rows and answers."""
        return {"lm_eval": self.version, "sentences": self.sentences, "langdetect_seed": 0}


def _shown(given: Mapping[str, Any]) -> str:
    return json.dumps(dict(given), ensure_ascii=False)
