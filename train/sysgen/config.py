"""The configuration of a SYSGEN run: a YAML file in recipes/sysgen, strict and documented key by key.

Defaults are the paper's (section 3 and appendix of arXiv:2502.11330) where it states one; where it is silent, the
docstring says so. train/sysgen/README.md lists every departure from the paper with its key.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, create_model

from train.datagen.config import OutputSection, ServerSection, StageSection, SystemRole, open_settings
from train.datagen.drop_reasons import Loss
from train.datagen.source_rows import SourcesSection
from train.recipe import PathText, Section, Text
from train.recipe.validation import validate_settings
from train.sysgen.tags import TAGS


class GenerateSection(StageSection):
    """Write a system message."""

    max_tokens: int = Field(default=512, gt=0)
    """Most tokens of a message. To raise it asks again what was cut, and that alone."""


class VerifySection(StageSection):
    """Judge each tag."""

    max_tokens: int = Field(default=256, gt=0)
    """Most tokens of the eight verdicts. To raise it asks again what was cut, and that alone."""


class AnswerSection(StageSection):
    """Answer anew."""

    max_tokens: int = Field(default=1024, gt=0)
    """Most tokens of an answer. To raise it asks again what was cut, and that alone."""


class JudgeSection(StageSection):
    """Say whether an answer follows its message."""

    max_tokens: int = Field(default=16, gt=0)
    """Most tokens of a yes or no. To raise it asks again what was cut, and that alone."""
    temperature: float | None = Field(default=0.0, ge=0)
    """null = the server's own."""


_Share = Annotated[float, Field(gt=0, le=1)]

TargetShares = create_model(
    "TargetShares",
    __base__=Section,
    __doc__="The share of system messages that are to hold a tag.",
    **{tag: (_Share | None, Field(default=None, description="Share of rows; null = as it comes.")) for tag in TAGS},
)  # type: ignore[call-overload]


class TagsSection(Section):
    """Which tags occur."""

    target_share: TargetShares = TargetShares()
    """For tags that come too rarely (Tool: 2 to 17 % in the paper): in some rows the generator is reminded of the tag,
    and told to leave it out where the conversation shows nothing of the kind. How many rows follows from how many of
    those before took it."""


class ConstraintsSection(Section):
    """Requirements that a program can check (at most 50 words, a list of five points), drawn from rules of our own and
    put among the Format, Style and Content phrases. The new answer is checked; what doesn't comply is asked again. Rows
    that get the common message or keep the answers of the data get none."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of rows that get one; 0 = none. The paper had none, and every model lost on IFEval."""
    at_most: int = Field(default=2, ge=1, le=4)
    """Most of them in one row."""
    attempts: int = Field(default=3, ge=1)
    """After so many answers that don't comply, the row is answered without."""


class GatesSection(Section):
    """What is looked at before a row is kept. The paper has none; each counts what it stops, in the report."""

    language: bool = True
    """The system message must be in the language of the conversation; else it is written again, `retries` times."""
    leak: float | None = Field(default=0.5, gt=0, le=1)
    """A system message that holds this share of the answer's words in runs of five, which the questions don't hold, or
    the whole of a short answer, is written again. The prompt says so too: the message must suit similar questions and
    not give the answer away, or a new answer would only repeat it. null = neither, as in the paper. A change from or to
    null is another prompt, so it asks for every message again."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Leave out rows whose system message is this similar (Jaccard, of runs of three words) to one before; null = not
    looked at."""
    judge: bool = False
    """Ask the model whether the new answer follows the system message, and leave out the rows where it says no."""


class SysgenConfig(Section):
    """A run of SYSGEN: whose rows, which model, and what becomes of both."""

    model: Text
    """The model, by the name that the servers know it by. It writes, verifies and answers (and judges)."""
    servers: Annotated[tuple[ServerSection, ...], Field(strict=False, min_length=1)]
    """Where it is served; the load is shared by how fast each answers."""
    system_role: SystemRole = "native"
    """The place of a system message in requests; native = it is sent as one; merge_into_user = in the first user turn,
    before its text and a blank line, for a model without a system role (Gemma, Mistral 7B, o1-mini). The rows that are
    written are the same."""
    data: SourcesSection
    """The rows that get system messages. Turns after the last answer are left out and counted: there is no answer to
    train on. The paper doesn't say."""
    existing_system: Literal["replace", "keep", "refine"] = "replace"
    """What becomes of rows that have a system message; keep = they stay as they are and nothing is asked; refine = the
    generator sees it and works it out; replace = it is taken away first."""
    message: Literal["generate", "common"] = "generate"
    """common = the same system message for every row, an ablation of the paper's."""
    common_message: Text = "You are a helpful AI assistant."
    """The message that `message: common` means."""
    answers: Literal["anew", "original"] = "anew"
    """original = the answers of the data stay, the other ablation."""
    on_empty: Literal["retry", "drop", "keep_without_system"] = "retry"
    """What becomes of a row with no valid phrase left, or one that a gate stopped; retry = another try, `retries`
    times, and then drop; keep_without_system = its own question and answers without any. The paper doesn't say."""
    retries: int = Field(default=2, ge=0)
    """Further tries to write a system message."""
    on_missing_verdict: Literal["keep", "drop"] = "keep"
    """What becomes of phrases whose tag got no verdict that can be read. The paper removes Bad and None alone."""
    on_unfinished_verification: Literal["retry", "keep"] = "retry"
    """A verification that was refused or withheld, cut at the token limit, empty, or ended for an unknown reason, and
    leaves a tag without a verdict; retry = another try at the system message, `retries` times, and then as `on_empty`
    says; keep = the phrases without a verdict go by `on_missing_verdict`. The paper does not say."""
    on_unfinished_answer: Literal["drop", "keep", "original"] = "drop"
    """A row whose new answer was cut at the token limit, refused, empty, a call of a tool, or ended for an unknown
    reason; drop = it is left out; keep = it is written unless the answer is empty (a cut one teaches to stop in the
    middle); original = it keeps the answers of the data. An answer that the server withholds (content_filter) goes by
    this rule and is no loss; a row left out for an empty one is (`accept_losses`). The paper does not say."""
    accept_losses: Annotated[tuple[Loss, ...], Field(strict=False)] = ()
    """Losses that no other setting decides and that are no error: no_answer = no answer came, after all tries, or an
    empty one; unreadable = rows that can't be read; unsupported = a system message in the middle of the conversation.
    All other rows are written in any case; a run with losses that are not named here ends with exit code 2. [] =
    none."""
    generate: GenerateSection = GenerateSection()
    """Write a system message in tagged phrases."""
    verify: VerifySection = VerifySection()
    """Judge each tag."""
    answer: AnswerSection = AnswerSection()
    """Answer anew."""
    judge: JudgeSection = JudgeSection()
    """Say whether an answer follows its system message, for `gates.judge`."""
    tags: TagsSection = TagsSection()
    """Which tags occur."""
    constraints: ConstraintsSection = ConstraintsSection()
    """Requirements that a program can check."""
    gates: GatesSection = GatesSection()
    """What is looked at before a row is kept."""
    output: OutputSection = OutputSection()
    """What is written."""
    output_dir: PathText
    """Folder for the rows, what was left out, the report and the journal of answers."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Decides which rows get constraints and reminders, and which are shown in the report."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SysgenConfig:
    """The configuration in `path`, with `key=value` overrides by dotted key.

    Raises UserError with everything that is wrong with the file and the overrides, each with its line and dotted key.
    """
    stages = ("generate", "verify", "answer", "judge")
    return validate_settings(open_settings(path, overrides, stages), SysgenConfig)
