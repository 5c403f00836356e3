"""How the bench is scored: the paper's settings (arXiv:2405.17977) and those of a run. It imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from train.llm.journal import Decoding

HUB_ID = "kaist-ai/Multifaceted-Bench"
ROWS_OF_THE_BENCH = 921

PAPERS_RESPONSES = Decoding(max_tokens=1024, temperature=1.0, top_p=0.9, extra={"repetition_penalty": 1.03})
"""How the paper draws the answers."""
PAPERS_JUDGE = "gpt-4-0125-preview"
PAPERS_DECODING = Decoding(max_tokens=1024, temperature=1.0, top_p=0.9)
"""How its judge answers."""
PAPERS_RUNS = 3

MOST_RUNS = 100
"""The judge's own luck is in a rubric's score by one over the root of the runs: 100 leave a tenth of it. Each of them
asks about every rubric of every row again."""
MOST_ANSWERS = 1_024
"""To best of N: the judge grades all answers to a row before one is picked."""

GOOD = 4.0
"""From which score on a tie of two models is both good. The facts at hand give no number, so this one is ours."""

Picking = Literal["first run", "all runs", "file"]


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Who judges and how; the defaults are the paper's, `retries` aside, of which it says nothing."""

    model: str
    decoding: Decoding = PAPERS_DECODING
    runs: int = PAPERS_RUNS
    retries: int = 3
    show_system: bool = False


@dataclass(frozen=True, slots=True)
class Protocol:
    """How rows are scored: the judge's settings, and which of several answers counts; `best_of` 1 picks nothing."""

    judge: JudgeSettings
    best_of: int = 1
    pick_by: Picking = "first run"

    @property
    def picks_by_first_run(self) -> bool:
        """Whether a run of the judge is there to pick, and not to score."""
        return self.best_of > 1 and self.pick_by == "first run"

    @property
    def scoring_runs(self) -> range:
        """The runs that a score is the mean of."""
        return range(1 if self.picks_by_first_run else 0, self.judge.runs)
