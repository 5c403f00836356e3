"""Reference log-probabilities: those of the model before training, computed once for all pairs and kept on disk.

table       float32 [pairs, 2] of chosen and rejected answers: training pairs, then validation pairs; NaN = missing
key         contents of the base model, the pairs' tokens, and the way of computing
begin       cache folder -> the model that will be trained computes what is missing -> cache folder, output_dir
resume      output_dir, or the cache folder: a model in training is no reference any more
"""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast
from numpy.typing import NDArray

from train.data.cache import cache_key
from train.data.dataset import PackedDataset
from train.data.tokens.source import cache_folder
from train.errors import UserError
from train.loop.checkpoint.run_inputs import describe_model_files
from train.loop.output_dir import REFERENCE
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.storage.atomic_write import atomic_write

_WRITES = 100
"""Writes of a pass over all pairs, at most: a pass that is killed loses a hundredth of itself."""
_SEQUENCES_PER_WRITE = 16
"""Sequences of each process between two writes, at least."""

Table = NDArray[np.float32]


class ReferenceFiles:
    """The files that hold the reference log-probabilities of a run: one in output_dir, one in the cache folder."""

    def __init__(self, recipe: Recipe, facts: Mapping[str, Any], computed: Mapping[str, Any], pairs: int) -> None:
        """Set up the names.

        Args:
            recipe: the recipe of the run.
            facts: fingerprint of its data.
            computed: all else that changes the numbers, such as the type of computation.
            pairs: number of pairs of all splits.
        """
        tokens = [{**source, "source": None} for source in facts["made.tokens"]]
        of_data = json.dumps([tokens, facts["made.rows"], recipe.data.max_length], sort_keys=True)
        self._recipe, self._computed = recipe, computed
        self._pairs, self._data = pairs, xxhash.xxh3_128(of_data.encode()).hexdigest()
        self.of_run = Path(recipe.output_dir, REFERENCE)

    @cached_property
    def cached(self) -> Path:
        """Return the file in the cache folder, whose name depends on the contents of the base model."""
        model = self._recipe.model
        folder = Path(model.name_or_path)
        is_folder, code = folder.is_dir(), model.trust_remote_code
        contents = describe_model_files(folder, trust_remote_code=code) if is_folder else [model.name_or_path]
        key = cache_key({"reference": contents, "pairs": self._data, **self._computed})
        return cache_folder(self._recipe) / f"reference-{key}.npz"

    def read(self, *, resumed: bool) -> tuple[Table, Path | None]:
        """Return the table and its file; all NaN and None without one for these pairs, and on all ranks but the first.

        `resumed`: prefer the file of the run, whose numbers it has trained with.
        """
        paths = ([self.of_run] if resumed else []) + [self.cached] if is_first_rank() else []
        for path in paths:
            try:
                with np.load(path) as arrays:
                    if str(arrays["pairs"]) == self._data:
                        return arrays["log_probs"], path
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # missing or damaged
                continue
        return np.full((self._pairs, 2), np.nan, np.float32), None

    def write(self, table: Table, *, cached: bool) -> None:
        """Write one of the two files. Raises UserError if it can't be written."""
        path = self.cached if cached else self.of_run
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as [staged]:
                np.savez(staged, pairs=np.array(self._data), log_probs=table)
        except OSError as error:
            key = "data.cache_dir" if cached else "output_dir"
            raise UserError(f"{key}: {path} can't be written: {error.strerror or error}.") from error


def share_table(table: Table, accelerator: Accelerator) -> Table:
    """Return the table of the first process on all of them."""
    shared: torch.Tensor = broadcast(torch.from_numpy(table).to(accelerator.device))
    return shared.cpu().numpy()


def list_missing(table: Table, splits: Sequence[PackedDataset]) -> list[tuple[int, int]]:
    """Return the sequences of the first epoch that have a pair without log-probabilities: split and index of each."""
    missing, first = [], 0
    for number, split in enumerate(splits):
        absent = np.isnan(table[first : first + len(split.lengths)].sum(axis=1))
        plan = split.plan_of(0)
        missing += [(number, index) for index in range(len(split)) if absent[plan[index]].any()]
        first += len(split.lengths)
    return missing


def fill_table(
    table: Table,
    missing: Sequence[tuple[int, int]],
    splits: Sequence[PackedDataset],
    score: Callable[[dict[str, Any]], torch.Tensor],
    accelerator: Accelerator,
    write: Callable[[Table], None],
) -> None:
    """Compute the log-probabilities of these sequences, distributed over the processes, which must all call it.

    Each sequence is computed alone, so that the numbers depend neither on those computed before it nor on the number of
    processes.

    Args:
        table: the table, equal on all processes, which is filled in.
        missing: sequences, each as split and index.
        splits: the data sets.
        score: returns the log-probabilities of the pairs of an item, [pairs, 2]; all processes call it as often.
        accelerator: of the trainer.
        write: writes the table; called on all processes.
    """
    firsts = np.cumsum([0, *(len(split.lengths) for split in splits)])
    rank, ranks = accelerator.process_index, accelerator.num_processes
    per_write = ranks * max(_SEQUENCES_PER_WRITE, -(-len(missing) // (ranks * _WRITES)))
    for start in range(0, len(missing), per_write):
        part = missing[start : start + per_write]
        own = np.zeros_like(table)
        for position in range(rank, -(-len(part) // ranks) * ranks, ranks):
            split, index = part[min(position, len(part) - 1)]
            item = splits[split][index]
            log_probs = score(item).float().cpu().numpy()
            if position < len(part):  # else it only keeps the others company
                own[firsts[split] + item["pairs"]] = log_probs
        filled = accelerator.reduce(torch.from_numpy(own).to(accelerator.device)).cpu().numpy()
        of_part = np.concatenate([firsts[split] + splits[split].plan_of(0)[index] for split, index in part])
        table[of_part] = filled[of_part]
        write(table)
