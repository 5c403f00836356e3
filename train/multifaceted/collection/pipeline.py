"""Pipeline of Multifaceted Collection: the stages for one instruction (section 3 of arXiv:2405.17977).

    propose    M(preferences | instruction, sub-dimensions): one per dimension, below the planned sub-dimension
    describe   M(descriptions | preferences)
    message    M(S | descriptions): from the descriptions alone, so that it fits any instruction
    answer     M(A | S, instruction)

- The sets of an instruction pass the stages one after another, without waiting for other instructions; each set sees
  those before it, so that it differs from them.
- All random choices follow from the seed and the numbers of instruction and set, so the same answers of the model give
  the same rows, in whatever order they arrive and over any number of restarts.
- Reasoning of the model (`<think>`) is removed from all replies and counted.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from train.datagen.stage_client import StageClient
from train.datagen.stats import truncate_line
from train.llm.client import Client
from train.llm.failures import NO_ANSWER, RequestFailed
from train.llm.yes_or_no import says_no
from train.multifaceted.collection import prompts
from train.multifaceted.collection.config import CollectionConfig
from train.multifaceted.collection.hierarchy import (
    Hierarchy,
    PlannedPreference,
    PreferencePlan,
    normalize_words,
)
from train.multifaceted.collection.instructions import Instruction
from train.multifaceted.collection.leakage import measure_instruction_leak
from train.multifaceted.collection.pressure_rows import answer_under_pressure
from train.multifaceted.collection.result import InstructionResult, SetResult

_NOUNS = {"propose": "preferences", "describe": "descriptions", "message": "system message", "answer": "answer"}

Planned = Sequence[PlannedPreference]


class Pipeline:
    """The stages of the collection."""

    def __init__(self, config: CollectionConfig, client: Client, hierarchy: Hierarchy, plan: PreferencePlan) -> None:
        self.config, self.hierarchy, self.plan = config, hierarchy, plan
        self.client = StageClient(client, config, prompts.STOP_PATTERNS)

    async def run(self, instruction: Instruction, further: Sequence[str] = ()) -> InstructionResult:
        """Return the result of one instruction. Raises UserError as the client does, which ends the run.

        `further`: instructions of earlier rows, for `pressure.turns`.
        """
        result = InstructionResult(instruction, reason=instruction.reason, detail=instruction.detail)
        result.events.update(instruction.events)
        if instruction.number is None or await self._is_screened_out(result):
            return result
        result.sets = [
            SetResult(number, planned) for number, planned in enumerate(self.plan.sets_of(instruction.number))
        ]
        for current in result.sets:
            try:
                is_written = await self._run_stages(result, current, further)
            except RequestFailed as failure:
                is_written = current.drop(NO_ANSWER, str(failure))
            if not is_written and self.config.on_lost_set == "drop_instruction":
                for other in result.written:
                    other.drop("another set of the instruction was lost")
                break
        return result

    async def _is_screened_out(self, result: InstructionResult) -> bool:
        """Ask the model whether the instruction states a style, with `filter.model`; drop it if so."""
        if not self.config.filter.model:
            return False
        try:
            request = self.client.request("screen", prompts.screen(result.instruction.prompt))
            answer = await self.client.ask(request, result, continues_if_empty=True)
        except RequestFailed as failure:
            result.reason, result.detail = NO_ANSWER, str(failure)
            return True
        no = None if answer.refused else says_no(answer.text)
        if no is None:
            result.events[f"screen: {answer.unfinished or 'neither yes nor no'}, and kept"] += 1
        if no is False:
            result.reason, result.detail = "states a style or format, says the model", truncate_line(answer.text)
        return no is False

    async def _run_stages(self, result: InstructionResult, current: SetResult, further: Sequence[str]) -> bool:
        """Run the stages of one set; return False if one drops it."""
        rng = random.Random(f"{self.config.seed} prompts {result.instruction.number} {current.number}")
        return (
            await self._propose(result, current)
            and await self._describe(result, current, rng)
            and await self._write_message(result, current, rng)
            and await self._answer(result, current)
            and await answer_under_pressure(self.client, self.config, result, current, further)
        )

    async def _propose(self, result: InstructionResult, current: SetResult) -> bool:
        if self.config.preferences == "hierarchy":
            current.preferences = [planned.with_text(planned.preference) for planned in current.planned]
            return True
        siblings = [preference for other in result.written if other is not current for preference in other.preferences]

        def build_prompt(missing: Planned, sample: int) -> list[prompts.Turn]:
            names = {planned.dimension: planned.subdimension for planned in missing}
            avoid = [
                sibling.preference
                for sibling in siblings
                if sibling.dimension in names and (sample or sibling.subdimension == names[sibling.dimension])
            ]
            return prompts.propose(result.instruction.prompt, missing, avoid)

        def find_error(planned: PlannedPreference, text: str) -> str:
            if len(text) > prompts.LONGEST_PREFERENCE:
                return "too long"
            taken = {
                normalize_words(sibling.preference) for sibling in siblings if sibling.dimension == planned.dimension
            }
            return "the same as a sibling's" if normalize_words(text) in taken else ""

        lines = await self._ask_lines(result, current, "propose", build_prompt, find_error)
        if lines is None:
            return False
        current.preferences = [planned.with_text(lines[planned.dimension]) for planned in current.planned]
        return True

    async def _describe(self, result: InstructionResult, current: SetResult, rng: random.Random) -> bool:
        preferences = {preference.dimension: preference for preference in current.preferences}
        state = rng.getstate()

        def build_prompt(missing: Planned, sample: int) -> list[prompts.Turn]:
            rng.setstate(state)  # the same examples in each try
            return prompts.describe([preferences[planned.dimension] for planned in missing], self.hierarchy, rng)

        lines = await self._ask_lines(result, current, "describe", build_prompt, lambda planned, text: "")
        if lines is None:
            return False
        current.preferences = [
            replace(preference, description=lines[dimension]) for dimension, preference in preferences.items()
        ]
        return True

    async def _ask_lines(
        self,
        result: InstructionResult,
        current: SetResult,
        stage: str,
        build_prompt: Callable[[Planned, int], list[prompts.Turn]],
        find_error: Callable[[PlannedPreference, str], str],
    ) -> dict[str, str] | None:
        """Return a line per dimension, or None if the set is dropped. Each try asks for the lines that are missing.

        Args:
            result, current: the instruction and its set.
            stage: propose or describe.
            build_prompt: takes the missing preferences and the number of the try.
            find_error: returns why a line is unusable; an empty text if it is usable.
        """
        lines: dict[str, str] = {}
        reason = detail = ""
        for sample in range(1 + self.config.retries):
            missing = [planned for planned in current.planned if planned.dimension not in lines]
            request = self.client.request(stage, build_prompt(missing, sample), sample)
            next_try = self.client.request(stage, build_prompt(missing, sample + 1), sample + 1)
            answer = await self.client.ask(request, result, next_try=next_try)
            reason, detail = answer.unfinished, truncate_line(answer.detail)
            if not answer.refused:
                replies = prompts.parse_dimension_lines(answer.text, missing, cut=bool(reason))
                for planned in missing:
                    if (text := replies.get(planned.dimension)) is None:
                        continue
                    error = find_error(planned, text)
                    if normalize_words(text) in map(normalize_words, lines.values()):
                        error = "the same for two dimensions"
                    if not error:
                        lines[planned.dimension] = text
                    reason = error or reason
            if len(lines) == len(current.planned):
                return lines
            reason = reason or "can't be read"
            result.events[f"{_NOUNS[stage]}: {reason}, of some or all dimensions"] += 1
        lost = [planned.dimension for planned in current.planned if planned.dimension not in lines]
        current.drop(f"{_NOUNS[stage]}: {reason}", f"{', '.join(lost)}: {detail}")
        return None

    async def _write_message(self, result: InstructionResult, current: SetResult, rng: random.Random) -> bool:
        turns = prompts.write_message([preference.description for preference in current.preferences], rng)
        siblings = {normalize_words(other.system) for other in result.written if other is not current}
        reason = ""
        for sample in range(1 + self.config.retries):
            answer = await self.client.ask(self.client.request("message", turns, sample), result)
            text = prompts.parse_message(answer.text)
            share = measure_instruction_leak(text, result.instruction.prompt)
            reason = replace(answer, text=text).unfinished
            if not reason and prompts.is_refusal(text):
                reason = "refused"
            elif not reason and not prompts.is_system_message(text):
                reason = "can't be read"
            elif not reason and normalize_words(text) in siblings:
                reason = "the same as a sibling's"
            elif not reason and self.config.leak is not None and share >= self.config.leak:
                reason = "tells what the instruction is about"
            if not reason:
                current.system = text
                return True
            result.events[f"system message: {reason}"] += 1
        return current.drop(f"system message: {reason}", truncate_line(answer.detail))

    async def _answer(self, result: InstructionResult, current: SetResult) -> bool:
        turns = prompts.answer(current.system, result.instruction.prompt)
        reason = ""
        for sample in range(1 + self.config.retries):
            answer = await self.client.ask(self.client.request("answer", turns, sample), result)
            reason = answer.unfinished
            if reason and self.config.on_cut_answer == "keep" and not answer.refused and not answer.blank:
                result.events[f"answer: {reason}, and kept"] += 1
                reason = ""
            if not reason:
                current.output = answer.text
                return True
            result.events[f"answer: {reason}"] += 1
        return current.drop(f"answer: {reason}", truncate_line(answer.detail))
