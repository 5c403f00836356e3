"""Usage of a model: requests, tokens and seconds of a stage."""

from dataclasses import dataclass

from train.llm.request import Answer


@dataclass(slots=True)
class Usage:
    """Answers of one stage, for one row or for a run. `seconds`: sum over answers, many of which were concurrent."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        self.merge(Usage(1, answer.prompt_tokens or 0, answer.completion_tokens or 0, answer.seconds))

    def merge(self, other: "Usage") -> None:
        """Add the counts of another usage."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.seconds += other.seconds
