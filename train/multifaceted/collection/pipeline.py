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
from train.multifaceted.collection.hierarchy import Draw, Hierarchy, Plan, Preference, same_words
from train.multifaceted.collection.instructions import Instruction
from train.multifaceted.collection.leakage import told_share
from train.multifaceted.collection.result import Outcome, SetOutcome

_NOUNS = {"propose": "preferences", "describe": "descriptions", "message": "system message", "answer": "answer"}


class Pipeline:
    """Takes instructions through the steps."""

    def __init__(self, config: CollectionConfig, client: Client, hierarchy: Hierarchy, plan: Plan) -> None:
        self.config, self.client, self.hierarchy, self.plan = config, client, hierarchy, plan

    async def run(self, instruction: Instruction) -> Outcome:
        """What becomes of one instruction. Raises UserError, as the client does, for what ends the run."""
        outcome = Outcome(instruction, reason=instruction.reason, detail=instruction.detail)
        outcome.events.update(instruction.events)
        if instruction.number is None or await self._screened_out(outcome):
            return outcome
        outcome.sets = [SetOutcome(number, draws) for number, draws in enumerate(self.plan.of(instruction.number))]
        for one in outcome.sets:
            try:
                made = await self._make(outcome, one)
            except RequestFailed as failure:
                made = one.leave_out(NO_ANSWER, str(failure))
            if not made and self.config.on_lost_set == "drop_instruction":
                for other in outcome.written:
                    other.leave_out("another set of the instruction was lost")
                break
        return outcome

    async def _screened_out(self, outcome: Outcome) -> bool:
        """Ask the model too whether the instruction states a style, if that is asked for."""
        if not self.config.filter.model:
            return False
        try:
            request = self._request("screen", prompts.screen(outcome.instruction.prompt), 0)
            answer = await ask(self.client, request, outcome, prompts.FURTHER_TURNS, continues_if_empty=True)
        except RequestFailed as failure:
            outcome.reason, outcome.detail = NO_ANSWER, str(failure)
            return True
        no = None if answer.refused else says_no(answer.text)
        if no is None:
            outcome.events[f"screen: {answer.unfinished or 'neither yes nor no'}, and kept"] += 1
        if no is False:
            outcome.reason, outcome.detail = "states a style or format, says the model", _beginning(answer.text)
        return no is False

    async def _make(self, outcome: Outcome, one: SetOutcome) -> bool:
        """Take one set through the steps, up to where it is lost."""
        chance = random.Random(f"{self.config.seed} prompts {outcome.instruction.number} {one.number}")
        return (
            await self._propose(outcome, one)
            and await self._describe(outcome, one, chance)
            and await self._write_message(outcome, one, chance)
            and await self._answer(outcome, one)
        )

    async def _propose(self, outcome: Outcome, one: SetOutcome) -> bool:
        if self.config.preferences == "hierarchy":
            one.preferences = [Preference(draw.sub.dimension, draw.sub.name, draw.preference) for draw in one.draws]
            return True
        siblings = [preference for other in outcome.written if other is not one for preference in other.preferences]

        def ask_for(missing: Sequence[Draw], sample: int) -> list[prompts.Turn]:
            wanted = {draw.sub.dimension: draw.sub.name for draw in missing}
            avoid = [
                taken.preference
                for taken in siblings
                if taken.dimension in wanted and (sample or taken.subdimension == wanted[taken.dimension])
            ]
            return prompts.propose(outcome.instruction.prompt, missing, avoid)

        def fault_of(draw: Draw, text: str) -> str:
            if len(text) > prompts.LONGEST_PREFERENCE:
                return "too long"
            taken = {same_words(taken.preference) for taken in siblings if taken.dimension == draw.sub.dimension}
            return "the same as a sibling's" if same_words(text) in taken else ""

        found = await self._lines(outcome, one, "propose", one.draws, ask_for, fault_of)
        if found is None:
            return False
        one.preferences = [
            Preference(draw.sub.dimension, draw.sub.name, found[draw.sub.dimension]) for draw in one.draws
        ]
        return True

    async def _describe(self, outcome: Outcome, one: SetOutcome, chance: random.Random) -> bool:
        of = {preference.dimension: preference for preference in one.preferences}
        state = chance.getstate()

        def ask_for(missing: Sequence[Draw], sample: int) -> list[prompts.Turn]:
            chance.setstate(state)  # the same examples for each try
            return prompts.describe([of[draw.sub.dimension] for draw in missing], self.hierarchy, chance)

        found = await self._lines(outcome, one, "describe", one.draws, ask_for, lambda draw, text: "")
        if found is None:
            return False
        one.preferences = [replace(preference, description=found[dimension]) for dimension, preference in of.items()]
        return True

    async def _lines(
        self,
        outcome: Outcome,
        one: SetOutcome,
        stage: str,
        wanted: Sequence[Draw],
        ask_for: Callable[[Sequence[Draw], int], list[prompts.Turn]],
        fault_of: Callable[[Draw, str], str],
    ) -> dict[str, str] | None:
        """A line for each dimension; what a try leaves missing is asked for again. None: the set is lost."""
        found: dict[str, str] = {}
        why, detail = "", ""
        for sample in range(1 + self.config.retries):
            missing = [draw for draw in wanted if draw.sub.dimension not in found]
            request = self._request(stage, ask_for(missing, sample), sample)
            next_try = self._request(stage, ask_for(missing, sample + 1), sample + 1)
            answer = await ask(self.client, request, outcome, prompts.FURTHER_TURNS, next_try=next_try)
            why, detail = answer.unfinished, _beginning(answer.detail)
            if not answer.refused:
                lines = prompts.read_lines(answer.text, missing, cut=bool(why))
                for draw in missing:
                    if (text := lines.get(draw.sub.dimension)) is None:
                        continue
                    fault = fault_of(draw, text)
                    if same_words(text) in map(same_words, found.values()):
                        fault = "the same for two dimensions"
                    if not fault:
                        found[draw.sub.dimension] = text
                    why = fault or why
            if len(found) == len(wanted):
                return found
            why = why or "can't be read"
            outcome.events[f"{_NOUNS[stage]}: {why}, of some or all dimensions"] += 1
        lost = [draw.sub.dimension for draw in wanted if draw.sub.dimension not in found]
        one.leave_out(f"{_NOUNS[stage]}: {why}", f"{', '.join(lost)}: {detail}")
        return None

    async def _write_message(self, outcome: Outcome, one: SetOutcome, chance: random.Random) -> bool:
        turns = prompts.message([preference.description for preference in one.preferences], chance)
        siblings = {same_words(other.system) for other in outcome.written if other is not one}
        why = ""
        for sample in range(1 + self.config.retries):
            answer = await ask(self.client, self._request("message", turns, sample), outcome, prompts.FURTHER_TURNS)
            text = prompts.read_message(answer.text)
            share = told_share(text, outcome.instruction.prompt)
            why = replace(answer, text=text).unfinished
            if not why and prompts.is_refusal(text):
                why = "refused"
            elif not why and not prompts.is_message(text):
                why = "can't be read"
            elif not why and same_words(text) in siblings:
                why = "the same as a sibling's"
            elif not why and self.config.leak is not None and share >= self.config.leak:
                why = "tells what the instruction is about"
            if not why:
                one.system = text
                return True
            outcome.events[f"system message: {why}"] += 1
        return one.leave_out(f"system message: {why}", _beginning(answer.detail))

    async def _answer(self, outcome: Outcome, one: SetOutcome) -> bool:
        turns = prompts.answer(one.system, outcome.instruction.prompt)
        why = ""
        for sample in range(1 + self.config.retries):
            answer = await ask(self.client, self._request("answer", turns, sample), outcome, prompts.FURTHER_TURNS)
            why = answer.unfinished
            if why and self.config.on_cut_answer == "keep" and not answer.refused and not answer.blank:
                outcome.events[f"answer: {why}, and kept"] += 1
                why = ""
            if not why:
                one.output = answer.text
                return True
            outcome.events[f"answer: {why}"] += 1
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
