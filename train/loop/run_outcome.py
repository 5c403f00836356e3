"""Record of a finished run in outcome.json, and the check whether a recipe's run is already finished.

A run is finished where outcome.json says so, its recipe and the contents of what it names (`run_inputs`) were those of
now, and the weights that it saved are still there, with its newest checkpoint or without any. Settings that change no
result (logging, where the cache lies) may differ. A finished run that lacks files beside its weights is finished too:
they can be written without training.
"""

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.formatting import format_count, wrap
from train.loop.checkpoint.manifest import COMPLETE, folders
from train.loop.checkpoint.resume import RESUMABLE_CHANGES, changed_keys, run_fingerprint, value_of
from train.loop.checkpoint.run_inputs import (
    BASE_MODEL,
    changed_files,
    contents,
    contents_alone,
    files_beside_weights,
    sampled,
)
from train.loop.output_dir import ATTEMPTS, OUTCOME
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.recipe.conflicts import chosen_by_gain
from train.recipe.lr_schedules import FOLLOWS_EVALUATION
from train.recipe.schedule import sequences_per_step as sequences
from train.storage.atomic_write import atomic_write, write_text

if TYPE_CHECKING:  # imports torch and the Trainer, which `--check` does without
    from train.loop.preemption import Preemption

_WEIGHTS = "*.safetensors"
_OUTSIDE = ("training.push_to_hub", "training.hub_")
"""Settings that change no weight, but what is done with them at the end."""
_WHEN_MEASURED = {f"training.{name}" for name in ("eval_steps", "eval_strategy", "save_steps", "save_strategy")}
"""Settings that decide which models the best one is chosen from, and when a learning rate follows the evaluation."""
_VOCABULARY = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab*")
"""Patterns of which the files of every kind of tokenizer match one."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that was trained to its end. `time`: in seconds since 1970. `checkpoint`: its newest whole one.

    `missing`: files that the model can't be used without, and that can be written again.
    """

    output_dir: str
    step: int
    time: float
    checkpoint: Path | None
    length: str
    missing: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Return when it was finished, after how many steps, and what its model lacks."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time))
        done = f"already finished ({format_count(self.step, 'step')}, {when})"
        if not self.missing:
            return done
        are, them = ("are", "them") if len(self.missing) > 1 else ("is", "it")
        command = f"`python -m train.loop.checkpoint.side_files {self.output_dir}` writes {them} again"
        return f"{done}, but its {', '.join(self.missing)} {are} missing ({command})"

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
    return {"run": _settings(recipe), "contents": contents(recipe)}


def newest_checkpoint(*parents: str | Path | None) -> Path | None:
    """Return the newest checkpoint in these folders that was written to its end."""
    return next((path for path in folders(*parents) if (path / COMPLETE).is_file()), None)


def results(output_dir: str | Path) -> dict[str, Any]:
    """Return what a finished run leaves and a later start looks for: its model and its newest checkpoint."""
    newest = newest_checkpoint(output_dir)
    weights = {path.name: sampled(path) for path in sorted(Path(output_dir).glob(_WEIGHTS))}
    beside = files_beside_weights(Path(output_dir))
    return {"weights": weights, "beside weights": beside, "checkpoint": newest and newest.name}


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
        missing = tuple(_missing_files(folder, record["beside weights"], adapter=recipe.adapter is not None))
        return FinishedRun(str(folder), record["step"], record["time"], newest, length, missing), None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None  # none is there, or one of another version


