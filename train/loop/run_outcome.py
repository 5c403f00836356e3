"""Record of a finished run in outcome.json, and the check whether a recipe's run is already finished.

A run is finished where outcome.json says so, its recipe and the bytes of its data were those of now, and the weights
that it saved are still there, with its newest checkpoint or without any. Settings that change no result (logging, where
the cache lies) may differ. Of the base model only the sizes of its weight files are compared; data and models from a
hub are taken to be unchanged.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.formatting import wrap
from train.loop.checkpoint import COMPLETE, HARMLESS, changed_keys, described, facts_of_recipe, folders
from train.loop.checkpoint import sequences_per_step as sequences
from train.progress import counted
from train.recipe import Recipe

OUTCOME = "outcome.json"
"""In output_dir: how the last run there ended. Exit codes don't survive `accelerate launch`."""
_WEIGHTS = "*.safetensors"
_OUTSIDE = ("training.push_to_hub", "training.hub_")
"""Settings that change no weight, but what is done with them at the end."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that was trained to its end. `time`: in seconds since 1970. `checkpoint`: its newest whole one."""

    output_dir: str
    step: int
    time: float
    checkpoint: Path | None
    length: str

    @property
    def summary(self) -> str:
        """Return when it was finished, and after how many steps."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time))
        return f"already finished ({counted(self.step, 'step')}, {when})"

    def message(self, width: int) -> str:
        """Return what a second start of the same command is told, in lines of `width` columns."""
        longer = f"a larger {self.length}"
        if self.checkpoint:
            longer += f" and --resume-anyway {self.length} continue from {self.checkpoint}"
        else:
            longer += " trains from the beginning, as no checkpoint was kept, and replaces the model"
        lines = (
            f"{self.summary}: the model of this recipe is in {self.output_dir}. Nothing was trained now.",
            "To train it anew: `--resume never` replaces the model, another output_dir keeps it.",
            f"To train longer: {longer}.",
        )
        return "\n".join(wrap(line, width) for line in lines)


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Return what tells this run from another one: its settings, and the files that it reads."""
    return {"run": _settings(recipe), "inputs": {str(path): _file(path) for path in _inputs(recipe)}}


def newest_checkpoint(*parents: str | Path | None) -> Path | None:
    """Return the newest checkpoint in these folders that was written to its end."""
    return next((path for path in folders(*parents) if (path / COMPLETE).is_file()), None)


def results(output_dir: str | Path) -> dict[str, Any]:
    """Return what a finished run leaves and a later start looks for: its weights and its newest checkpoint."""
    newest = newest_checkpoint(output_dir)
    return {"weights": weights_in(output_dir), "checkpoint": newest and newest.name}


def weights_in(output_dir: str | Path) -> dict[str, int]:
    """Return the weight files of a saved model or adapter, with their sizes in bytes."""
    return {path.name: path.stat().st_size for path in sorted(Path(output_dir).glob(_WEIGHTS))}


def finished_run(recipe: Recipe) -> tuple[FinishedRun | None, str | None]:
    """Return the run of this recipe if it is finished; else why the finished run in output_dir is not this one."""
    folder = Path(recipe.output_dir)
    try:
        record = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        if record["outcome"] != "finished":
            return None, None
        differences = list(_differences(record, recipe))
        newest = newest_checkpoint(folder, recipe.save.mirror_dir)
        if differences:
            return None, f"{folder} holds a finished run, but {'; '.join(differences)}."
        length = "training.max_steps" if recipe.training.get("max_steps", -1) > 0 else "training.num_train_epochs"
        return FinishedRun(str(folder), record["step"], record["time"], newest, length), None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None  # none is there, or one of another version


def _differences(record: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    before, now = record["run"], _settings(recipe)
    for key in changed_keys(before, now):
        if key not in HARMLESS or key.startswith(_OUTSIDE):
            yield f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
    inputs = record["inputs"]
    for path in _inputs(recipe):
        if str(path) not in inputs or _file(path, inputs[str(path)]) != inputs[str(path)]:
            yield f"{path} has changed since"
    for name in inputs.keys() - {str(path) for path in _inputs(recipe)}:
        yield f"{name} is missing"
    found = weights_in(recipe.output_dir)
    for name, size in record["weights"].items():
        if found.get(name) != size:
            yield f"its {name} is {'damaged' if name in found else 'missing'}"
    if not record["weights"]:
        yield "it saved no weights"
    newest = newest_checkpoint(recipe.output_dir)
    # Without any checkpoint, somebody made room on the disk.
    if folders(recipe.output_dir) and record["checkpoint"] != (newest and newest.name):
        yield f"its {record['checkpoint'] or 'last checkpoint'} is missing or damaged"


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {**facts_of_recipe(recipe), "sequences per step and process": sequences(recipe, 1)}


def _inputs(recipe: Recipe) -> list[Path]:
    """Return the local files that decide what is trained: data, the template, and the weights of the base model."""
    validation = recipe.data.validation
    sources = [*recipe.data.sources, *(validation if isinstance(validation, list | tuple) else ())]
    named = [source.path for source in sources]
    named += [recipe.chat.template] if recipe.chat.template else []
    files = [file for name in named for file in _files_below(Path(name).expanduser())]
    return sorted({*files, *Path(recipe.model.name_or_path).expanduser().glob(_WEIGHTS)})


def _files_below(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def _file(path: Path, known: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return size and checksum; of weights the size alone, as they are large."""
    return {"bytes": path.stat().st_size} if path.match(_WEIGHTS) else described(path, known=known)
