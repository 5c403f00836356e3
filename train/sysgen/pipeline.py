"""The four phases of SYSGEN for one row after another (section 3 of arXiv:2502.11330), and what we add to them.

    generate   M(S | prompt, Q, A): a system message in tagged phrases
    filter     rules: what stands in properly matched tags of the eight, in canonical order (`tags.parse`)
    verify     M judges each tag; Bad and None go
    answer     M(A' | S, Q): every answer anew

Each row goes through all of them without waiting for any other. All that is random is drawn from the seed and the
row's number, so the same answers of the model give the same rows, whatever order they came in.

A conversation of several turns gets one system message, which is verified against each turn (a tag stays if no turn
finds it Bad and one finds it Good), and its answers are given anew in sequence, each seeing those before. Answers that
call tools, and those after the results of tools, can't be given anew without the tools: such a row keeps its own.

What a model writes while it reasons (`<think>`) is no part of what it says: it is taken out of all it writes, and
counted.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from train.data.sources.formats import Message, RowError
from train.datagen.drop_reasons import UNREADABLE, UNSUPPORTED
from train.datagen.source_rows import PlacedRow
from train.datagen.usage import ask
from train.llm.client import Client
from train.llm.failures import NO_ANSWER, RequestFailed
from train.llm.journal import Decoding, Request
from train.llm.system_role import merge_into_user
from train.llm.yes_or_no import says_no
from train.sysgen import prompts
from train.sysgen.config import SysgenConfig
from train.sysgen.constraints import Constraint, draw
from train.sysgen.filters import language_of, leaked_share
from train.sysgen.result import Outcome
from train.sysgen.tag_balance import Balance
from train.sysgen.tags import Annotated, Phrase, Verdict, parse
from train.sysgen.verdicts import verdicts_of_reply


class Pipeline:
    """Takes rows through the phases. `balance` decides who is reminded of rare tags."""

    def __init__(self, config: SysgenConfig, client: Client, balance: Balance) -> None:
        self.config, self.client, self.balance = config, client, balance
        # The gates take a millisecond or two a row, and rows come to them in crowds: one at a time, with a look at the
        # servers' answers in between, or 64 places would wait for a crowd of 64.
        self._at_the_gates = asyncio.Lock()

    async def run(self, row: PlacedRow) -> Outcome:
        """What becomes of one row. Raises UserError, as the client does, for what ends the run."""
        index, place, conversation = row
        outcome = Outcome(index, place)
        if isinstance(conversation, RowError):
            return outcome.leave_out(f"{UNREADABLE}: {conversation.kind}", conversation.detail)
        outcome.tools = conversation.tools
        try:
            return await self._taken_through(outcome, conversation.messages)
        except RequestFailed as failure:
            return outcome.leave_out(NO_ANSWER, str(failure))

    async def _taken_through(self, outcome: Outcome, messages: Sequence[Message]) -> Outcome:
        config = self.config
        existing = messages[0]["content"] if messages[0]["role"] == "system" else None
        if existing is not None and config.existing_system == "keep":
            outcome.messages, outcome.system = list(messages), existing
            outcome.events["kept with the system message that it had"] += 1
            return outcome
        turns = _up_to_last_answer(messages[existing is not None :])
        if len(turns) < len(messages) - (existing is not None):
            outcome.events["turns after the last answer left out"] += 1
        if any(turn["role"] == "system" for turn in turns):
            return outcome.leave_out(f"{UNSUPPORTED}: a system message in the middle of the conversation")

        if config.message == "common":
            outcome.system = config.common_message
        elif not await self._write_message(outcome, turns, existing if config.existing_system == "refine" else None):
            if config.on_empty != "keep_without_system":
                return outcome
            outcome.reason, outcome.detail = None, ""
            outcome.events["kept without a system message"] += 1
            outcome.messages, outcome.message, outcome.system = list(turns), Annotated(()), ""
            return outcome
        return await self._answer(outcome, turns)

    # The system message

    async def _write_message(self, outcome: Outcome, turns: Sequence[Message], existing: str | None) -> bool:
        """Generate, filter and verify until there is a message that passes; else leave the row out."""
        outcome.reminded_of = self.balance.reminders(outcome.index)
        tries = 1 + (self.config.retries if self.config.on_empty == "retry" else 0)
        for sample in range(tries):
            if sample:
                outcome.events["another try at the system message"] += 1
            is_last = sample + 1 == tries
            why_not, detail = await self._try_message(outcome, turns, existing, sample, is_last=is_last)
            if not why_not:
                return True
            outcome.events[why_not] += 1
        outcome.leave_out(why_not, detail)
        return False

    async def _try_message(
        self, outcome: Outcome, turns: Sequence[Message], existing: str | None, sample: int, *, is_last: bool
    ) -> tuple[str, str]:
        """One try. What is wrong with it, in the words of the report, and in detail; nothing if it passes."""
        config = self.config
        forbid_leak = config.gates.leak is not None
        prompt = prompts.generate(turns, existing=existing, remind_of=outcome.reminded_of, forbid_leak=forbid_leak)
        request = self._request("generate", prompt, config.generate.decoding(), sample)
        continues_if_empty = is_last and config.on_empty == "keep_without_system"
        answer = await ask(self.client, request, outcome, prompts.FURTHER_TURNS, continues_if_empty=continues_if_empty)
        outcome.written_by_model, outcome.verdicts = answer.text, []
        outcome.message = Annotated(())
        if answer.refused:
            return "the model refused to write a system message", _beginning(answer.detail)
        if answer.cut:
            outcome.events["system message cut at the token limit"] += 1
        elif answer.only_reasoning or answer.empty:
            return f"system message {answer.unfinished}", answer.detail
        outcome.phase = "generated"
        outcome.message = parse(answer.text)
        if not outcome.message.phrases:
            return "no valid phrase", _beginning(answer.text) or answer.unfinished or "an empty answer"
        outcome.phase = "filtered"
        next_try = replace(request, sample=sample + 1)
        if unfinished := await self._verify(outcome, turns, sample, next_try, continues_if_empty=continues_if_empty):
            return unfinished, f"of the message {_beginning(answer.text)}"
        if not outcome.message.phrases:
            judged = (f"{tag}: {verdict}" for said in outcome.verdicts for tag, verdict in said.items())
            return "no phrase was verified", ", ".join(judged)
        outcome.phase = "verified"
        outcome.system = outcome.message.text
        async with self._at_the_gates:
            await asyncio.sleep(0)
            return self._stopped_by_gates(outcome.system, turns)

    async def _verify(
        self, outcome: Outcome, turns: Sequence[Message], sample: int, next_try: Request, *, continues_if_empty: bool
    ) -> str:
        """Remove the phrases that fail; return why the verification is not finished, nothing if it is.

        `next_try`, `continues_if_empty`: what follows on an empty verification, as of `Client.ask`.
        """
        exchanges: Sequence[Sequence[Message] | None] = _exchanges(turns)
        if len(exchanges) == 1:
            exchanges = [None]  # the paper's way: the message alone
        decoding = self.config.verify.decoding()
        continues_if_empty = continues_if_empty or self.config.on_unfinished_verification == "keep"
        for exchange in exchanges:
            request = self._request("verify", prompts.verify(outcome.message, exchange), decoding, sample)
            answer = await ask(
                self.client,
                request,
                outcome,
                prompts.FURTHER_TURNS,
                next_try=next_try,
                continues_if_empty=continues_if_empty,
            )
            read = verdicts_of_reply(answer.text)
            missing = sum(tag not in read.of for tag in outcome.message.tags)
            if missing and answer.unfinished:
                unfinished = f"verification {answer.unfinished}"
                if self.config.on_unfinished_verification == "retry":
                    return unfinished
                outcome.events[f"{unfinished}, and its phrases kept"] += 1
                if not read.of:
                    continue
            else:
                outcome.events["verdict that can't be read"] += missing
            outcome.verdicts.append(dict(read.of))
            outcome.tags_judged += len(outcome.message.tags)
            outcome.events["verdict written otherwise, and read"] += read.repairs.get("written otherwise", 0)
        for tag in outcome.message.tags:
            verdict = _combined([verdicts.get(tag) for verdicts in outcome.verdicts])
            if verdict is None and self.config.on_missing_verdict == "keep":
                continue
            if verdict != "Good":
                reason = f"judged {verdict}" if verdict else "no verdict"
                outcome.message = outcome.message.without({tag}, reason)
        return ""

    def _stopped_by_gates(self, system: str, turns: Sequence[Message]) -> tuple[str, str]:
        gates = self.config.gates
        questions = "\n".join(turn["content"] for turn in turns if turn["role"] == "user")
        if gates.language:
            ours, theirs = language_of(system), language_of(questions)
            if ours and theirs and ours != theirs:
                return "gate: in another language than the conversation", f"{ours}, the questions are in {theirs}"
        if gates.leak is not None:
            share = max(leaked_share(system, questions, answer["content"]) for answer in _answers(turns))
            if share >= gates.leak:
                return "gate: gives the answer away", f"{share:.0%} of an answer"
        return "", ""

    # The answers

    async def _answer(self, outcome: Outcome, turns: Sequence[Message]) -> Outcome:
        config = self.config
        has_tools = outcome.tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)
        if config.answers == "original" or has_tools:
            if has_tools and config.answers == "anew":
                outcome.events["kept its own answers, as they need tools"] += 1
            outcome.messages = [_system(outcome.system), *turns]
            return await self._judged(outcome)
        plain = outcome.message
        constraints = self._drawn(outcome, turns)
        answered = await self._answered_anew(outcome, turns, constraints)
        if answered is None and constraints and outcome.reason is None:
            outcome.events["constraints given up"] += 1
            outcome.message, outcome.constraints, outcome.system = plain, [], plain.text
            answered = await self._answered_anew(outcome, turns, [])
        if answered is None:
            return outcome
        if constraints and outcome.answers == "original":  # which were not written to meet them, and aren't checked
            outcome.events["constraints given up"] += 1
            outcome.message, outcome.constraints, outcome.system = plain, [], plain.text
        outcome.messages = [_system(outcome.system), *answered]
        if outcome.answers == "anew":
            outcome.phase = "answered"
            outcome.original_characters = sum(len(answer["content"]) for answer in _answers(turns))
            outcome.new_characters = sum(len(answer["content"]) for answer in _answers(answered))
        return await self._judged(outcome)

    def _drawn(self, outcome: Outcome, turns: Sequence[Message]) -> list[Constraint]:
        """Constraints for this row, put into its message."""
        wanted = self.config.constraints
        chance = random.Random(f"{self.config.seed} constraints {outcome.index}")
        if self.config.message == "common" or chance.random() >= wanted.share:
            return []
        language = language_of(" ".join(turn["content"] for turn in turns if turn["role"] == "user"))
        if language not in (None, "en"):
            return []  # their words are English
        shaped = "Format" in outcome.message.tags
        drawn = draw([answer["content"] for answer in _answers(turns)], chance, wanted.at_most, shaped=shaped)
        outcome.message = outcome.message.with_phrases(Phrase(one.tag, one.text) for one in drawn)
        outcome.system = outcome.message.text
        outcome.constraints = [{"kind": one.kind, "tag": one.tag, "text": one.text} for one in drawn]
        return drawn

    async def _answered_anew(
        self, outcome: Outcome, turns: Sequence[Message], constraints: Sequence[Constraint]
    ) -> list[Message] | None:
        """The turns with every answer given anew; None where one doesn't comply, or is unfinished and the row goes."""
        config = self.config
        attempts = config.constraints.attempts if constraints else 1
        continues_if_empty = config.on_unfinished_answer == "original" or not all(one.is_met("") for one in constraints)
        history: list[Message] = []
        for turn in turns:
            if turn["role"] != "assistant":
                history.append({"role": turn["role"], "content": turn["content"]})
                continue
            for sample in range(attempts):
                asked = [_system(outcome.system), *history]
                request = self._request("answer", asked, config.answer.decoding(), sample)
                answer = await ask(
                    self.client, request, outcome, prompts.FURTHER_TURNS, continues_if_empty=continues_if_empty
                )
                broken = [one for one in constraints if not one.is_met(answer.text)]
                if not broken:
                    break
                outcome.events["answer that breaks a constraint"] += 1
            else:
                return None
            if answer.unfinished:
                unfinished = f"new answer {answer.unfinished}"
                outcome.events[unfinished] += 1
                if config.on_unfinished_answer == "original":
                    outcome.events["kept its own answers, as a new one was unfinished"] += 1
                    outcome.answers = "original"
                    return list(turns)
                if config.on_unfinished_answer == "drop" or answer.blank:
                    outcome.leave_out(unfinished, _beginning(answer.detail))
                    return None
            history.append({"role": "assistant", "content": answer.text})
        outcome.answers = "anew"
        return history

    async def _judged(self, outcome: Outcome) -> Outcome:
        """Leave a row out whose answers ignore the system message, if that is asked for."""
        if not self.config.gates.judge:
            return outcome
        question = ""
        for turn in outcome.messages[1:]:
            if turn["role"] == "user":
                question = turn["content"]
            if turn["role"] != "assistant" or not turn["content"].strip():
                continue
            asked = prompts.follows(outcome.system, question, turn["content"])
            request = self._request("judge", asked, self.config.judge.decoding(), 0)
            answer = await ask(self.client, request, outcome, prompts.FURTHER_TURNS, continues_if_empty=True)
            verdict = None if answer.refused else says_no(answer.text)
            if verdict is None:
                why = answer.unfinished or "that can't be read"
                outcome.events[f"judgement {why}"] += 1
            if verdict:
                return outcome.leave_out("gate: the answer ignores the system message", _beginning(turn["content"]))
        return outcome

    def _request(self, stage: str, messages: Sequence[Mapping[str, Any]], decoding: Decoding, sample: int) -> Request:
        if self.config.system_role == "merge_into_user":
            messages = merge_into_user(messages)
        return Request(stage, messages, decoding, sample)


def _up_to_last_answer(turns: Sequence[Message]) -> list[Message]:
    """Return the turns up to the last answer: no answer to train on follows the others."""
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant")
    return list(turns[: last + 1])


def _exchanges(turns: Sequence[Message]) -> list[list[Message]]:
    """Each answer with what was said since the one before."""
    exchanges: list[list[Message]] = [[]]
    for turn in turns:
        exchanges[-1].append(turn)
        if turn["role"] == "assistant":
            exchanges.append([])
    return exchanges[:-1]


def _answers(turns: Sequence[Message]) -> list[Message]:
    return [turn for turn in turns if turn["role"] == "assistant"]


def _combined(verdicts: Sequence[Verdict | None]) -> Verdict | None:
    """What several turns say of one tag: Bad if one says so, else Good if one does, else None; nothing if none does."""
    order: tuple[Verdict, ...] = ("Bad", "Good", "None")
    return next((verdict for verdict in order if verdict in verdicts), None)


def _beginning(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _system(text: str) -> Message:
    return {"role": "system", "content": text}
