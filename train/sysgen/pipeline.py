"""Pipeline of SYSGEN: the four phases for one row (section 3 of arXiv:2502.11330), and our additions.

    generate   M(S | prompt, Q, A): a system message in tagged phrases
    filter     rules: keep properly matched tags of the eight, in canonical order (`tags.parse`)
    verify     M judges each tag; Bad and None are removed
    answer     M(A' | S, Q): new answers for all turns

- Each row passes all phases without waiting for other rows. All random choices follow from the seed and the row's
  number, so the same answers of the model give the same rows, in whatever order they arrive.
- A conversation of several turns gets one system message, which is verified against each turn (a tag stays if no turn
  judges it Bad and at least one judges it Good). Its answers are generated in sequence, each seeing those before.
- A row whose answers call tools, or follow the results of tools, keeps them: new answers would need the tools.
- Reasoning of the model (`<think>`) is removed from all replies and counted.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

from train.data.sources.formats import Message, RowError
from train.datagen.constraints import Constraint, draw_constraints
from train.datagen.drop_reasons import UNREADABLE, UNSUPPORTED
from train.datagen.language import detect_language
from train.datagen.source_rows import NumberedRow
from train.datagen.stage_client import StageClient
from train.datagen.stats import truncate_line
from train.llm.client import Client
from train.llm.failures import NO_ANSWER, RequestFailed
from train.llm.request import Request
from train.llm.yes_or_no import says_no
from train.pressure.generated import Exchange
from train.sysgen import prompts
from train.sysgen.config import SysgenConfig
from train.sysgen.filters import measure_answer_leak
from train.sysgen.pressure_rows import answer_under_pressure
from train.sysgen.result import RowResult
from train.sysgen.tag_balance import TagBalance
from train.sysgen.tags import Phrase, TaggedMessage, Verdict, parse
from train.sysgen.verdicts import parse_reply_verdicts


class Pipeline:
    """The phases of SYSGEN. `balance` draws the reminders of rare tags."""

    def __init__(self, config: SysgenConfig, client: Client, balance: TagBalance) -> None:
        self.config, self.balance = config, balance
        self.client = StageClient(client, config, prompts.STOP_PATTERNS)
        # The gates take one or two milliseconds per row. One row at a time, and the event loop handles the servers'
        # answers in between: otherwise 64 rows that arrive together would leave the servers idle.
        self._gates_lock = asyncio.Lock()

    async def run(self, row: NumberedRow, further: Sequence[Exchange] = ()) -> RowResult:
        """Return the result of one row. Raises UserError as the client does, which ends the run.

        `further`: exchanges of earlier rows, for `pressure.turns`.
        """
        index, place, conversation = row
        result = RowResult(index, place)
        if isinstance(conversation, RowError):
            return result.drop(f"{UNREADABLE}: {conversation.kind}", conversation.detail)
        result.tools = conversation.tools
        try:
            return await self._run_phases(result, conversation.messages, further)
        except RequestFailed as failure:
            return result.drop(NO_ANSWER, str(failure))

    async def _run_phases(
        self, result: RowResult, messages: Sequence[Message], further: Sequence[Exchange]
    ) -> RowResult:
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
            return result.drop(f"{UNSUPPORTED}: a system message in the middle of the conversation")

        if config.message == "common":
            result.system = config.common_message
        elif not await self._write_message(result, turns, existing if config.existing_system == "refine" else None):
            if config.on_empty != "keep_without_system":
                return result
            result.reason, result.detail = None, ""
            result.events["kept without a system message"] += 1
            result.messages, result.message, result.system = list(turns), TaggedMessage(()), ""
            return result
        return await self._answer(result, turns, further)

    # The system message

    async def _write_message(self, result: RowResult, turns: Sequence[Message], existing: str | None) -> bool:
        """Generate, filter and verify messages until one passes and return True; else drop the row."""
        result.reminded_of = self.balance.draw_reminders(result.index)
        tries = 1 + (self.config.retries if self.config.on_empty == "retry" else 0)
        reason = detail = ""
        for sample in range(tries):
            if sample:
                result.events["another try at the system message"] += 1
            reason, detail = await self._try_message(result, turns, existing, sample, is_last=sample + 1 == tries)
            if not reason:
                return True
            result.events[reason] += 1
        result.drop(reason, detail)
        return False

    async def _try_message(
        self, result: RowResult, turns: Sequence[Message], existing: str | None, sample: int, *, is_last: bool
    ) -> tuple[str, str]:
        """Try once; return the reason why the message does not pass, and a detail. Both are empty if it passes."""
        config = self.config
        forbid_leak = config.gates.leak is not None
        prompt = prompts.generate(turns, existing=existing, remind_of=result.reminded_of, forbid_leak=forbid_leak)
        request = self.client.request("generate", prompt, sample)
        continues_if_empty = is_last and config.on_empty == "keep_without_system"
        answer = await self.client.ask(request, result, continues_if_empty=continues_if_empty)
        result.written_by_model, result.verdicts = answer.text, []
        result.message = TaggedMessage(())
        if answer.refused:
            return "the model refused to write a system message", truncate_line(answer.detail)
        if answer.cut:
            result.events["system message cut at the token limit"] += 1
        elif answer.only_reasoning or answer.empty:
            return f"system message {answer.unfinished}", answer.detail
        result.phase = "generated"
        result.message = parse(answer.text)
        if not result.message.phrases:
            return "no valid phrase", truncate_line(answer.text) or answer.unfinished or "an empty answer"
        result.phase = "filtered"
        next_try = replace(request, sample=sample + 1)
        if unfinished := await self._verify(result, turns, sample, next_try, continues_if_empty=continues_if_empty):
            return unfinished, f"of the message {truncate_line(answer.text)}"
        if not result.message.phrases:
            verdicts = (f"{tag}: {verdict}" for by_tag in result.verdicts for tag, verdict in by_tag.items())
            return "no phrase was verified", ", ".join(verdicts)
        result.phase = "verified"
        result.system = result.message.text
        async with self._gates_lock:
            await asyncio.sleep(0)
            return self._check_gates(result.system, turns)

    async def _verify(
        self, result: RowResult, turns: Sequence[Message], sample: int, next_try: Request, *, continues_if_empty: bool
    ) -> str:
        """Remove the phrases that fail; return why the verification is unfinished, an empty text if it is finished.

        `next_try`, `continues_if_empty`: what follows an empty verification, see `Client.ask`.
        """
        exchanges: Sequence[Sequence[Message] | None] = _split_exchanges(turns)
        if len(exchanges) == 1:
            exchanges = [None]  # as in the paper: the message alone
        keeps_unfinished = self.config.on_unfinished_verification == "keep"
        for exchange in exchanges:
            request = self.client.request("verify", prompts.verify(result.message, exchange), sample)
            answer = await self.client.ask(
                request, result, next_try=next_try, continues_if_empty=continues_if_empty or keeps_unfinished
            )
            verdicts = parse_reply_verdicts(answer.text)
            missing = sum(tag not in verdicts.of for tag in result.message.tags)
            if missing and answer.unfinished:
                unfinished = f"verification {answer.unfinished}"
                if not keeps_unfinished:
                    return unfinished
                result.events[f"{unfinished}, and its phrases kept"] += 1
                if not verdicts.of:
                    continue
            else:
                result.events["verdict that can't be read"] += missing
            result.verdicts.append(dict(verdicts.of))
            result.tags_judged += len(result.message.tags)
            result.events["verdict written otherwise, and read"] += verdicts.repairs.get("written otherwise", 0)
        for tag in result.message.tags:
            verdict = _combine_verdicts([verdicts.get(tag) for verdicts in result.verdicts])
            if verdict is None and self.config.on_missing_verdict == "keep":
                continue
            if verdict != "Good":
                reason = f"judged {verdict}" if verdict else "no verdict"
                result.message = result.message.without({tag}, reason)
        return ""

    def _check_gates(self, system: str, turns: Sequence[Message]) -> tuple[str, str]:
        """Return the reason why a gate stops the message, and a detail. Both are empty if none does."""
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

    async def _answer(self, result: RowResult, turns: Sequence[Message], further: Sequence[Exchange]) -> RowResult:
        config = self.config
        has_tools = result.tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)
        if config.answers == "original" or has_tools:
            if has_tools and config.answers == "anew":
                result.events["kept its own answers, as they need tools"] += 1
            result.messages = [_system(result.system), *turns]
            return await self._judge(result)
        if await answer_under_pressure(self.client, config, result, _split_exchanges(turns), further):
            _mark_answered(result, turns)
            return await self._judge(result)
        unconstrained = result.message
        constraints = self._add_constraints(result, turns)
        answered = await self._generate_answers(result, turns, constraints)
        if answered is None and constraints and result.reason is None:
            _remove_constraints(result, unconstrained)
            answered = await self._generate_answers(result, turns, [])
        if answered is None:
            return result
        if constraints and result.answers == "original":  # written without the constraints, and not checked
            _remove_constraints(result, unconstrained)
        result.messages = [_system(result.system), *answered]
        if result.answers == "anew":
            _mark_answered(result, turns)
        return await self._judge(result)

    def _add_constraints(self, result: RowResult, turns: Sequence[Message]) -> list[Constraint]:
        """Draw the row's constraints and add them to its message."""
        settings = self.config.constraints
        rng = random.Random(f"{self.config.seed} constraints {result.index}")
        if self.config.message == "common" or rng.random() >= settings.share:
            return []
        language = detect_language(" ".join(turn["content"] for turn in turns if turn["role"] == "user"))
        if language not in (None, "en"):
            return []  # the templates are English
        shaped = "Format" in result.message.tags
        originals = [answer["content"] for answer in _answers(turns)]
        drawn = draw_constraints(originals, rng, settings.at_most, shaped=shaped)
        result.message = result.message.with_phrases(Phrase(constraint.tag, constraint.text) for constraint in drawn)
        result.system = result.message.text
        result.constraints = [
            {"kind": constraint.kind, "tag": constraint.tag, "text": constraint.text} for constraint in drawn
        ]
        return drawn

    async def _generate_answers(
        self, result: RowResult, turns: Sequence[Message], constraints: Sequence[Constraint]
    ) -> list[Message] | None:
        """Return the turns with new answers; None if one does not comply, or is unfinished and the row is dropped."""
        config = self.config
        attempts = config.constraints.attempts if constraints else 1
        continues_if_empty = config.on_unfinished_answer == "original" or not all(
            constraint.is_met("") for constraint in constraints
        )
        history: list[Message] = []
        for turn in turns:
            if turn["role"] != "assistant":
                history.append({"role": turn["role"], "content": turn["content"]})
                continue
            for sample in range(attempts):
                request = self.client.request("answer", [_system(result.system), *history], sample)
                answer = await self.client.ask(request, result, continues_if_empty=continues_if_empty)
                if all(constraint.is_met(answer.text) for constraint in constraints):
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
                    result.drop(unfinished, truncate_line(answer.detail))
                    return None
            history.append({"role": "assistant", "content": answer.text})
        result.answers = "anew"
        return history

    async def _judge(self, result: RowResult) -> RowResult:
        """Drop the row if an answer ignores the system message, with `gates.judge`; give up its twin likewise."""
        if not self.config.gates.judge:
            return result
        reason = "gate: the answer ignores the system message"
        if (answer := await self._find_ignoring_answer(result, result.messages)) is not None:
            return result.drop(reason, truncate_line(answer))
        for twin in result.pressure[1:]:
            if twin.is_kept and await self._find_ignoring_answer(result, twin.messages[-2:]) is not None:
                twin.give_up(reason)
        return result

    async def _find_ignoring_answer(self, result: RowResult, messages: Sequence[Message]) -> str | None:
        """Return the first answer that ignores the system message, as the model judges it; None if there is none."""
        question = ""
        for turn in messages:
            if turn["role"] == "user":
                question = turn["content"]
            if turn["role"] != "assistant" or not turn["content"].strip():
                continue
            request = self.client.request("judge", prompts.judge(result.system, question, turn["content"]))
            answer = await self.client.ask(request, result, continues_if_empty=True)
            ignores_message = None if answer.refused else says_no(answer.text)
            if ignores_message is None:
                unfinished = answer.unfinished or "that can't be read"
                result.events[f"judgement {unfinished}"] += 1
            if ignores_message:
                return str(turn["content"])
        return None