def _differences(record: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    before, now = record["run"], _settings(recipe)
    files_before, files_now = record["contents"], contents(recipe)
    changed = changed_keys(before | contents_alone(files_before), now | contents_alone(files_now))
    for key in changed:
        if not _decides(key, now):
            continue
        if before.get(key) != now.get(key):
            yield f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        elif key != "model.name_or_path":  # of the same name, it is only the working folder that is another one
            folder = recipe.model.name_or_path if key == BASE_MODEL else ""
            yield from changed_files(files_before.get(key, ()), files_now.get(key, ()), folder)
    for name, written in record["weights"].items():
        if (found := sampled(Path(recipe.output_dir, name))) != written:
            yield f"its {name} is {'damaged' if found else 'missing'}"
    if not record["weights"]:
        yield "it saved no weights"
    newest = newest_checkpoint(recipe.output_dir)
    # Without any checkpoint, somebody made room on the disk.
    if folders(recipe.output_dir) and record["checkpoint"] != (newest and newest.name):
        yield f"its {record['checkpoint'] or 'last checkpoint'} is missing or damaged"


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {**run_fingerprint(recipe), "sequences per step and process": sequences(recipe, 1)}


def _decides(key: str, settings: dict[str, Any]) -> bool:
    """Return whether another value of `key` means another finished model, or another upload of it."""
    if key.startswith("system_gain."):
        return chosen_by_gain(value_of(settings, "training.metric_for_best_model"))
    if key in _WHEN_MEASURED:
        follows = value_of(settings, "training.lr_scheduler_type") in FOLLOWS_EVALUATION
        return follows or bool(value_of(settings, "training.load_best_model_at_end"))
    return key not in RESUMABLE_CHANGES or key.startswith(_OUTSIDE)


def _missing_files(folder: Path, written: Iterable[str], *, adapter: bool) -> list[str]:
    """Return the names of files beside the weights that are missing or empty: of those written, and of the necessary.

    A run whose last files couldn't be written is finished, too.
    """
    config = "adapter_config.json" if adapter else "config.json"
    names = {*written, config, "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    if not any(any(folder.glob(pattern)) for pattern in _VOCABULARY):
        names.add("tokenizer.json")
    return sorted(name for name in names if not (folder / name).is_file() or not (folder / name).stat().st_size)


@contextmanager
def record_run_outcome(
    output_dir: str,
    preemption: "Preemption",
    for_a_person: Collection[int] = (),
    fingerprint: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Record how the block ended: in OUTCOME for whoever started it (the batch script), and in ATTEMPTS for later.

    It belongs inside `preemption.watching()`, so that Ctrl-C can't break off the record itself.
    finished; preempted (saved and stopped); interrupted by Ctrl-C, without saving; failed (the user must mend
    something); crashed: an error of ours, a library's or a peer's, after which another attempt may go well.
    `for_a_person`: errno of an OSError that the user must mend. `fingerprint`: kept of a run that is finished.
    """
    _note(output_dir, {"from_step": preemption.step, "time": time.time()}, anew=preemption.step == 0)
    if is_first_rank():
        with suppress(OSError):
            Path(output_dir, OUTCOME).unlink(missing_ok=True)  # what is said there was said of a run before this one
    try:
        yield
        outcome, reason = ("preempted", preemption.reason) if preemption.reason else ("finished", None)
        preemption.ended = True
    except KeyboardInterrupt:
        preemption.ended = True
        newest = newest_checkpoint(output_dir)
        kept = f"the newest complete checkpoint is {newest.name}" if newest else "there is no complete checkpoint"
        _write(output_dir, "interrupted", preemption.step, f"Ctrl-C; {kept}")
        raise
    except BaseException as fault:
        first_line = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        mendable = isinstance(fault, UserError) or getattr(fault, "errno", None) in for_a_person
        _write(output_dir, "failed" if mendable else "crashed", preemption.step, first_line)
        raise
    more = {**(fingerprint or {}), **results(output_dir)} if outcome == "finished" and is_first_rank() else {}
    _write(output_dir, outcome, preemption.step, reason, more)


def restarts(output_dir: str | Path) -> list[tuple[int, str]]:
    """Each time that the run in this folder was started again: from which step, and how the one before had ended."""
    found: list[tuple[int, str]] = []
    ended = "killed"
    try:
        lines = Path(output_dir, ATTEMPTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for number, line in enumerate(lines):
        try:
            said = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut short as the disk was full or the machine went down
        if "outcome" in said:
            reason = f": {said['reason']}" if said["reason"] else ""
            ended = f"{said['outcome']} at step {said['step']}{reason}"
        else:
            if number:
                found.append((said["from_step"], ended))
            ended = "killed"
    return found


def _write(output_dir: str, outcome: str, step: int, reason: str | None, more: Mapping[str, Any] | None = None) -> None:
    """Write OUTCOME and the last line of ATTEMPTS. `more`: what OUTCOME alone says."""
    if not is_first_rank():
        return
    said: dict[str, Any] = {
        "outcome": outcome, "step": step, "reason": reason, "job": os.environ.get("SLURM_JOB_ID"), "time": time.time(),
    }  # fmt: skip
    with suppress(OSError), atomic_write(Path(output_dir) / OUTCOME) as [unfinished]:
        write_text(unfinished, json.dumps({**said, **(more or {})}) + "\n")  # on a full disk the fault itself matters
    _note(output_dir, said)


def _note(output_dir: str, said: dict[str, Any], *, anew: bool = False) -> None:
    """Append a line to ATTEMPTS. `anew`: those that stand there are another run's."""
    if not is_first_rank():
        return
    with suppress(OSError), Path(output_dir, ATTEMPTS).open("w" if anew else "a", encoding="utf-8") as lines:
        lines.write(json.dumps(said) + "\n")
