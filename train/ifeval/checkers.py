"""The checkers of lm-evaluation-harness (lm_eval.tasks.ifeval), called so that an answer always gets the same verdict.

Nothing is re-implemented. Three sources of randomness in the checkers are removed:

- langdetect, behind `change_case:english_*` and `language:response_language`, samples unless it is seeded (see its
  documentation); its seed is 0.
- Checkers sample a threshold or letter that a row lacks, or gives as 0. Such a row is refused.
- They also replace a letter that is none (`#`, `!`: two rows of the published file). These rows are kept, as all
  published figures include them; Python's generator is seeded for each verdict, and the report lists the rows.
"""

import importlib.metadata
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from train.errors import UserError
from train.ifeval.punkt import missing_package, provide_punkt
from train.ifeval.rows import IFEvalRow

_LISTS = ("keywords", "forbidden_words")


@dataclass(frozen=True)
class ConstraintVerdict:
    """Verdict on each constraint of a row. Loose: the answer may also lose its first or last line, or its `*`."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


class Checkers:
    """The harness's checkers. `sentences`: the origin of their sentence model.

    Raises UserError if a package that they need is not installed.
    """

    def __init__(self) -> None:
        self.sentences = provide_punkt()
        try:
            from langdetect import DetectorFactory
            from lm_eval.tasks.ifeval import instructions_registry, utils
        except ImportError as error:
            raise missing_package(error) from error
        DetectorFactory.seed = 0
        self._utils: ModuleType = utils
        self._registry: dict[str, Any] = instructions_registry.INSTRUCTION_DICT
        self.version = importlib.metadata.version("lm-eval")

    def is_randomized(self, row: IFEvalRow) -> bool:
        """Return whether a checker accepts the row and replaces one of its arguments by a random one.

        Raises UserError if a rule is unknown, or if its arguments are missing, too many or unusable.
        """
        randomized = False
        for name, given in zip(row.instructions, row.arguments, strict=True):
            if name not in self._registry:
                raise UserError(f"{row.place}: unknown rule {name!r}. Known: {', '.join(sorted(self._registry))}.")
            checker = self._registry[name](name)
            before = random.getstate()
            try:
                # Without arguments most checkers sample them, which reveals their names; this one requires its own.
                checker.build_description(**({"prompt_to_repeat": "x"} if name == "combination:repeat_prompt" else {}))
                self._refuse_arguments(row, name, given, set(checker.get_instruction_args_keys()))
                random.setstate(before)
                checker.build_description(**given)
                randomized |= random.getstate() != before
                checker.check_following("Probably.")
            except UserError:
                raise
            except Exception as error:  # checkers raise anything on arguments that they were not made for
                shown = json.dumps(dict(given), ensure_ascii=False)
                raise UserError(
                    f"{row.place}: the checker of {name} cannot use {shown}: {type(error).__name__}: {error}"
                ) from error
            finally:
                random.setstate(before)
        return randomized

    @staticmethod
    def _refuse_arguments(row: IFEvalRow, name: str, given: Mapping[str, Any], required: set[str]) -> None:
        if set(given) != required:
            raise UserError(
                f"{row.place}: kwargs of {name}: found {', '.join(sorted(given)) or 'none'}, "
                f"the checker takes {', '.join(sorted(required)) or 'none'}"
            )
        for argument, value in given.items():
            if not value:
                raise UserError(
                    f"{row.place}: kwargs of {name}: {argument} is {json.dumps(value)}, which the checker would "
                    "replace by a random value"
                )
            is_list = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
            if argument in _LISTS and not is_list:
                raise UserError(f"{row.place}: kwargs of {name}: {argument} must be a list of non-empty texts")

    def verdict(self, row: IFEvalRow, answer: str) -> ConstraintVerdict:
        """Return the verdict on an answer; an empty answer follows nothing."""
        before = random.getstate()
        example = self._utils.InputExample(
            key=row.key,
            instruction_id_list=list(row.instructions),
            prompt=row.prompt,
            kwargs=[dict(given) for given in row.arguments],
        )
        try:
            random.seed(0)
            strict = self._utils.test_instruction_following_strict(example, answer).follow_instruction_list
            random.seed(0)
            loose = self._utils.test_instruction_following_loose(example, answer).follow_instruction_list
        finally:
            random.setstate(before)
        return ConstraintVerdict(tuple(map(bool, strict)), tuple(map(bool, loose)))

    def record(self) -> dict[str, Any]:
        """Return what the verdicts depend on besides rows and answers, for JSON."""
        return {"lm_eval": self.version, "sentences": self.sentences, "langdetect_seed": 0}
