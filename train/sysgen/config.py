"""Configuration of a SYSGEN run: a YAML file in recipes/sysgen, strict and documented key by key.

Defaults are those of the paper (section 3 and appendix of arXiv:2502.11330) where it states one; where it does not, the
docstring says so. README.md lists every departure from the paper with its key.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, create_model

from train.datagen.config import GenerationConfig, StageSection, has_pressure, open_config
from train.recipe import Section, Text
from train.recipe.validation import validate_settings
from train.sysgen.tags import TAGS

STAGES = ("generate", "verify", "answer", "judge")


class GenerateSection(StageSection):
    """Write a system message."""

    max_tokens: int = Field(default=512, gt=0)
    """Maximum tokens of a message. Raising it repeats only the requests whose answers were cut."""


class VerifySection(StageSection):
    """Judge each tag."""

    max_tokens: int = Field(default=256, gt=0)
    """Maximum tokens of the eight verdicts. Raising it repeats only the requests whose answers were cut."""


class AnswerSection(StageSection):
    """Generate a new answer."""

    max_tokens: int = Field(default=1024, gt=0)
    """Maximum tokens of an answer. Raising it repeats only the requests whose answers were cut."""


class JudgeSection(StageSection):
    """Judge whether an answer follows its system message."""

    max_tokens: int = Field(default=16, gt=0)
    """Maximum tokens of a yes or no. Raising it repeats only the requests whose answers were cut."""
    temperature: float | None = Field(default=0.0, ge=0)
    """null = the server's default."""


_Share = Annotated[float, Field(gt=0, le=1)]

TargetShares = create_model(
    "TargetShares",
    __base__=Section,
    __doc__="Target shares of system messages with each tag.",
    **{tag: (_Share | None, Field(default=None, description="Share of rows; null = no target.")) for tag in TAGS},
)  # type: ignore[call-overload]


class TagsSection(Section):
    """Frequency of tags."""

    target_share: TargetShares = TargetShares()
    """For rare tags (Tool: 2 to 17 % in the paper): some prompts remind the generator of the tag and ask it to leave
    the tag out where the conversation shows nothing of the kind. The share of reminded rows follows from earlier
    rows."""


class ConstraintsSection(Section):
    """Requirements that a program can check (at most 50 words, a list of five points), drawn from our own templates and
    added to the Format, Style and Content phrases. An answer that does not comply is generated again. Rows with the
    common message and rows that keep their own answers get none."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of rows with constraints; 0 = none. The paper had none, and every model lost on IFEval."""
    at_most: int = Field(default=2, ge=1, le=4)
    """Maximum number of constraints per row."""
    attempts: int = Field(default=3, ge=1)
    """After this many answers that do not comply, the row is answered without constraints."""


class GatesSection(Section):
    """Checks before a row is kept. The paper has none. The report counts what each one stops."""

    language: bool = True
    """The system message must be in the language of the conversation; otherwise it is generated again, up to `retries`
    times."""
    leak: float | None = Field(default=0.5, gt=0, le=1)
    """Threshold for system messages that give the answer away: the share of the answer's words in runs of five that the
    message holds and the questions do not, or a complete short answer. Such a message is generated again. The prompt
    asks for it too: the message must suit similar questions, or a new answer would only repeat it. null = no check
    and no such request, as in the paper. Changing from or to null changes the prompt, so that every message is
    requested again."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Drop rows whose system message has at least this Jaccard similarity (3-grams of words) to an earlier one; null =
    no check."""
    judge: bool = False
    """Ask the model whether the new answer follows the system message, and drop rows where it says no."""


class SysgenConfig(GenerationConfig):
    """A SYSGEN run: source rows, model, and the rules for both."""

    existing_system: Literal["replace", "keep", "refine"] = "replace"
    """Rows that have a system message; replace = it is removed first; keep = the row is kept unchanged and nothing is
    requested; refine = the generator sees it and elaborates it."""
    message: Literal["generate", "common"] = "generate"
    """common = the same system message for every row, an ablation of the paper."""
    common_message: Text = "You are a helpful AI assistant."
    """The message of `message: common`."""
    answers: Literal["anew", "original"] = "anew"
    """anew = new answers; original = the answers of the data, an ablation of the paper."""
    on_empty: Literal["retry", "drop", "keep_without_system"] = "retry"
    """A row without a valid phrase, or stopped by a gate; retry = up to `retries` further tries, then drop;
    keep_without_system = its own question and answers without a system message. The paper doesn't say."""
    retries: int = Field(default=2, ge=0)
    """Maximum number of further tries to write a system message."""
    on_missing_verdict: Literal["keep", "drop"] = "keep"
    """Phrases whose tag got no readable verdict. The paper removes only Bad and None."""
    on_unfinished_verification: Literal["retry", "keep"] = "retry"
    """A verification that leaves a tag without a verdict because it was refused, withheld, cut at the token limit,
    empty, or ended for an unknown reason; retry = up to `retries` further tries at the system message, then as
    `on_empty` says; keep = the phrases without a verdict follow `on_missing_verdict`. The paper doesn't say."""
    on_unfinished_answer: Literal["drop", "keep", "original"] = "drop"
    """A row whose new answer was cut at the token limit, refused, empty, a tool call, or ended for an unknown reason;
    drop = the row is dropped; keep = it is written unless the answer is empty (a cut one teaches to stop in the
    middle); original = it keeps the answers of the data. An answer that the server withholds (content_filter) follows
    this rule and is no loss; a row dropped for an empty one is (`accept_losses`). The paper doesn't say."""
    generate: GenerateSection = GenerateSection()
    """Stage: write a system message in tagged phrases."""
    verify: VerifySection = VerifySection()
    """Stage: judge each tag."""
    answer: AnswerSection = AnswerSection()
    """Stage: generate new answers."""
    judge: JudgeSection = JudgeSection()
    """Stage: judge whether an answer follows its system message, for `gates.judge`."""
    tags: TagsSection = TagsSection()
    """Frequency of tags."""
    constraints: ConstraintsSection = ConstraintsSection()
    """Requirements that a program can check."""
    gates: GatesSection = GatesSection()
    """Checks before a row is kept."""

    def used_stages(self) -> list[str]:
        """Return the names of the stages that a run asks."""
        generates = self.message == "generate"
        used = {"generate": generates, "verify": generates, "answer": self.answers == "anew", "judge": self.gates.judge}
        return [stage for stage in STAGES if used[stage]]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SysgenConfig:
    """Return the configuration in `path`, with `key=value` overrides by dotted key.

    Raises UserError with all errors in the file and the overrides, each with its line and dotted key.
    """
    document = open_config(path, overrides, STAGES)
    if has_pressure(document):
        for key, value in (("answers", "original"), ("message", "common")):
            if document.tree.get(key) == value:
                document.add_error(("pressure",), f"not possible with `{key}: {value}`. Set its shares to 0.")
    return validate_settings(document, SysgenConfig)
