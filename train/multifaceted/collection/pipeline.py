"""The construction of Multifaceted Collection for one instruction after another (section 3 of arXiv:2405.17977).

    propose    M(preferences | instruction, sub-dimensions): one of each dimension, below what was drawn
    describe   M(descriptions | preferences)
    message    M(S | descriptions): from the descriptions alone, so that it fits any instruction
    answer     M(A | S, instruction)

An instruction goes through these steps set by set, without waiting for other instructions; of its sets each one knows
those before, so that it differs from them. All that is random is drawn from the seed and the numbers of instruction and
set: the same answers of the model give the same rows, whatever order they came in, and over any number of kills.

What a model writes while it reasons (`<think>`) is no part of what it says: it is taken out, and counted.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from train.datagen.usage import ask
from train.llm.client import Client
from train.llm.failures import NO_ANSWER, RequestFailed
from train.llm.journal import Request
from train.llm.system_role import merge_into_user
from train.llm.yes_or_no import says_no
from train.multifaceted.collection import prompts
from train.multifaceted.collection.config import CollectionConfig
from train.multifaceted.collection.hierarchy import (
    Hierarchy,
    PlannedPreference,
    Preference,
    PreferencePlan,
    normalize_words,
)
from train.multifaceted.collection.instructions import Instruction
from train.multifaceted.collection.leakage import measure_instruction_leak
from train.multifaceted.collection.result import InstructionResult, SetResult

_NOUNS = {"propose": "preferences", "describe": "descriptions", "message": "system message", "answer": "answer"}


class Pipeline:
    """Takes instructions through the steps."""

    def __init__(self, config: CollectionConfig, client: Client, hierarchy: Hierarchy, plan: PreferencePlan) -> None:
        self.config, self.client, self.hierarchy, self.plan = config, client, hierarchy, plan

    async def run(self, instruction: Instruction) -> InstructionResult:
        """What becomes of one instruction. Raises UserError, as the client does, for what ends the run."""
        result = InstructionResult(instruction, reason=instruction.reason, detail=instruction.detail)
        result.events.update(instruction.events)
        if instruction.number is None or await self._screened_out(result):
            return result
        result.sets = [SetResult(number, planned) for number, planned in enumerate(self.plan.of(instruction.number))]
        for one in result.sets:
            try:
                made = await self._make(result, one)
            except RequestFailed as failure:
                made = one.leave_out(NO_ANSWER, str(failure))
            if not made and self.config.on_lost_set == "drop_instruction":
                for other in result.written:
                    other.leave_out("another set of the instruction was lost")
                break
        return result

    async def _screened_out(self, result: InstructionResult) -> bool:
        """Ask the model too whether the instruction states a style, if that is asked for."""
        if not self.config.filter.model:
            return False
        try:
            request = self._request("screen", prompts.screen(result.instruction.prompt), 0)
            answer = await ask(self.client, request, result, prompts.STOP_PATTERNS, continues_if_empty=True)
        except RequestFailed as failure:
            result.reason, result.detail = NO_ANSWER, str(failure)
            return True
        no = None if answer.refused else says_no(answer.text)
        if no is None:
            result.events[f"screen: {answer.unfinished or 'neither yes nor no'}, and kept"] += 1
        if no is False:
            result.reason, result.detail = "states a style or format, says the model", _beginning(answer.text)
        return no is False

    async def _make(self, result: InstructionResult, one: SetResult) -> bool:
        """Take one set through the steps, up to where it is lost."""
        rng = random.Random(f"{self.config.seed} prompts {result.instruction.number} {one.number}")
        return (
            await self._propose(result, one)
            and await self._describe(result, one, rng)
            and await self._write_message(result, one, rng)
            and await self._answer(result, one)
        )

    async def _propose(self, result: InstructionResult, one: SetResult) -> bool:
        if self.config.preferences == "hierarchy":
            one.preferences = [Preference(draw.sub.dimension, draw.sub.name, draw.preference) for draw in one.planned]
            return True
        siblings = [preference for other in result.written if other is not one for preference in other.preferences]

        def ask_for(missing: Sequence[PlannedPreference], sample: int) -> list[prompts.Turn]:
            wanted = {draw.sub.dimension: draw.sub.name for draw in missing}
            avoid = [
                taken.preference
                for taken in siblings
                if taken.dimension in wanted and (sample or taken.subdimension == wanted[taken.dimension])
            ]
            return prompts.propose(result.instruction.prompt, missing, avoid)

        def fault_of(draw: PlannedPreference, text: str) -> str:
            if len(text) > prompts.LONGEST_PREFERENCE:
                return "too long"
            taken = {normalize_words(taken.preference) for taken in siblings if taken.dimension == draw.sub.dimension}
            return "the same as a sibling's" if normalize_words(text) in taken else ""

        found = await self._lines(result, one, "propose", one.planned, ask_for, fault_of)
        if found is None:
            return False
        one.preferences = [
            Preference(draw.sub.dimension, draw.sub.name, found[draw.sub.dimension]) for draw in one.planned
        ]
        return True

    async def _describe(self, result: InstructionResult, one: SetResult, rng: random.Random) -> bool:
        of = {preference.dimension: preference for preference in one.preferences}
        state = rng.getstate()

        def ask_for(missing: Sequence[PlannedPreference], sample: int) -> list[prompts.Turn]:
            rng.setstate(state)  # the same examples for each try
            return prompts.describe([of[draw.sub.dimension] for draw in missing], self.hierarchy, rng)

        found = await self._lines(result, one, "describe", one.planned, ask_for, lambda draw, text: "")
        if found is None:
            return False
        one.preferences = [replace(preference, description=found[dimension]) for dimension, preference in of.items()]
        return True

    async def _lines(
        self,
        result: InstructionResult,
        one: SetResult,
        stage: str,
        wanted: Sequence[PlannedPreference],
        ask_for: Callable[[Sequence[PlannedPreference], int], list[prompts.Turn]],
        fault_of: Callable[[PlannedPreference, str], str],
    ) -> dict[str, str] | None:
        """A line for each dimension; what a try leaves missing is asked for again. None: the set is lost."""
        found: dict[str, str] = {}
        why, detail = "", ""
        for sample in range(1 + self.config.retries):
            missing = [draw for draw in wanted if draw.sub.dimension not in found]
            request = self._request(stage, ask_for(missing, sample), sample)
            next_try = self._request(stage, ask_for(missing, sample + 1), sample + 1)
            answer = await ask(self.client, request, result, prompts.STOP_PATTERNS, next_try=next_try)
            why, detail = answer.unfinished, _beginning(answer.detail)
            if not answer.refused:
                lines = prompts.parse_dimension_lines(answer.text, missing, cut=bool(why))
                for draw in missing:
                    if (text := lines.get(draw.sub.dimension)) is None:
                        continue
                    fault = fault_of(draw, text)
                    if normalize_words(text) in map(normalize_words, found.values()):
                        fault = "the same for two dimensions"
                    if not fault:
                        found[draw.sub.dimension] = text
                    why = fault or why
            if len(found) == len(wanted):
                return found
            why = why or "can't be read"
            result.events[f"{_NOUNS[stage]}: {why}, of some or all dimensions"] += 1
        lost = [draw.sub.dimension for draw in wanted if draw.sub.dimension not in found]
        one.leave_out(f"{_NOUNS[stage]}: {why}", f"{', '.join(lost)}: {detail}")
        return None

    async def _write_message(self, result: InstructionResult, one: SetResult, rng: random.Random) -> bool:
        turns = prompts.message([preference.description for preference in one.preferences], rng)
        siblings = {normalize_words(other.system) for other in result.written if other is not one}
        why = ""
        for sample in range(1 + self.config.retries):
            answer = await ask(self.client, self._request("message", turns, sample), result, prompts.STOP_PATTERNS)
            text = prompts.parse_message(answer.text)
            share = measure_instruction_leak(text, result.instruction.prompt)
            why = replace(answer, text=text).unfinished
            if not why and prompts.is_refusal(text):
                why = "refused"
            elif not why and not prompts.is_system_message(text):
                why = "can't be read"
            elif not why and normalize_words(text) in siblings:
                why = "the same as a sibling's"
            elif not why and self.config.leak is not None and share >= self.config.leak:
                why = "tells what the instruction is about"
            if not why:
                one.system = text
                return True
            result.events[f"system message: {why}"] += 1
        return one.leave_out(f"system message: {why}", _beginning(answer.detail))

    async def _answer(self, result: InstructionResult, one: SetResult) -> bool:
        turns = prompts.answer(one.system, result.instruction.prompt)
        why = ""
        for sample in range(1 + self.config.retries):
            answer = await ask(self.client, self._request("answer", turns, sample), result, prompts.STOP_PATTERNS)
            why = answer.unfinished
            if why and self.config.on_cut_answer == "keep" and not answer.refused and not answer.blank:
                result.events[f"answer: {why}, and kept"] += 1
                why = ""
            if not why:
                one.output = answer.text
                return True
            result.events[f"answer: {why}"] += 1
        return one.leave_out(f"answer: {why}", _beginning(answer.detail))

    def _request(self, stage: str, turns: Sequence[Mapping[str, Any]], sample: int) -> Request:
        decoding = getattr(self.config, stage).decoding()
        if self.config.system_role == "merge_into_user":
            turns = merge_into_user(turns)
        return Request(stage, turns, decoding, sample)


def _beginning(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."


# The run
