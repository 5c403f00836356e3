"""The settings of a bench run: a YAML file in recipes/bench, strict and documented key by key, and its options.

Defaults are the paper's (arXiv:2405.17977) where it states one. An option on the command line overrides the file.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from train.errors import UserError
from train.evaluation.judge_options import COMMON as COMMON_OF_JUDGE
from train.evaluation.judge_options import JudgeOptions
from train.evaluation.models.options import COMMON as COMMON_OF_MODEL
from train.evaluation.models.options import ModelOptions, refuse_extra_fields
from train.evaluation.required_paths import require_file
from train.llm.request import Decoding
from train.multifaceted.bench.protocol import (
    GOOD,
    HUB_ID,
    MAX_ANSWERS,
    MAX_RUNS,
    PAPERS_DECODING,
    PAPERS_RESPONSES,
    PAPERS_RUNS,
    JudgeSettings,
    Protocol,
)
from train.recipe import PathText, Text

COMMON = (
    *COMMON_OF_MODEL,
    *("data", "limit", "no_system", "responses", "best_of", "pick_by", "reward_model", "top_p", "extra"),
    *COMMON_OF_JUDGE,
    *("judge_top_p", "runs", "batch_out", "batch_in", "output_dir", "against"),
)
"""The options that --help shows."""
RESPONSE_FIELDS = ("temperature", "top_p", "repetition_penalty")
"""Request fields of the responses that have keys of their own, besides the token limit."""


class BenchConfig(JudgeOptions, ModelOptions):
    """A run of Multifaceted Bench: the model, the rows, the judge and the results."""

    data: Annotated[tuple[PathText, ...], Field(strict=False, min_length=1)] = (HUB_ID,)
    """Rows of the bench: files, folders or hub ids."""
    split: Text = "train"
    """Split of data that has several."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows, from the first; null = all. A part of the bench is not comparable with the complete bench."""
    no_system: bool = False
    """Leave the system messages out: the paper's ablation."""
    responses: PathText | None = None
    """File with existing responses; `model` is then a name only."""
    best_of: int = Field(default=1, ge=1, le=MAX_ANSWERS)
    """Answers to each row, of which one is picked. The judge grades them all, if it picks."""
    pick_by: Literal["first-run", "all-runs", "file", "reward"] = "first-run"
    """first-run = pick by the judge's first run and score by the others; all-runs = pick by all its runs (an upper
    bound); file = by `scores` in the file of `responses`; reward = by the scores of `reward_model`."""
    reward_model: PathText | None = None
    """Folder or hub id of a reward model or an adapter of one. It scores system message, instruction and answer with
    its own template, in batches of `batch_size` and in `dtype`."""
    max_tokens: int = Field(default=PAPERS_RESPONSES.max_tokens, ge=1)
    """Maximum tokens of a response."""
    temperature: float | None = Field(default=PAPERS_RESPONSES.temperature, ge=0)
    """Sampling temperature; 0 = greedy; null, here and below = not sent, so the server's own."""
    top_p: float | None = Field(default=PAPERS_RESPONSES.top_p, gt=0, le=1)
    """Nucleus sampling; null = not sent."""
    repetition_penalty: float | None = Field(default=PAPERS_RESPONSES.extra["repetition_penalty"], gt=0)
    """1 = none, and not sent, like null, for servers without this field."""
    judge: Text
    """The judge's name on its server. The paper's judge was gpt-4-0125-preview."""
    judge_max_tokens: int = Field(default=PAPERS_DECODING.max_tokens, ge=1)
    """Maximum tokens of a judgement."""
    judge_temperature: float | None = Field(default=PAPERS_DECODING.temperature, ge=0)
    """Sampling temperature of the judge; null = not sent."""
    judge_top_p: float | None = Field(default=PAPERS_DECODING.top_p, gt=0, le=1)
    """Nucleus sampling of the judge; null = not sent."""
    runs: int = Field(default=PAPERS_RUNS, ge=1, le=MAX_RUNS)
    """Runs of the judge that are averaged. Each run asks about every rubric again."""
    show_system: bool = False
    """Show the system message to the judge: not the paper's protocol."""
    batch_out: PathText | None = None
    """File for the requests to the judge, in the format of OpenAI's batch API; nothing is sent."""
    batch_in: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Output and error files of such a batch."""
    output_dir: PathText | None = None
    """Folder for bench.json, bench_rows.jsonl, bench.png and the journal; null = the folder of `model`."""
    against: PathText | None = None
    """bench_rows.jsonl of another model, measured with the same settings, to compare with."""
    good: float = Field(default=GOOD, ge=1, le=5)
    """Score from which a tie counts as both good."""
    seed: int = Field(default=0, ge=0)
    """Seed of the intervals."""

    def response_decoding(self) -> Decoding:
        """Return the sampling settings of the responses."""
        extra = {"repetition_penalty": None if self.repetition_penalty == 1 else self.repetition_penalty}
        return Decoding.from_settings(self.max_tokens, self.temperature, self.top_p, extra=extra | self.extra)

    def protocol(self) -> Protocol:
        """Return the settings by which rows are scored."""
        judge = JudgeSettings(self.judge, self.judge_decoding(), self.runs, self.retries, self.show_system)
        picking: dict[str, Any] = {"pick_by": self.pick_by.replace("-", " ")}
        return Protocol(judge, self.best_of, **picking, reward_model=self.reward_model)

    def refuse_contradictions(self) -> None:
        """Raise UserError for settings that contradict each other, and for files that do not exist."""
        if bool(self.batch_out or self.batch_in) == bool(self.judge_server):
            raise UserError(
                "the judge is reached in one of two ways: name either --judge-server URL, or files of a batch by "
                "--batch-out and --batch-in."
            )
        if self.best_of > 1 and self.pick_by == "first-run" and self.runs < 2:
            raise UserError(
                f"--best-of {self.best_of} --runs 1: the first run picks, so no run is left to score. Write --runs 2 "
                "or more, or --pick-by all-runs, whose score is an upper bound."
            )
        if self.best_of > 1 and self.pick_by == "file" and not self.responses:
            raise UserError("--pick-by file: the scores are read from the file of --responses, which is missing.")
        if (self.pick_by == "reward") != bool(self.reward_model):
            remedy = "Write both or neither"
            raise UserError(f"--pick-by reward and --reward-model MODEL belong together. {remedy}.")
        if self.best_of == 1 and self.pick_by != "first-run":
            raise UserError(f"--pick-by {self.pick_by}: there is one answer to each row. Add --best-of N.")
        if self.responses:
            for option, given in (("--no-system", self.no_system), ("--extra", self.extra)):
                if given:
                    raise UserError(f"{option}: the responses of --responses exist already. Leave one of the two out.")
        if self.against:
            require_file("--against", self.against)
        names = ("max_tokens", *RESPONSE_FIELDS)
        own = {name: (f"--{name.replace('_', '-')}", getattr(self, name)) for name in names}
        refuse_extra_fields("--extra", self.extra, own)
        self.refuse_extra_of_judge()
