"""Options of `evaluate.py hierarchy`."""

from typing import Annotated, Literal

from pydantic import Field

from train.evaluation.hierarchy.published_options import PublishedOptions
from train.llm.request import Decoding
from train.pressure.tactics import SETTINGS, Setting
from train.recipe import PathText


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
    temperature: float | None = Field(default=0.0, ge=0)
    """Sampling temperature; 0 = greedy; null = not sent, so the server's own."""
    seed: int = Field(default=0, ge=0)
    """Seed of the intervals and of sampled answers."""
    output_dir: PathText | None = None
    """Folder for all results (default the folder of --model)."""

    def decoding(self) -> Decoding:
        """Return the sampling settings of the answers."""
        return Decoding.from_settings(
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed if self.temperature else None,
            extra=self.extra,
        )
