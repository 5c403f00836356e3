"""What was asked of a model for one row and stage: answers, tokens, seconds."""

from dataclasses import dataclass

from train.llm.journal import Answer


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
