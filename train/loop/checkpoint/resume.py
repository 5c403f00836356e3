"""Resume: find the checkpoint to continue from, and refuse one that belongs to another run.

Skipped checkpoints and changed settings are reported by name: no run silently starts from step 0
(transformers#35782; ms-swift#10050).
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.loop.checkpoint.fingerprint import (
    DATA_KEYS,
    RESUMABLE_CHANGES,
    changed_keys,
    format_change,
    get_value,
    records_tokens,
    run_fingerprint,
)
from train.loop.checkpoint.joint_verification import Verify, verify_alone, verify_jointly
from train.loop.checkpoint.manifest import Checkpoint, list_checkpoints
from train.loop.checkpoint.rank_store import has_peers
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.recipe.measurements import is_only_reported
from train.recipe.schedule import BATCH_KEYS, data_parallel, sequences_per_step
from train.recipe.sft_config import training_fields

_BATCH_SIZE, _ACCUMULATION = BATCH_KEYS
_EXPLANATIONS = {
    "made.tokens": "the tokens of the rows of data.sources: the text, the tokenizer, the template or a key of chat "
    "has changed",
    "made.rows": "the rows of training and validation, and how often each is repeated",
    "made.sequences": "the packing plan",
    "made.samples": "the file of `evaluation` by which training.metric_for_best_model selects",
    "made.template": "the text of the template, which is saved with the model; all tokens are the same",
    _ACCUMULATION: f"with {_BATCH_SIZE}, on all processes",
}
"""Meaning of keys that no recipe has, for messages."""
_ADAPTER_WEIGHTS = ("adapter.r", "adapter.target_modules", "adapter.use_dora", "adapter.modules_to_save")
"""Keys that decide which weights an adapter has."""


def find_checkpoint(
    resume: str, recipe: Recipe, anyway: Sequence[str] = (), *, jointly: bool = False
) -> Checkpoint | None:
    """Return the checkpoint that `--resume auto|never|DIR` selects; None to start from the beginning.

    `auto` selects the newest complete one in output_dir or save.mirror_dir, and reports newer ones that it skips.
    `anyway`: keys that may differ from those of its run. `jointly`: all ranks of the launch call this, and each reads
    its share of the files.
    Raises UserError if DIR is not a complete checkpoint, if none of several is complete, if the checkpoint has no
    optimizer, has other weights than this run trains or belongs to another run, and for an unknown key in `anyway`.
    """
    if resume == "never":
        return None
    verify = verify_jointly if jointly and has_peers() else verify_alone
    if resume == "auto":
        checkpoint = _find_newest(recipe, verify)
    else:
        (checkpoint,) = verify([Path(resume)])
    if isinstance(checkpoint, str):
        raise UserError(
            f"--resume {resume}: {checkpoint} Write the folder of a complete checkpoint, move the others away, or "
            "write `--resume never` to start from the beginning."
        )
    if checkpoint is None:
        return None
    before, now = checkpoint.manifest["run"], run_fingerprint(recipe)
    if before.get("training.save_only_model"):
        raise UserError(
            f"--resume {resume}: {checkpoint.folder} holds no optimizer (training.save_only_model: true), so no run "
            "can resume from it. Name another output_dir, or write `--resume never` to start from the beginning."
        )
    keys = {*before, *now, *(f"training.{name}" for name in training_fields())}
    for key in anyway:
        if key not in keys:
            matches = difflib.get_close_matches(key, keys, n=2)
            hint = f" Did you mean {' or '.join(matches)}?" if matches else ""
            raise UserError(f"--resume-anyway {key}: no key of a recipe that a checkpoint is compared by.{hint}")
    _refuse_other_weights(checkpoint, now)
    refuse_changes(checkpoint, before, now, anyway)
    return checkpoint


def _find_newest(recipe: Recipe, verify: Verify) -> Checkpoint | str | None:
    """Return the newest complete checkpoint; None if there are none; a sentence if none of them is complete."""
    skipped: list[str] = []
    for checkpoint in verify(list_checkpoints(recipe.output_dir, recipe.save.mirror_dir)):
        if isinstance(checkpoint, Checkpoint):
            if skipped and is_first_rank():
                print(f"skipped: {' '.join(skipped)}", flush=True)
            return checkpoint
        skipped.append(checkpoint)
    return f"none of the checkpoints in {recipe.output_dir} is complete: {' '.join(skipped)}" if skipped else None


def _refuse_other_weights(checkpoint: Checkpoint, now: Mapping[str, Any]) -> None:
    """Raise UserError if this run trains other weights than the checkpoint holds: no key can allow that."""
    before = checkpoint.manifest["run"]
    if (before.get("adapter.r") is None) != (now.get("adapter.r") is None):
        keys = ["adapter"]
        differences = [f"it was trained {'in full' if 'adapter' in before else 'with an adapter'}"]
    else:
        keys = [key for key in changed_keys(before, now) if key in _ADAPTER_WEIGHTS]
        differences = [f"{key} was {' and is '.join(format_change(before, now, key))}" for key in keys]
    if keys:
        raise UserError(
            f"--resume: {checkpoint.folder} can't be loaded into this run: {', '.join(keys)} decides which weights are "
            f"trained, and the checkpoint holds others ({'; '.join(differences)}). Change it back, or start from the "
            "beginning with `--resume never` and another output_dir."
        )


def refuse_changes(
    checkpoint: Checkpoint, before: Mapping[str, Any], now: Mapping[str, Any], anyway: Sequence[str]
) -> None:
    """Print the differences between the run of a checkpoint and this one.

    Raises UserError for differences that change what is computed, unless `anyway` names them.
    """
    changed = changed_keys(before, now)
    metric = get_value(now, "training.metric_for_best_model")
    allowed = RESUMABLE_CHANGES | ({"chat.template"} if records_tokens(before) else set()) | set(anyway)
    if not {"made.tokens", *DATA_KEYS}.isdisjoint(anyway):
        allowed |= {"made.tokens"}
    if any(key.startswith(("data.", "made.")) or key in ("seed", *BATCH_KEYS) for key in anyway):
        allowed |= {"made.rows", "made.sequences"}  # consequences of the allowed change
    if any(key.startswith("evaluation.") for key in anyway):
        allowed |= {"made.samples"}
    refused = [key for key in changed if key not in allowed and not is_only_reported(key, metric)]
    if refused:
        differences = []
        for key in refused:
            old, new = repr(get_value(before, key)), repr(get_value(now, key))
            if key.startswith("made."):
                old, new = format_change(before, now, key)
            explanation = f" ({_EXPLANATIONS[key]})" if key in _EXPLANATIONS else ""
            differences.append(f"{key} was {old} and is {new}{explanation}")
        raise UserError(
            f"--resume: {checkpoint.folder} belongs to another run: {'; '.join(differences)}. Name another output_dir, "
            "change it back, write `--resume never` to start from the beginning, or accept the change: "
            f"{' '.join(f'--resume-anyway {key}' for key in refused)}."
        )
    if changed and is_first_rank():
        changes = ", ".join(f"{key} {' -> '.join(format_change(before, now, key))}" for key in changed)
        print(
            f"changed since {checkpoint.folder.name}: {changes} (in force from step {checkpoint.step + 1})", flush=True
        )


def get_run_date(checkpoint: Checkpoint | None) -> date:
    """Return the date that templates see: that of the run's start, also if it resumes on a later day."""
    start = checkpoint.manifest["run"].get("made.date") if checkpoint else None
    return date.fromisoformat(start) if start else date.today()


