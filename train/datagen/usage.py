"""What was asked of a model for one row and stage: answers, tokens, seconds, and what it reasoned before."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from train.datagen.further_turns import MADE_UP, FurtherTurn, own_turn
from train.llm.client import Client
from train.llm.failures import EmptyAnswerError
from train.llm.finish_reasons import BELOW_LIMIT, describe_unfinished
from train.llm.journal import Answer, Request
from train.llm.reasoning.answer import list_events, read_answer


@dataclass(slots=True)
class Usage:
    """What one stage asked for one row."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """Sum of the times from request to answer, many of which pass at once."""

    def add(self, answer: Answer) -> None:
        """One more answer."""
        self.requests += 1
        self.prompt_tokens += answer.prompt_tokens or 0
        self.completion_tokens += answer.completion_tokens or 0
        self.seconds += answer.seconds

    def add_all(self, other: "Usage") -> None:
        """All that was counted elsewhere."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.seconds += other.seconds


class AskedRow(Protocol):
    """A row on its way through the stages. `events`: in the words of the report."""

    spent: dict[str, Usage]
    events: Counter[str]


async def ask(
    client: Client,
    request: Request,
    row: AskedRow,
    further_turns: Mapping[str, FurtherTurn],
    *,
    next_try: Request | None = None,
    continues_if_empty: bool = False,
) -> Answer:
    """Return the answer without reasoning and control tokens; raises as `Client.ask`, but returns empty answers.

    Args:
        row: gets what was spent, and counts of reasoning, control tokens and answers of an unknown ending.
        further_turns: of the prompts, by stage, where replies are cut; replies of another stage are taken whole.
        next_try, goes_on_empty: as of `Client.ask`.
    """
    stage, events = request.stage, row.events
    try:
        answer = await client.ask(request, next_try=next_try, continues_if_empty=continues_if_empty)
    except EmptyAnswerError as failure:
        answer = failure.answer
    row.spent.setdefault(stage, Usage()).add(answer)
    if answer.finish_reason == BELOW_LIMIT:
        events[f"{stage}: answer without a finish_reason, below the token limit"] += 1
    elif answer.ending in ("unknown", "unstated"):
        events[f"{stage}: answer {describe_unfinished(answer.finish_reason)}"] += 1
    # Elsewhere the conversation is quoted in a prompt of ours, and asks for nothing.
    answer, said = read_answer(answer, request.messages if stage == "answer" else ())
    for event in list_events(said):
        events[f"{stage}: {event}"] += 1
    further_turn = further_turns.get(stage)
    if further_turn is not None and (text := own_turn(answer.text, further_turn)) != answer.text:
        events[f"{stage}: {MADE_UP}"] += 1
        answer = replace(answer, text=text, finish_reason="stop" if answer.cut else answer.finish_reason)
    return answer
