"""Configuration of a collection run: a YAML file in recipes/collection, strict and documented key by key.

The construction is that of Multifaceted Collection (arXiv:2405.17977): three sets of four preferences for each
instruction, a system message from each set, an answer to each message. Where the paper does not state a value, the
docstring says that it is ours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from train.datagen.config import GenerationConfig, StageSection, open_config
from train.multifaceted.collection.style_patterns import Kind
from train.recipe import PathText, Section
from train.recipe.validation import validate_settings

STAGES = ("screen", "propose", "describe", "message", "answer")


class ScreenSection(StageSection):
    """Judge whether an instruction states a style or format, for `filter.model`."""

    max_tokens: int = Field(default=16, gt=0)
    """Maximum tokens of a yes or no. Raising it repeats only the requests whose answers were cut."""
    temperature: float | None = Field(default=0.0, ge=0)
    """null = the server's default."""


class ProposeSection(StageSection):
    """Propose the preferences of a set, one line per dimension."""

    max_tokens: int = Field(default=200, gt=0)
    """Maximum tokens of the four lines. Raising it repeats only the requests whose answers were cut."""
    temperature: float | None = Field(default=1.0, ge=0)
    """null = the server's default. Ours: sets should differ."""


class DescribeSection(StageSection):
    """Describe the preferences of a set, one line per dimension."""

    max_tokens: int = Field(default=512, gt=0)
    """Maximum tokens of the four descriptions. Raising it repeats only the requests whose answers were cut."""


class MessageSection(StageSection):
    """Write a system message from four descriptions."""

    max_tokens: int = Field(default=512, gt=0)
    """Maximum tokens of a message. Raising it repeats only the requests whose answers were cut."""


class AnswerSection(StageSection):
    """Answer the instruction under the system message."""

    max_tokens: int = Field(default=2048, gt=0)
    """Maximum tokens of an answer. Raising it repeats only the requests whose answers were cut."""


class HierarchySection(Section):
    """Hierarchy of dimensions, sub-dimensions and preferences."""

    file: PathText | None = None
    """A YAML file in the form of train/multifaceted/collection/hierarchy.yaml, whose sub-dimensions and preferences are
    added to ours; null = ours alone."""
    ours: bool = True
    """false = `file` replaces ours."""


class FilterSection(Section):
    """Filters for instructions."""

    rules: Annotated[tuple[Kind, ...], Field(strict=False)] = get_args(Kind)
    """Drop instructions that already say how to answer them, by kind of statement: length (`in 50 words`), format (`as
    a table`), style (`in a formal tone`), audience (`for a beginner`), role (`act as a pirate`); [] = none."""
    model: bool = False
    """Also ask the model whether an instruction that passed the rules says so."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Drop instructions with at least this Jaccard similarity (3-grams of words) to an earlier one; null = only those
    that are equal except for case, blanks and the last punctuation mark."""


class CollectionConfig(GenerationConfig):
    """A collection run. The first user turn of each source row is an instruction; its system message is ignored and
    counted."""

    sets_per_instruction: int = Field(default=3, ge=1, le=20)
    """Preference sets, and so system messages and answers, per instruction: 3 in the paper, 1 in its -small set."""
    preferences: Literal["proposed", "hierarchy"] = "proposed"
    """proposed = the model proposes them for the instruction, below a planned sub-dimension; hierarchy = they are drawn
    from the hierarchy, balanced, without a request."""
    hierarchy: HierarchySection = HierarchySection()
    """Dimensions, sub-dimensions and preferences."""
    filter: FilterSection = FilterSection()
    """Filters for instructions."""
    retries: int = Field(default=2, ge=0)
    """Maximum number of further tries for each stage of a set whose answer is empty, cut, refused, unreadable, the same
    as a sibling's, or ended for an unknown reason."""
    leak: float | None = Field(default=0.5, gt=0, le=1)
    """A system message that holds this share of the instruction's content words, and at least three of them, is
    generated again: it should fit any instruction; null = no check. Ours."""
    on_cut_answer: Literal["drop", "keep"] = "drop"
    """A set whose answer was cut at the token limit, or ended for an unknown reason, in all tries; keep = it is
    written, and teaches to stop in the middle."""
    on_lost_set: Literal["keep", "drop_instruction"] = "keep"
    """The other sets of an instruction when one is dropped."""
    pairs: Literal["one", "all", "none"] = "one"
    """Preference pairs; one = per instruction, the answer of one set, drawn with the seed, over that of a sibling, as
    in the paper's -DPO set; all = each set over each sibling."""
    screen: ScreenSection = ScreenSection()
    """Stage: judge whether an instruction states a style or format, for `filter.model`."""
    propose: ProposeSection = ProposeSection()
    """Stage: propose the preferences of a set."""
    describe: DescribeSection = DescribeSection()
    """Stage: describe the preferences of a set."""
    message: MessageSection = MessageSection()
    """Stage: write a system message from four descriptions alone."""
    answer: AnswerSection = AnswerSection()
    """Stage: answer the instruction under the system message."""

    def used_stages(self) -> list[str]:
        """Return the names of the stages that a run asks."""
        unused = {"screen": not self.filter.model, "propose": self.preferences != "proposed"}
        return [stage for stage in STAGES if not unused.get(stage)]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CollectionConfig:
    """Return the configuration in `path`, with `key=value` overrides by dotted key.

    Raises UserError with all errors in the file and the overrides, each with its line and dotted key.
    """
    document = open_config(path, overrides, STAGES)
    if document.section("hierarchy").get("ours") is False and document.section("hierarchy").get("file") is None:
        document.add_error(("hierarchy", "ours"), "found false without a `hierarchy.file` to replace it. Name one.")
    return validate_settings(document, CollectionConfig)
