"""Sources of rows: the parts of `data.sources`, `data.validation` and of other commands' configurations."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer

from train.recipe.section import PathText, Section, Text


class Source(Section):
    """A source of rows."""

    path: PathText
    """Id of a data set on the hub, a file, a folder or a glob."""
    name: Text | None = None
    """Configuration of a data set on the hub, where it has several."""
    split: Text = "train"
    """Split of a data set, where it has several."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null = its main branch."""
    weight: float = Field(default=1.0, gt=0)
    """Repetitions of the rows per epoch: 1.0 = once, 0.5 = a random half of the rows (by `seed`), 2.0 = twice."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "janus",
        "prompt_completion",
        "question_answer",
        "exchanges",
        "preference",
    ] = "auto"
    """Format of the rows; auto = detected from the columns. preference = pairs (`chosen`, `rejected`), with the section
    `preference` alone."""
    ignore: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Columns (`rationale`) and keys of messages (`messages[].note`) to ignore. Without it, content that nothing reads
    is an error."""


Sources = Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]


class TrainingSource(Source):
    """A source of training or validation rows."""

    loss_weight: float = Field(default=1.0, ge=0.000_001, le=1_000_000)
    """Factor of the losses of the source's trained tokens, times the `loss_weight` of a row and of a message where they
    have one. The loss is the weighted mean over the tokens of a step; rows are seen as often as before."""
    min_gain: Annotated[PathText, Field(examples=["outputs/base/gain_rows.jsonl"])] | None = None
    """File gain_rows.jsonl that `scripts/evaluate.py gain` wrote of these rows: those with a gain of 0 or less, whose
    answer is no likelier under its own system message than under others, are left out. Rows that the file does not
    have stay. null = all rows stay."""
    siblings: int | None = Field(default=None, ge=1)
    """Maximum rows of one instruction (the first user message), drawn by `seed`; null = all. Multifaceted Collection
    has three, under different system messages: with 1, 2 and 3 its authors show what each further one adds."""

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, serialize: Callable[["TrainingSource"], dict[str, Any]]) -> dict[str, Any]:
        """Return the fields, these only if they are set: records of runs from before they were there stay equal."""
        defaults = {"loss_weight": 1.0, "min_gain": None, "siblings": None}
        values = serialize(self)
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


TrainingSources = Annotated[tuple[TrainingSource, ...], Field(strict=False, min_length=1)]
