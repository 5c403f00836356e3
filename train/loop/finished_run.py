"""Finished run: whether the run of a recipe is already finished in output_dir.

It is if outcome.json says so, the recipe and the contents of what it names (checkpoint/run_inputs.py) are unchanged,
the saved weights are still there, and so is the newest checkpoint, or there are none. Settings that change no result
(logging, folder of the cache) may differ. Missing files beside the weights can be written again without training.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.formatting import format_count, wrap
from train.loop.checkpoint.fingerprint import RESUMABLE_CHANGES, changed_keys, get_value, run_fingerprint
from train.loop.checkpoint.manifest import list_checkpoints
from train.loop.checkpoint.run_inputs import (
    BASE_MODEL,
    describe_by_samples,
    describe_contents,
    list_changed_files,
    without_paths,
)
from train.loop.output_dir import OUTCOME
from train.loop.run_outcome import newest_checkpoint
from train.recipe import Recipe
from train.recipe.lr_schedules import FOLLOWS_EVALUATION
from train.recipe.measurements import is_only_reported
from train.recipe.schedule import sequences_per_step

_UPLOAD_KEYS = ("training.push_to_hub", "training.hub_")
"""Settings that change no weight, but what is done with the weights at the end."""
_EVALUATION_TIMES = {f"training.{name}" for name in ("eval_steps", "eval_strategy", "save_steps", "save_strategy")}
"""Settings that decide among which models the best one is selected, and when a learning rate follows the evaluation."""
_VOCABULARY = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab*")
"""Patterns; every kind of tokenizer has a file that matches one."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has finished.

    `time`: seconds since 1970. `checkpoint`: its newest complete one. `length`: the key that decides its length.
    `missing`: necessary files of the model that can be written again.
    """

    output_dir: str
    step: int
    time: float
    checkpoint: Path | None
    length: str
    missing: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Return when it finished, after how many steps, and what its model lacks."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time))
        done = f"already finished ({format_count(self.step, 'step')}, {when})"
        if not self.missing:
            return done
        are, them = ("are", "them") if len(self.missing) > 1 else ("is", "it")
        command = f"`python -m train.loop.side_files {self.output_dir}` writes {them} again"
        return f"{done}, but its {', '.join(self.missing)} {are} missing ({command})"

    def message(self, width: int) -> str:
        """Return the message for a second start of the same command, in lines of `width` columns."""
        longer = f"a larger {self.length}"
        if self.checkpoint:
            longer += f" and --resume-anyway {self.length} continue from {self.checkpoint}"
        else:
            longer += " trains from the beginning, as no checkpoint was kept, and replaces the model"
        lines = (
            f"{self.summary}: the model of this recipe is in {self.output_dir}. Nothing was trained now.",
            "To train it again: `--resume never` replaces the model, another output_dir keeps it.",
            f"To train longer: {longer}.",
        )
        return "\n".join(wrap(line, width) for line in lines)


def inputs_fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Return what identifies a run: its settings, and the contents of the files that it reads."""
    return {"run": _settings(recipe), "contents": describe_contents(recipe)}


def find_finished_run(recipe: Recipe) -> tuple[FinishedRun | None, str | None]:
    """Return the run of this recipe if it is finished; else why the finished run in output_dir is another one."""
    folder = Path(recipe.output_dir)
    try:
        record = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        if record["outcome"] != "finished":
            return None, None
        differences = list(_find_differences(record, recipe))
        newest = newest_checkpoint(folder, recipe.save.mirror_dir)
        if differences:
            return None, f"{folder} holds a finished run, but {'; '.join(differences)}."
        length = "training.max_steps" if recipe.training.get("max_steps", -1) > 0 else "training.num_train_epochs"
        missing = tuple(_find_missing_files(folder, record["beside weights"], recipe))
        return FinishedRun(str(folder), record["step"], record["time"], newest, length, missing), None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None  # no record, or one of another version


def _find_differences(record: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    before, now = record["run"], _settings(recipe)
    files_before, files_now = record["contents"], describe_contents(recipe)
    for key in changed_keys(before | without_paths(files_before), now | without_paths(files_now)):
        if not _is_decisive(key, now):
            continue
        if before.get(key) != now.get(key):
            yield f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        elif key != "model.name_or_path":  # of the same name, only the working folder has changed
            folder = recipe.model.name_or_path if key == BASE_MODEL else ""
            yield from list_changed_files(files_before.get(key, ()), files_now.get(key, ()), folder)
    for name, recorded in record["weights"].items():
        if (content := describe_by_samples(Path(recipe.output_dir, name))) != recorded:
            yield f"its {name} is {'damaged' if content else 'missing'}"
    if not record["weights"]:
        yield "it saved no weights"
    newest = newest_checkpoint(recipe.output_dir)
    # A run without any checkpoint is finished: somebody freed some space.
    if list_checkpoints(recipe.output_dir) and record["checkpoint"] != (newest and newest.name):
        yield f"its {record['checkpoint'] or 'last checkpoint'} is missing or damaged"


def _settings(recipe: Recipe) -> dict[str, Any]:
    per_process = sequences_per_step(recipe, recipe.model.sequence_parallel)
    return {**run_fingerprint(recipe), "sequences per step and process": per_process}


def _is_decisive(key: str, settings: dict[str, Any]) -> bool:
    """Return whether another value of `key` gives another finished model, or another upload of it."""
    if is_only_reported(key, get_value(settings, "training.metric_for_best_model")):
        return False
    if key in _EVALUATION_TIMES:
        follows = get_value(settings, "training.lr_scheduler_type") in FOLLOWS_EVALUATION
        return follows or bool(get_value(settings, "training.load_best_model_at_end"))
    return key not in RESUMABLE_CHANGES or key.startswith(_UPLOAD_KEYS)


def _find_missing_files(folder: Path, written: Iterable[str], recipe: Recipe) -> list[str]:
    """Return the names of missing or empty files beside the weights, of those written and of the necessary ones.

    A run whose last files couldn't be written has finished, too.
    """
    config = "adapter_config.json" if recipe.adapter else "config.json"
    names = {*written, config, "tokenizer_config.json", "chat_template.jinja"}
    if not recipe.trains_reward_model:
        names.add("generation_config.json")
    if not any(any(folder.glob(pattern)) for pattern in _VOCABULARY):
        names.add("tokenizer.json")
    return sorted(name for name in names if not (folder / name).is_file() or not (folder / name).stat().st_size)
