"""Options of `evaluate.py hierarchy`."""

from typing import Annotated, Literal

from pydantic import Field

from train.evaluation.hierarchy.published_options import PublishedOptions
from train.pressure.tactics import SETTINGS, Setting


class HierarchyOptions(PublishedOptions):
    """One run of the hierarchy: the model, the rows and the results."""

    settings: Annotated[tuple[Setting, ...], Field(strict=False, min_length=1)] = SETTINGS
    """Settings to ask."""
    rows: int | None = Field(default=None, ge=1)
    """Rows of each setting, balanced over rules and tactics (default all)."""
    split: Literal["seen", "held_out", "all"] = "all"
    """Messages, tactics and requests that training may use, those that it never does, or both."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum tokens of an answer."""