def _mark_answered(result: RowResult, turns: Sequence[Message]) -> None:
    """Note that the answers in `result.messages` are new; `turns`: those of the data.

    Answers to further turns (`pressure.turns`) follow the row's own, and have no original to be compared with.
    """
    result.answers, result.phase = "anew", "answered"
    originals = _answers(turns)
    result.original_characters = sum(len(answer["content"]) for answer in originals)
    result.new_characters = sum(len(answer["content"]) for answer in _answers(result.messages)[: len(originals)])


def _remove_constraints(result: RowResult, unconstrained: TaggedMessage) -> None:
    result.events["constraints given up"] += 1
    result.message, result.constraints, result.system = unconstrained, [], unconstrained.text


def _up_to_last_answer(turns: Sequence[Message]) -> list[Message]:
    """Return the turns up to the last answer: no answer to train on follows the others."""
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant")
    return list(turns[: last + 1])


def _split_exchanges(turns: Sequence[Message]) -> list[list[Message]]:
    """Return each answer with the turns since the previous one."""
    exchanges: list[list[Message]] = [[]]
    for turn in turns:
        exchanges[-1].append(turn)
        if turn["role"] == "assistant":
            exchanges.append([])
    return exchanges[:-1]


def _answers(turns: Sequence[Message]) -> list[Message]:
    return [turn for turn in turns if turn["role"] == "assistant"]


def _combine_verdicts(verdicts: Sequence[Verdict | None]) -> Verdict | None:
    """Return the verdict on a tag over several turns: Bad before Good before None; Python's None without any."""
    order: tuple[Verdict, ...] = ("Bad", "Good", "None")
    return next((verdict for verdict in order if verdict in verdicts), None)


def _system(text: str) -> Message:
    return {"role": "system", "content": text}