def check_distribution(checkpoint: Checkpoint, now: str) -> None:
    """Raise UserError if the optimizer is distributed otherwise in the checkpoint than in this run."""
    before = checkpoint.manifest["distribution"]
    if before != now:
        raise UserError(
            f"--resume: {checkpoint.folder} was written under {before}, and this run is launched as {now}: neither can "
            "read the other's optimizer. Launch with the configuration that the run began with (accelerate_configs), "
            "or name another output_dir; `--resume never` starts from the beginning."
        )


def keep_sequences_per_step(recipe: Recipe, checkpoint: Checkpoint, anyway: Sequence[str], processes: int) -> Recipe:
    """Return the recipe with the accumulation steps that give the checkpoint's sequences per step on `processes`.

    Each step then trains the same sequences, except the last of an epoch that they don't fill: accelerate repeats
    sequences from the front until each process has one. Results are not bit-identical: sums are added in another
    order, and dropout draws other numbers.

    Raises UserError if that is impossible, or if the recipe changes the sequences per step although as many processes
    share them in the same way.
    """
    before, processes_before = checkpoint.manifest["sequences_per_step"], checkpoint.manifest["processes"]
    now = sequences_per_step(recipe, processes)
    if now == before:
        return recipe
    sharing, sharing_before = recipe.model.sequence_parallel, checkpoint.manifest.get("sequence_parallel", 1)
    if (processes, sharing) == (processes_before, sharing_before):
        allowed = [*anyway, _ACCUMULATION] if _BATCH_SIZE in anyway else anyway
        refuse_changes(
            checkpoint,
            {_ACCUMULATION: f"{before} sequences a step"},
            {_ACCUMULATION: f"{now} sequences a step"},
            allowed,
        )
        return recipe
    batch_size = get_value({f"training.{key}": value for key, value in recipe.training.items()}, _BATCH_SIZE)
    accumulation, rest = divmod(before, batch_size * data_parallel(processes, sharing))
    shared, shared_before = (f" ({size} for each sequence)" if size > 1 else "" for size in (sharing, sharing_before))
    if rest:
        raise UserError(
            f"--resume: the run of {checkpoint.folder} had {before} sequences a step ({processes_before} processes), "
            f"which {processes} processes{shared} with batches of {batch_size} can't share evenly. Use a "
            "number of processes, or a training.per_device_train_batch_size, that divides it."
        )
    if is_first_rank():
        print(
            f"{processes} processes{shared} instead of {processes_before}{shared_before}: "
            f"training.gradient_accumulation_steps is {accumulation}, so that a step has {before} sequences as before",
            flush=True,
        )
    training = {**recipe.training, "gradient_accumulation_steps": accumulation}
    changed = recipe.model_copy(update={"training": training})
    changed._origin = recipe._origin
    return changed


@contextmanager
def as_resume_error(folder: str | Path) -> Iterator[None]:
    """Raise UserError if the content of `folder` doesn't fit the model or the optimizer inside the block.

    `--resume-anyway` may name a change that no run can resume with.
    """
    try:
        yield
    except (ValueError, RuntimeError, LookupError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and "state_dict" not in text and "mismatch" not in text:
            raise  # out of memory, or an error of another process
        raise UserError(
            f"--resume: {folder} can't be loaded into the model and optimizer of this run: {text[:300]} Change back "
            "what --resume-anyway names, or write `--resume never` to start from the beginning."
        ) from error
