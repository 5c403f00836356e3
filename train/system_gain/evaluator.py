"""System gain in every evaluation: measured on some validation rows, logged with the loss, recorded by groups."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.storage.step_lines import replace_lines

if TYPE_CHECKING:  # importing them takes seconds, and `--check` needs no more of this module than FILE
    from accelerate import Accelerator

    from train.system_gain.variants import Variants

FILE = "system_gain.jsonl"
"""In output_dir: a line per evaluation, with the figures of each group."""


class ValidationGain:
    """Measurement of a run's model on `rows`, in batches as large as those of the evaluation; none without rows."""

    name = "system gain"

    def __init__(self, recipe: Recipe, rows: "Sequence[Variants]", sequences_per_batch: int) -> None:
        self._rows, self._seed = rows, recipe.seed
        self._path = Path(recipe.output_dir) / FILE
        self._tokens_per_batch = sequences_per_batch * recipe.data.max_length
        self.answers = sum(len(variant) for row in rows for variant in row.all)
        """Number of answers that a measurement scores, each under one message."""

    def measure(
        self,
        model: Any,
        accelerator: "Accelerator",
        step: int,
        prefix: str,
        on_progress: Callable[[int], None] | None = None,
    ) -> Mapping[str, float]:
        """Return the figures by name: the same on all processes, which must all call it.

        They are NaN, with a warning, if a likelihood isn't finite.
        """
        if not self._rows:
            return {}
        from train.system_gain.metric import MEASURES, system_gain  # imports the modelling code of transformers
        from train.system_gain.variants import SOURCE_LABEL

        try:
            gain = system_gain(
                model,
                self._rows,
                accelerator,
                tokens_per_batch=self._tokens_per_batch,
                seed=self._seed,
                on_progress=on_progress,
            )
        except UserError as error:  # a figure that can't be measured is no reason to end a run
            if is_first_rank():
                print(f"warning: {error}", flush=True)
            return dict.fromkeys([f"{prefix}_system_{name}" for name in MEASURES], math.nan)
        if is_first_rank():
            replace_lines(self._path, step, [{"step": step, **gain.record()}])
        by_source = {of: figures for (name, of), figures in gain.groups.items() if name == SOURCE_LABEL}
        return gain.metrics(f"{prefix}_") | {
            f"{prefix}_system_gain/{source}": figures.gain.mean for source, figures in by_source.items()
        }
