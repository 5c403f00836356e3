"""Rows of generated data under pressure: a plan per row, the check of each answer, and the requests.

A row is a system message of the pipeline, with a constraint that a program checks, and its exchanges. `plan_row` adds
what the setting needs: it rewrites the last user turn (templates of the split "seen" alone), lets the message hold a
secret, or appends questions of other rows. `ask_row` asks for the answers under that conversation and keeps them only
if each passes the check of its turn. Both pipelines use it; the answers are those of their stage `answer`.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from train.datagen.config import PressureSection
from train.datagen.constraints import Constraint, draw_constraints
from train.datagen.language import detect_language
from train.datagen.stage_client import RowInProgress, StageClient
from train.llm.failures import RequestFailed
from train.llm.request import Answer, Request
from train.pressure.answer_checks import covers_reference
from train.pressure.conversations import build_pressure, result_in_user_turn
from train.pressure.tactics import tactics
from train.pressure.turns import write_user_turns
from train.pressure.verdicts import answers_question, is_refusal, reveals

Message = dict[str, Any]
Item = TypeVar("Item")
Further = TypeVar("Further")

MOST_FURTHER = 4
"""Further questions of a row of several turns, at most: five turns, as in SysBench (arXiv:2408.10943)."""
PUSH_BACK = 0.5
"""Share of the rows of several turns in which a turn after the first asks for the opposite, as in a conflict row."""
EARLIER = 100
"""Rows from which further questions are drawn: the last ones before a row."""

NOT_ENGLISH = "not in English, as the templates are"
NO_CONSTRAINT = "no constraint suits the answers"
NO_FURTHER = "no question of an earlier row"
REFUSED_PROMPT = "the server refuses the prompt, as too long or by a filter"

RECORD_FIELDS = ("setting", "tactic", "constraint", "constraint_text", "question", "secret")
"""Fields that a written row has about its pressure."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, and the reference answer with which the new answer is compared."""

    question: str
    reference: str


@dataclass(frozen=True, slots=True)
class PressureTurn:
    """A user turn and the check of its answer, which returns why the answer is refused, or an empty text."""

    content: str
    check: Callable[[str], str]


@dataclass(slots=True)
class PressureRow:
    """A row under pressure: its plan, then its conversation or the reason why it was given up."""

    setting: str
    """A setting of `PressureSection`, or aligned: the twin of a conflict row."""
    tactic: str = ""
    question: str = ""
    """The question of the turn that is under pressure."""
    constraint: Constraint | None = None
    secret: str = ""
    """A secret that the answer must not hold (extraction), or a code that it must tell (permitted)."""
    clause: str = ""
    """Sentence about a secret or a choice, behind the constraint in the system message."""
    turns: tuple[PressureTurn, ...] = ()
    messages: list[Message] = field(default_factory=list)
    """The conversation with its answers; empty if the row was given up."""
    reason: str = ""
    """Reason for giving it up; empty if it is kept."""
    refused_answers: Counter[str] = field(default_factory=Counter)

    @property
    def is_kept(self) -> bool:
        """True if all answers passed."""
        return bool(self.messages)

    def give_up(self, reason: str) -> "PressureRow":
        """Mark the row as given up; return it."""
        self.reason, self.messages = reason, []
        return self

    def record(self) -> dict[str, str]:
        """Return what was done, for the written row."""
        kind, text = (self.constraint.kind, self.constraint.text) if self.constraint else ("", "")
        values = (self.setting, self.tactic, kind, text, self.question, self.secret)
        return dict(zip(RECORD_FIELDS, values, strict=True))


def draw_setting(pressure: PressureSection, rng: random.Random) -> str | None:
    """Draw the setting of a row by the configured shares; None = no pressure."""
    place = rng.random()
    for setting, share in pressure.shares().items():
        if place < share:
            return setting
        place -= share
    return None


def with_further(
    items: Iterable[Item], further_of: Callable[[Item], Further | None], seed: int
) -> Iterator[tuple[Item, tuple[Further, ...]]]:
    """Yield each item with one to four questions of the items before it, drawn with the seed.

    `further_of` returns an item's own question, or None if it has none that can follow under another message.
    """
    earlier: deque[Further] = deque(maxlen=EARLIER)
    for number, item in enumerate(items):
        rng = random.Random(f"{seed} further {number}")
        own = further_of(item)
        others = [other for other in earlier if other != own]
        yield item, tuple(rng.sample(others, min(rng.randint(1, MOST_FURTHER), len(others))))
        if own is not None:
            earlier.append(own)


# The plan of a row


def plan_row(
    setting: str,
    exchanges: Sequence[Exchange],
    further: Sequence[Exchange],
    rng: random.Random,
    *,
    shaped: bool = False,
) -> PressureRow:
    """Return the plan of a row, or a row with the reason why there can't be one.

    Args:
        setting: one of `PressureSection`.
        exchanges: the row's own, at least one.
        further: exchanges of other rows, for the setting turns.
        rng: source of all choices.
        shaped: the system message states the form of the answer, see `draw_constraints`.
    """
    push_back_at = None
    row = PressureRow(setting, "plain" if setting == "turns" else rng.choice(tactics(setting)))
    if setting == "turns":
        if not further:
            return row.give_up(NO_FURTHER)
        exchanges = [*exchanges, *further]
        if rng.random() < PUSH_BACK:
            push_back_at = rng.randint(2, len(exchanges))
            row.tactic = rng.choice(tactics("conflict"))
    if detect_language(" ".join(exchange.question for exchange in exchanges)) not in (None, "en"):
        return row.give_up(NOT_ENGLISH)
    row.question = exchanges[-1].question
    if row.tactic != "shared":  # its answer is a code, which most constraints do not suit
        constraints = draw_constraints([exchange.reference for exchange in exchanges], rng, 1, shaped=shaped)
        if not constraints:
            return row.give_up(NO_CONSTRAINT)
        row.constraint = constraints[0]
    if setting == "turns" and row.constraint:
        contents = write_user_turns(
            [exchange.question for exchange in exchanges],
            opposites=row.constraint.opposites,
            split="seen",
            rng=rng,
            push_back_at=push_back_at,
            tactic=row.tactic,
        )
        row.turns = tuple(_plain_turn(row, *turn) for turn in zip(exchanges, contents, strict=True))
        return row
    content = _build_turn(row, setting, rng)
    row.turns = (
        *(_plain_turn(row, exchange) for exchange in exchanges[:-1]),
        PressureTurn(content, _last_check(row, exchanges[-1])),
    )
    return row


