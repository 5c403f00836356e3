"""System gain in every evaluation: measured on some validation rows, logged with the loss, and kept by groups."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.storage.atomic_write import atomic_write, write_text
from train.storage.jsonl import read_json_lines

if TYPE_CHECKING:  # importing them takes seconds, and `--check` needs no more of this module than FILE
    from accelerate import Accelerator

    from train.system_gain.variants import Variants

FILE = "system_gain.jsonl"
"""In output_dir: a line an evaluation, with the figures of each group."""


class ValidationGain:
    """Measures the model of a run on `rows`, as many tokens at a time as an evaluation takes; without any, nothing."""

    def __init__(self, recipe: Recipe, rows: "Sequence[Variants]", sequences_per_batch: int) -> None:
        self._rows, self._seed = rows, recipe.seed
        self._path = Path(recipe.output_dir) / FILE
        self._tokens_per_batch = sequences_per_batch * recipe.data.max_length
        self.answers = sum(len(variant) for row in rows for variant in row.all)
        """Return the number of answers that a measurement scores, each under one message."""

    def measure(
        self,
        model: Any,
        accelerator: "Accelerator",
        step: int,
        prefix: str,
        on_progress: Callable[[int], None] | None = None,
    ) -> Mapping[str, float]:
        """The figures by name. All processes must call it, and get the same; NaN where a likelihood isn't finite."""
        if not self._rows:
            return {}
        from train.system_gain.metric import MEASURES, system_gain  # imports the modelling code of transformers

        try:
            found = system_gain(
                model,
                self._rows,
                accelerator,
                tokens_per_batch=self._tokens_per_batch,
                seed=self._seed,
                on_progress=on_progress,
            )
        except UserError as fault:  # a run doesn't end for a figure that it can do without
            if is_first_rank():
                print(f"warning: {fault}", flush=True)
            return dict.fromkeys([f"{prefix}_system_{name}" for name in MEASURES], math.nan)
        if is_first_rank():
            self._keep({"step": step, **found.record()})
        return found.metrics(f"{prefix}_")

    def _keep(self, record: dict[str, Any]) -> None:
        """Write a line after those of earlier steps, and of this run alone, as metrics.jsonl has it.

        What a run wrote after the checkpoint that it goes on from is measured again, and a run that starts anew in the
        folder of another has nothing of that one.
        """
        try:
            kept = [line for line in self._earlier() if line["step"] < record["step"]]
            with atomic_write(self._path) as [unfinished]:  # a full disk must not cost the lines that were there
                write_text(unfinished, "".join(json.dumps(line) + "\n" for line in [*kept, record]))
        except OSError as fault:
            print(f"warning: {self._path} can't be written: {fault.strerror}", flush=True)

    def _earlier(self) -> list[dict[str, Any]]:
        """The lines that are there, of the steps whose gain metrics.jsonl has, too; all where there is none."""
        lines = read_json_lines(self._path) if self._path.is_file() else []
        metrics = self._path.with_name("metrics.jsonl")
        if not metrics.is_file():
            return lines
        steps = {line["step"] for line in read_json_lines(metrics) if "eval_system_gain" in line}
        return [line for line in lines if line["step"] in steps]
