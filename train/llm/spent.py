"""What was asked of a model for one row and stage: answers, tokens, seconds, and what it reasoned before."""

from collections import Counter
from dataclasses import dataclass, replace

from train.llm.client import Client, EmptyAnswerError
from train.llm.finish_reasons import ending_of, unfinished
from train.llm.journal import Answer, Request
from train.llm.reasoning import without_reasoning


@dataclass(slots=True)
class Spent:
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

    def add_all(self, other: "Spent") -> None:
        """All that was counted elsewhere."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.seconds += other.seconds


async def ask(client: Client, request: Request, spent: dict[str, Spent], events: Counter[str]) -> Answer:
    """Return the answer without the reasoning before it; raises as `Client.ask`, but returns empty answers.

    Args:
        spent: of the row, by stages.
        events: counts reasoning and answers of an unknown ending, in the words of the report.
    """
    stage = request.stage
    try:
        answer = await client.ask(request)
    except EmptyAnswerError as failure:
        answer = failure.answer
    spent.setdefault(stage, Spent()).add(answer)
    if ending_of(answer.finish_reason) in ("unknown", "unstated"):
        events[f"{stage}: answer {unfinished(answer.finish_reason)}"] += 1
    said = without_reasoning(answer.text)
    if said.unfinished:
        events[f"{stage}: reasoning without an end, and nothing said"] += 1
    elif said.reasoning is not None:
        events[f"{stage}: reasoning taken out"] += 1
    events[f"{stage}: tags of reasoning left in the text"] += said.holds_reasoning
    return replace(answer, text=said.text)