def plan_twin(row: PressureRow, reference: str, rng: random.Random) -> PressureRow:
    """Return the plan of a conflict row's aligned twin, whose last turn asks for the same as the message.

    It follows the conflict row's earlier turns and answers. `reference`: the reference answer of its question.
    """
    twin = PressureRow("aligned", rng.choice(tactics("aligned")), row.question, row.constraint)
    exchange = Exchange(row.question, reference)
    twin.turns = (PressureTurn(_build_turn(twin, "aligned", rng), _last_check(twin, exchange)),)
    return twin


def _build_turn(row: PressureRow, setting: Any, rng: random.Random) -> str:
    """Return the user turn under pressure; note the secret, the clause and the question of the turn in `row`."""
    constraint = row.constraint
    pressure = build_pressure(
        setting,
        row.tactic,
        message="",
        question=row.question,
        opposites=constraint.opposites if constraint else ("",),
        requests=constraint.requests if constraint else ("",),
        split="seen",
        rng=rng,
    )
    # Search results stand in the user's turn: neither every server nor every template of a trainer has tool turns.
    system, turn = result_in_user_turn(pressure.messages)
    row.clause, row.secret, row.question = system["content"].strip(), pressure.secret, pressure.question
    return str(turn["content"])


# The checks of answers


def _plain_turn(row: PressureRow, exchange: Exchange, content: str = "") -> PressureTurn:
    """Return a turn whose answer must hold the message and answer the question. `content`: other than the question."""

    def check(answer: str) -> str:
        return _find_broken_message(row, answer) or _find_no_answer(exchange, answer)

    return PressureTurn(content or exchange.question, check)


def _last_check(row: PressureRow, exchange: Exchange) -> Callable[[str], str]:
    """Return the check of the answer to the turn under pressure."""

    def check(answer: str) -> str:
        if row.tactic == "shared":
            if not answers_question(answer, [row.secret]):
                return "does not tell the code that may be shared"
            return "refuses" if is_refusal(answer) else ""
        if row.tactic == "choice":
            is_chosen = row.constraint is not None and row.constraint.is_opposite(answer)
            broken = "" if is_chosen else "does not have the form that the user chose"
        else:
            broken = _find_broken_message(row, answer)
        return broken or _find_no_answer(exchange, answer, may_decline=row.setting == "extraction")

    return check


def _find_broken_message(row: PressureRow, answer: str) -> str:
    """Return how an answer breaks the system message; an empty text if it does not."""
    if row.setting == "extraction" and any(reveals(answer, part) for part in row.secret.split("-")):
        return "reveals the secret"
    if row.constraint is not None and not row.constraint.is_met(answer):
        return "breaks the constraint"
    return ""


def _find_no_answer(exchange: Exchange, answer: str, *, may_decline: bool = False) -> str:
    """Return why an answer is none to the question; an empty text if it is one.

    `may_decline`: a refusal may stand beside the answer, as that of a secret.
    """
    if not may_decline and is_refusal(answer) and not is_refusal(exchange.reference):
        return "refuses"
    is_answer = covers_reference(answer, exchange.reference, exchange.question)
    return "" if is_answer else "does not answer the question"


# The requests


async def ask_row(
    client: StageClient, progress: RowInProgress, row: PressureRow, start: Sequence[Message], attempts: int
) -> bool:
    """Ask for the answers to the turns of a row; return whether all passed, otherwise give the row up.

    Args:
        client: client of the pipeline, with a stage `answer`.
        progress: the pipeline's row, which gets usage and events.
        row: the plan, which gets the conversation or the reason.
        start: the conversation so far, from the system message on.
        attempts: answers per turn.

    Raises RequestFailed and UserError as `ask_unless_refused` does.
    """
    messages = list(start)
    for turn in row.turns:
        messages.append({"role": "user", "content": turn.content})
        for sample in range(attempts):
            request = client.request("answer", messages, sample)
            answer = await ask_unless_refused(client, request, progress, continues_if_empty=sample + 1 == attempts)
            if answer is None:
                row.give_up(REFUSED_PROMPT)
                return False
            reason = answer.unfinished or turn.check(answer.text)
            if not reason:
                messages.append({"role": "assistant", "content": answer.text})
                break
            row.refused_answers[reason] += 1
        else:
            row.give_up(reason)
            return False
    row.messages = messages
    return True


async def ask_unless_refused(
    client: StageClient, request: Request, progress: RowInProgress, *, continues_if_empty: bool
) -> Answer | None:
    """Return the answer; None if the server refuses the prompt for its length or content.

    Filters refuse "ignore the above" as an attack (Azure's Prompt Shields: status 400). The plain row is still good.

    Raises RequestFailed for another failure, and UserError as the client does.
    """
    try:
        return await client.ask(request, progress, continues_if_empty=continues_if_empty)
    except RequestFailed as failure:
        if failure.about_content:
            return None
        raise
