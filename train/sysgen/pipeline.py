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

from train.data.sources.formats import Message, RowFault
from train.datagen.drop_reasons import UNREADABLE, UNSUPPORTED
from train.datagen.source_rows import NumberedRow
from train.datagen.usage import ask
from train.llm.client import Client
from train.llm.failures import NO_ANSWER, RequestFailed
from train.llm.journal import Decoding, Request
from train.llm.system_role import merge_into_user
from train.llm.yes_or_no import says_no
from train.sysgen import prompts
from train.sysgen.config import SysgenConfig
from train.sysgen.constraints import Constraint, draw_constraints
from train.sysgen.filters import detect_language, measure_answer_leak
from train.sysgen.result import RowResult
from train.sysgen.tag_balance import TagBalance
from train.sysgen.tags import Phrase, TaggedMessage, Verdict, parse
from train.sysgen.verdicts import parse_reply_verdicts


class Pipeline:
    """Takes rows through the phases. `balance` decides who is reminded of rare tags."""

    def __init__(self, config: SysgenConfig, client: Client, balance: TagBalance) -> None:
        self.config, self.client, self.balance = config, client, balance
        # The gates take a millisecond or two a row, and rows come to them in crowds: one at a time, with a look at the
        # servers' answers in between, or 64 places would wait for a crowd of 64.
        self._at_the_gates = asyncio.Lock()

    async def run(self, row: NumberedRow) -> RowResult:
        """What becomes of one row. Raises UserError, as the client does, for what ends the run."""
        index, place, conversation = row
        result = RowResult(index, place)
        if isinstance(conversation, RowFault):
            return result.leave_out(f"{UNREADABLE}: {conversation.kind}", conversation.detail)
        result.tools = conversation.tools
        try:
            return await self._taken_through(result, conversation.messages)
        except RequestFailed as failure:
            return result.leave_out(NO_ANSWER, str(failure))

    async def _taken_through(self, result: RowResult, messages: Sequence[Message]) -> RowResult:
        config = self.config
        existing = messages[0]["content"] if messages[0]["role"] == "system" else None
        if existing is not None and config.existing_system == "keep":
            result.messages, result.system = list(messages), existing
            result.events["kept with the system message that it had"] += 1
            return result
        turns = _up_to_last_answer(messages[existing is not None :])
        if len(turns) < len(messages) - (existing is not None):
            result.events["turns after the last answer left out"] += 1
        if any(turn["role"] == "system" for turn in turns):
            return result.leave_out(f"{UNSUPPORTED}: a system message in the middle of the conversation")

        if config.message == "common":
            result.system = config.common_message
        elif not await self._write_message(result, turns, existing if config.existing_system == "refine" else None):
            if config.on_empty != "keep_without_system":
                return result
            result.reason, result.detail = None, ""
            result.events["kept without a system message"] += 1
            result.messages, result.message, result.system = list(turns), TaggedMessage(()), ""
            return result
        return await self._answer(result, turns)

    # The system message

    async def _write_message(self, result: RowResult, turns: Sequence[Message], existing: str | None) -> bool:
        """Generate, filter and verify until there is a message that passes; else leave the row out."""
        result.reminded_of = self.balance.draw_reminders(result.index)
        tries = 1 + (self.config.retries if self.config.on_empty == "retry" else 0)
        for sample in range(tries):
            if sample:
                result.events["another try at the system message"] += 1
            is_last = sample + 1 == tries
            why_not, detail = await self._try_message(result, turns, existing, sample, is_last=is_last)
            if not why_not:
                return True
            result.events[why_not] += 1
        result.leave_out(why_not, detail)
        return False

    async def _try_message(
        self, result: RowResult, turns: Sequence[Message], existing: str | None, sample: int, *, is_last: bool
    ) -> tuple[str, str]:
        """One try. What is wrong with it, in the words of the report, and in detail; nothing if it passes."""
        config = self.config
        forbid_leak = config.gates.leak is not None
        prompt = prompts.generate(turns, existing=existing, remind_of=result.reminded_of, forbid_leak=forbid_leak)
        request = self._request("generate", prompt, config.generate.decoding(), sample)
        continues_if_empty = is_last and config.on_empty == "keep_without_system"
        answer = await ask(self.client, request, result, prompts.STOP_PATTERNS, continues_if_empty=continues_if_empty)
        result.written_by_model, result.verdicts = answer.text, []
        result.message = TaggedMessage(())
        if answer.refused:
            return "the model refused to write a system message", _beginning(answer.detail)
        if answer.cut:
            result.events["system message cut at the token limit"] += 1
        elif answer.only_reasoning or answer.empty:
            return f"system message {answer.unfinished}", answer.detail
        result.phase = "generated"
        result.message = parse(answer.text)
        if not result.message.phrases:
            return "no valid phrase", _beginning(answer.text) or answer.unfinished or "an empty answer"
        result.phase = "filtered"
        next_try = replace(request, sample=sample + 1)
        if unfinished := await self._verify(result, turns, sample, next_try, continues_if_empty=continues_if_empty):
            return unfinished, f"of the message {_beginning(answer.text)}"
        if not result.message.phrases:
            judged = (f"{tag}: {verdict}" for said in result.verdicts for tag, verdict in said.items())
            return "no phrase was verified", ", ".join(judged)
        result.phase = "verified"
        result.system = result.message.text
        async with self._at_the_gates:
            await asyncio.sleep(0)
            return self._stopped_by_gates(result.system, turns)

    async def _verify(
        self, result: RowResult, turns: Sequence[Message], sample: int, next_try: Request, *, continues_if_empty: bool
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
            request = self._request("verify", prompts.verify(result.message, exchange), decoding, sample)
            answer = await ask(
                self.client, request, result, prompts.STOP_PATTERNS, next_try=next_try, continues_if_empty=continues_if_empty
            )
            read = parse_reply_verdicts(answer.text)
            missing = sum(tag not in read.of for tag in result.message.tags)
            if missing and answer.unfinished:
                unfinished = f"verification {answer.unfinished}"
                if self.config.on_unfinished_verification == "retry":
                    return unfinished
                result.events[f"{unfinished}, and its phrases kept"] += 1
                if not read.of:
                    continue
            else:
                result.events["verdict that can't be read"] += missing
            result.verdicts.append(dict(read.of))
            result.tags_judged += len(result.message.tags)
            result.events["verdict written otherwise, and read"] += read.repairs.get("written otherwise", 0)
        for tag in result.message.tags:
            verdict = _combined([verdicts.get(tag) for verdicts in result.verdicts])
            if verdict is None and self.config.on_missing_verdict == "keep":
                continue
            if verdict != "Good":
                reason = f"judged {verdict}" if verdict else "no verdict"
                result.message = result.message.without({tag}, reason)
        return ""

    def _stopped_by_gates(self, system: str, turns: Sequence[Message]) -> tuple[str, str]:
        gates = self.config.gates
        questions = "\n".join(turn["content"] for turn in turns if turn["role"] == "user")
        if gates.language:
            ours, theirs = detect_language(system), detect_language(questions)
            if ours and theirs and ours != theirs:
                return "gate: in another language than the conversation", f"{ours}, the questions are in {theirs}"
        if gates.leak is not None:
            share = max(measure_answer_leak(system, questions, answer["content"]) for answer in _answers(turns))
            if share >= gates.leak:
                return "gate: gives the answer away", f"{share:.0%} of an answer"
        return "", ""

    # The answers

    async def _answer(self, result: RowResult, turns: Sequence[Message]) -> RowResult:
        config = self.config
        has_tools = result.tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)
        if config.answers == "original" or has_tools:
            if has_tools and config.answers == "anew":
                result.events["kept its own answers, as they need tools"] += 1
            result.messages = [_system(result.system), *turns]
            return await self._judged(result)
        plain = result.message
        constraints = self._drawn(result, turns)
        answered = await self._answered_anew(result, turns, constraints)
        if answered is None and constraints and result.reason is None:
            result.events["constraints given up"] += 1
            result.message, result.constraints, result.system = plain, [], plain.text
            answered = await self._answered_anew(result, turns, [])
        if answered is None:
            return result
        if constraints and result.answers == "original":  # which were not written to meet them, and aren't checked
            result.events["constraints given up"] += 1
            result.message, result.constraints, result.system = plain, [], plain.text
        result.messages = [_system(result.system), *answered]
        if result.answers == "anew":
            result.phase = "answered"
            result.original_characters = sum(len(answer["content"]) for answer in _answers(turns))
            result.new_characters = sum(len(answer["content"]) for answer in _answers(answered))
        return await self._judged(result)

    def _drawn(self, result: RowResult, turns: Sequence[Message]) -> list[Constraint]:
        """Constraints for this row, put into its message."""
        count = self.config.constraints
        rng = random.Random(f"{self.config.seed} constraints {result.index}")
        if self.config.message == "common" or rng.random() >= count.share:
            return []
        language = detect_language(" ".join(turn["content"] for turn in turns if turn["role"] == "user"))
        if language not in (None, "en"):
            return []  # their words are English
        shaped = "Format" in result.message.tags
        drawn = draw_constraints([answer["content"] for answer in _answers(turns)], rng, count.at_most, shaped=shaped)
        result.message = result.message.with_phrases(Phrase(one.tag, one.text) for one in drawn)
        result.system = result.message.text
        result.constraints = [{"kind": one.kind, "tag": one.tag, "text": one.text} for one in drawn]
        return drawn

    async def _answered_anew(
        self, result: RowResult, turns: Sequence[Message], constraints: Sequence[Constraint]
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
                asked = [_system(result.system), *history]
                request = self._request("answer", asked, config.answer.decoding(), sample)
                answer = await ask(self.client, request, result, prompts.STOP_PATTERNS, continues_if_empty=continues_if_empty)
                broken = [one for one in constraints if not one.is_met(answer.text)]
                if not broken:
                    break
                result.events["answer that breaks a constraint"] += 1
            else:
                return None
            if answer.unfinished:
                unfinished = f"new answer {answer.unfinished}"
                result.events[unfinished] += 1
                if config.on_unfinished_answer == "original":
                    result.events["kept its own answers, as a new one was unfinished"] += 1
                    result.answers = "original"
                    return list(turns)
                if config.on_unfinished_answer == "drop" or answer.blank:
                    result.leave_out(unfinished, _beginning(answer.detail))
                    return None
            history.append({"role": "assistant", "content": answer.text})
        result.answers = "anew"
        return history

    async def _judged(self, result: RowResult) -> RowResult:
        """Leave a row out whose answers ignore the system message, if that is asked for."""
        if not self.config.gates.judge:
            return result
        question = ""
        for turn in result.messages[1:]:
            if turn["role"] == "user":
                question = turn["content"]
            if turn["role"] != "assistant" or not turn["content"].strip():
                continue
            asked = prompts.judge(result.system, question, turn["content"])
            request = self._request("judge", asked, self.config.judge.decoding(), 0)
            answer = await ask(self.client, request, result, prompts.STOP_PATTERNS, continues_if_empty=True)
            verdict = None if answer.refused else says_no(answer.text)
            if verdict is None:
                why = answer.unfinished or "that can't be read"
                result.events[f"judgement {why}"] += 1
            if verdict:
                return result.leave_out("gate: the answer ignores the system message", _beginning(turn["content"]))
        return result

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
