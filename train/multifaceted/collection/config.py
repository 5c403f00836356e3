"""What a run of the collection is: a YAML file in recipes/collection, strict and documented key by key.

The construction is that of Multifaceted Collection (arXiv:2405.17977): three sets of four preferences for each
instruction, a system message from each, an answer to each. What the paper doesn't say is ours, and the docstring says
so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from train.datagen.config import OutputSection, ServerSection, StageSection, SystemRole, open_settings
from train.datagen.drop_reasons import Loss
from train.datagen.source_rows import SourcesSection
from train.multifaceted.collection.style_patterns import Kind
from train.recipe import PathText, Section, Text
from train.recipe.validation import validate_settings

STAGES = ("screen", "propose", "describe", "message", "answer")


class ScreenSection(StageSection):
    """Say whether an instruction states a style or format, for `filter.model`."""

    max_tokens: int = Field(default=16, gt=0)
    """Most tokens of a yes or no. To raise it asks again what was cut, and that alone."""
    temperature: float | None = Field(default=0.0, ge=0)
    """null = the server's own."""


class ProposeSection(StageSection):
    """Propose the preferences of a set, a line for each dimension."""

    max_tokens: int = Field(default=200, gt=0)
    """Most tokens of the four lines. To raise it asks again what was cut, and that alone."""
    temperature: float | None = Field(default=1.0, ge=0)
    """null = the server's own. Ours: sets are to differ."""


class DescribeSection(StageSection):
    """Describe the preferences of a set, a line for each dimension."""

    max_tokens: int = Field(default=512, gt=0)
    """Most tokens of the four descriptions. To raise it asks again what was cut, and that alone."""


class MessageSection(StageSection):
    """Write a system message from four descriptions."""

    max_tokens: int = Field(default=512, gt=0)
    """Most tokens of a message. To raise it asks again what was cut, and that alone."""


class AnswerSection(StageSection):
    """Answer the instruction under the system message."""

    max_tokens: int = Field(default=2048, gt=0)
    """Most tokens of an answer. To raise it asks again what was cut, and that alone."""


class HierarchySection(Section):
    """What preferences are drawn or proposed from."""

    file: PathText | None = None
    """A YAML file in the form of train/multifaceted/collection/hierarchy.yaml, whose sub-dimensions and preferences are added to
    ours; null = ours alone."""
    ours: bool = True
    """false = `file` takes the place of ours."""


class FilterSection(Section):
    """Which instructions are left out."""

    rules: Annotated[tuple[Kind, ...], Field(strict=False)] = get_args(Kind)
    """Instructions that already say how they want to be answered, by kind of words: length (`in 50 words`), format (`as
    a table`), style (`in a formal tone`), audience (`for a beginner`), role (`act as a pirate`); [] = none is."""
    model: bool = False
    """Ask the model too whether an instruction that passed the rules says so."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Leave out instructions that are this similar (Jaccard, of runs of three words) to one before; null = only those
    that are the same but for case, blanks and the last punctuation mark."""


class CollectionConfig(Section):
    """A run of the collection: whose instructions, which model, and what becomes of both."""

    model: Text
    """The model, by the name that the servers know it by. It proposes, describes, writes and answers."""
    servers: Annotated[tuple[ServerSection, ...], Field(strict=False, min_length=1)]
    """Where it is served; the load is shared by how fast each answers."""
    system_role: SystemRole = "native"
    """The place of a system message in requests; native = it is sent as one; merge_into_user = in the first user turn,
    before its text and a blank line, for a model without a system role (Gemma, Mistral 7B, o1-mini). The rows that are
    written are the same."""
    data: SourcesSection
    """The rows whose first user turn is an instruction. A system message that they have is ignored, and counted."""
    sets_per_instruction: int = Field(default=3, ge=1, le=20)
    """Preference sets, and so system messages and answers, for each instruction: 3 as in the paper, 1 as in its -small
    set."""
    preferences: Literal["proposed", "hierarchy"] = "proposed"
    """proposed = the model proposes them for the instruction, below the sub-dimension that is drawn; hierarchy = they
    are drawn from the hierarchy, in a balanced way, and nothing is asked."""
    hierarchy: HierarchySection = HierarchySection()
    """Dimensions, sub-dimensions and preferences."""
    filter: FilterSection = FilterSection()
    """Which instructions are left out."""
    retries: int = Field(default=2, ge=0)
    """Further tries for each step of a set whose answer is empty, cut, refused, ended for an unknown reason, can't be
    read, or is the same as a sibling's."""
    leak: float | None = Field(default=0.5, gt=0, le=1)
    """A system message that holds this share of the instruction's content words, and three of them at least, is written
    again: it is to fit any instruction; null = not looked at. Ours."""
    on_cut_answer: Literal["drop", "keep"] = "drop"
    """A set whose answer was cut at the token limit, or ended for an unknown reason, try after try; keep = it is
    written, and teaches to stop in the middle."""
    on_lost_set: Literal["keep", "drop_instruction"] = "keep"
    """What becomes of the other sets of an instruction when one is left out."""
    pairs: Literal["one", "all", "none"] = "one"
    """Preference pairs: one = for each instruction the answer of one set, drawn by the seed, over that of a sibling, as
    in the paper's -DPO set; all = of each set over each sibling."""
    accept_losses: Annotated[tuple[Loss, ...], Field(strict=False)] = ()
    """Losses that no other setting decides and that are no error: no_answer = no answer came, after all tries, or an
    empty one; unreadable = rows that can't be read; unsupported = rows that need tools, or don't begin with a user
    turn. All other rows are written in any case; a run with losses that are not named here ends with exit code 2. []
    = none."""
    screen: ScreenSection = ScreenSection()
    """Say whether an instruction states a style or format, for `filter.model`."""
    propose: ProposeSection = ProposeSection()
    """Propose the preferences of a set."""
    describe: DescribeSection = DescribeSection()
    """Describe the preferences of a set."""
    message: MessageSection = MessageSection()
    """Write a system message from four descriptions alone."""
    answer: AnswerSection = AnswerSection()
    """Answer the instruction under the system message."""
    output: OutputSection = OutputSection()
    """What is written."""
    output_dir: PathText
    """Folder for the rows, the pairs, what was left out, the report and the journal of answers."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Decides on sub-dimensions, examples in prompts, pairs and samples."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CollectionConfig:
    """The configuration in `path`, with `key=value` overrides by dotted key.

    Raises UserError with everything that is wrong with the file and the overrides, each with its line and dotted key.
    """
    document = open_settings(path, overrides, STAGES)
    if document.section("hierarchy").get("ours") is False and document.section("hierarchy").get("file") is None:
        document.add_error(("hierarchy", "ours"), "found false without a `hierarchy.file` to take its place. Name one.")
    return validate_settings(document, CollectionConfig)
