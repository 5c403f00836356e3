"""TODO: train.loop.checkpoint.manifest.resume."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.loop.checkpoint.manifest import Checkpoint, _opened, list_checkpoints
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.recipe.conflicts import chosen_by_gain
from train.recipe.schedule import _BATCH, sequences_per_step
from train.recipe.sft_config import training_fields

_MEANING = {
    "made.tokens": "what the rows of data.sources became: their text, the tokenizer, the template or a policy of chat "
    "is another one",
    "made.rows": "which rows are trained and held out, and how often",
    "made.sequences": "how rows are packed",
    "made.template": "the text of the template, which is saved with the model; no token is another one",
    _BATCH[1]: f"with {_BATCH[0]}, on all processes",
}
"""What stands behind a key that nobody changed under that name."""


_WEIGHTS_OF_ADAPTER = ("adapter.r", "adapter.target_modules", "adapter.use_dora", "adapter.modules_to_save")
"""Keys that decide which weights an adapter has."""


_IN_ANY_ORDER = {"adapter.target_modules", "adapter.modules_to_save"}
"""Keys whose lists of names say the same in another order."""


_JUDGED_BY_TOKENS = {"data.sources", "data.validation"}
"""Keys whose paths don't matter where the tokens of their rows are known."""


RESUMABLE_CHANGES = {
    "data.cache_dir",
    "data.processes",
    "model.attention",
    "made.template",
    *(
        f"training.{name}"
        for name in (
            *("logging_steps", "logging_first_step", "logging_strategy", "log_level", "run_name", "project"),
            *("save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy", "eval_on_start"),
            *("per_device_eval_batch_size", "eval_accumulation_steps", "gradient_checkpointing"),
            *("gradient_checkpointing_kwargs", "activation_offloading", "torch_empty_cache_steps", "ddp_timeout"),
            *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
            *("dataloader_persistent_workers", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
        )
    ),
}
"""Keys that don't change what is computed, but for rounding: they may change in the middle of a run."""


def run_fingerprint(recipe: Recipe) -> dict[str, Any]:
    """The dotted keys of the recipe that decide what a run computes, with their values as JSON has them."""
    sections = recipe.model_dump(mode="json", exclude={"output_dir", "tracking", "guards", "save"})
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            flat[f"{section}.{key}".rstrip(".")] = value
    return {key: value for key, value in flat.items() if key not in _BATCH}


def get_value(facts: Mapping[str, Any], key: str) -> Any:
    """Return what a run had there, or TRL's default where nothing is written: to write a default is no change."""
    field = training_fields().get(key.removeprefix("training."))
    return facts.get(key, field.default if field else None)


def find_checkpoint(resume: str, recipe: Recipe, anyway: Sequence[str] = ()) -> Checkpoint | None:
    """The checkpoint that `--resume auto|never|DIR` means; None to start from the beginning.

    auto takes the newest whole one in output_dir or save.mirror_dir and says why it passed newer ones over. `anyway`:
    keys that may differ from those of its run. Raises UserError where DIR is no whole checkpoint, where there are
    checkpoints but none is whole, where the one found holds no optimizer, other weights than this run trains, or
    belongs to another run, and where `anyway` has a key that there isn't.
    """
    if resume == "never":
        return None
    found = _newest(recipe) if resume == "auto" else _opened(Path(resume))
    if isinstance(found, str):
        raise UserError(
            f"--resume {resume}: {found} Write the folder of a whole checkpoint, move the others away, or write "
            "`--resume never` to start anew."
        )
    if found is None:
        return None
    if found.manifest["run"].get("training.save_only_model"):
        raise UserError(
            f"--resume {resume}: {found.folder} holds no optimizer (training.save_only_model: true), so no run can go "
            "on from it. Name another output_dir, or write `--resume never` to start anew."
        )
    known = {*found.manifest["run"], *run_fingerprint(recipe), *(f"training.{name}" for name in training_fields())}
    for key in anyway:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            meant = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"--resume-anyway {key}: no key that a run can differ in from its checkpoint.{meant}")
    _refuse_other_weights(found, run_fingerprint(recipe))
    refuse_changes(found, found.manifest["run"], run_fingerprint(recipe), anyway)
    return found


def _refuse_other_weights(checkpoint: Checkpoint, now: Mapping[str, Any]) -> None:
    """Raise UserError where this run trains other weights than a checkpoint holds: no run can resume with that."""
    before = checkpoint.manifest["run"]
    if (before.get("adapter.r") is None) != (now.get("adapter.r") is None):
        keys = ["adapter"]
    else:
        keys = [key for key in changed_keys(before, now) if key in _WEIGHTS_OF_ADAPTER]
    if keys:
        differences = [f"{key} was {' and is '.join(_difference(before, now, key))}" for key in keys if "." in key]
        differences = differences or [f"it was trained {'in full' if 'adapter' in before else 'with an adapter'}"]
        raise UserError(
            f"--resume: {checkpoint.folder} can't be loaded into this run: {', '.join(keys)} decides which weights are "
            f"trained, and the checkpoint holds others ({'; '.join(differences)}). Change it back, or start anew with "
            "`--resume never` and another output_dir."
        )


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys that differ between two runs, harmless or not.

    What was made of the data is compared where both say it. Where a checkpoint tells the tokens of its rows, they are
    what is compared, with how often each source is seen: the same rows under another path, in other files or under
    another name of a template are no change.
    """
    keys = {key for key in before.keys() | now.keys() if not key.startswith("made.") or (key in before and key in now)}
    by_tokens = _tells_tokens(before)
    if not by_tokens:
        keys -= {"made.tokens"}  # an earlier version had names of caches there, which also changed with its own code
    if by_tokens and _weights(before) == _weights(now):
        keys -= _JUDGED_BY_TOKENS
    return sorted(key for key in keys if _compared(before, key) != _compared(now, key))


def _tells_tokens(facts: Mapping[str, Any]) -> bool:
    return "made.rows" in facts


def _weights(facts: Mapping[str, Any]) -> list[Any]:
    """Return how often each source is seen, and the share of the rows that is held out."""
    parts = (facts.get(key) for key in sorted(_JUDGED_BY_TOKENS))
    return [[source["weight"] for source in part] if isinstance(part, list) else part for part in parts]


def _compared(facts: Mapping[str, Any], key: str) -> Any:
    value = get_value(facts, key)
    if key in _IN_ANY_ORDER and isinstance(value, list):
        return sorted(value)
    return [{**part, "source": None} for part in value] if key == "made.tokens" else value


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Return what a key was and what it is, as text."""
    then, since = get_value(before, key), get_value(now, key)
    if key == "made.tokens":
        if len(then) != len(since):
            return f"{len(then)} sources", f"{len(since)} sources"
        pairs = [(old, new) for old, new in zip(then, since, strict=True) if old["digest"] != new["digest"]]
        texts = [(_counts(old), _counts(new)) for old, new in pairs]
        return (
            ", ".join(f"{old} in {pair[0]['source']}" for pair, (old, _) in zip(pairs, texts, strict=True)),
            ", ".join("as many others" if new == old else new for old, new in texts),
        )
    if key.startswith("made."):
        return then[:8], since[:8]
    return json.dumps(then, ensure_ascii=False), json.dumps(since, ensure_ascii=False)


def _counts(tokens: Mapping[str, Any]) -> str:
    return f"{tokens['rows']:,} rows of {tokens['tokens']:,} tokens ({tokens['trained_tokens']:,} trained)"


def refuse_changes(
    checkpoint: Checkpoint, before: Mapping[str, Any], now: Mapping[str, Any], anyway: Sequence[str]
) -> None:
    """Say what differs between the run of a checkpoint and this one.

    Raises UserError for differences that change what is computed, unless `anyway` names them.
    """
    changed = changed_keys(before, now)
    meaning = {key: f" ({_MEANING[key]})" if key in _MEANING else "" for key in changed}
    by_gain = chosen_by_gain(get_value(now, "training.metric_for_best_model"))
    harmless = RESUMABLE_CHANGES | ({"chat.template"} if _tells_tokens(before) else set())
    allowed = harmless | set(anyway)
    if not {"made.tokens", *_JUDGED_BY_TOKENS}.isdisjoint(anyway):
        allowed |= {"made.tokens"}
    if any(key.startswith(("data.", "made.")) or key in ("seed", *_BATCH) for key in anyway):
        allowed |= {"made.rows", "made.sequences"}  # they follow
    refused = [key for key in changed if key not in allowed and (by_gain or not key.startswith("system_gain."))]
    if refused:
        told = [
            f"{key} was {get_value(before, key)!r} and is {get_value(now, key)!r}{meaning[key]}"
            if not key.startswith("made.")
            else f"{key} was {' and is '.join(_difference(before, now, key))}{meaning[key]}"
            for key in refused
        ]
        raise UserError(
            f"--resume: {checkpoint.folder} belongs to another run: {'; '.join(told)}. Name "
            "another output_dir, change it back, write `--resume never` to start anew, or go on with the change: "
            f"{' '.join(f'--resume-anyway {key}' for key in refused)}."
        )
    if changed and is_first_rank():
        changes = ", ".join(f"{key} {' -> '.join(_difference(before, now, key))}" for key in changed)
        print(
            f"changed since {checkpoint.folder.name}: {changes} (in force from step {checkpoint.step + 1})", flush=True
        )


def get_run_date(checkpoint: Checkpoint | None) -> date:
    """Return the date that a run renders its rows with: that of its start, also where it goes on after midnight."""
    begun = checkpoint.manifest["run"].get("made.date") if checkpoint else None
    return date.fromisoformat(begun) if begun else date.today()


def check_distribution(checkpoint: Checkpoint, now: str) -> None:
    """Raise UserError where the states of the optimizer lie otherwise in the checkpoint than this run has them."""
    before = checkpoint.manifest["distribution"]
    if before != now:
        raise UserError(
            f"--resume: {checkpoint.folder} was written under {before}, and this run is launched as {now}: neither can "
            "read the other's optimizer. Launch with the configuration that the run began with (accelerate_configs), "
            "or name another output_dir; `--resume never` starts anew."
        )


def keep_sequences_per_step(recipe: Recipe, checkpoint: Checkpoint, anyway: Sequence[str], processes: int) -> Recipe:
    """The recipe with as many sequences a step as the checkpoint's run had, on the processes that there are now.

    Each step then has the very sequences that it would have had, but for the last of an epoch where they don't fill it:
    accelerate takes some from the front again, until each process has one. Sums are added up in another order, and
    dropout draws other numbers (a process that was not there begins with those of the seed): not to the bit.

    Raises UserError where that isn't possible, or where the recipe asks for other steps on as many processes.
    """
    wanted, were = int(checkpoint.manifest["sequences_per_step"]), int(checkpoint.manifest["processes"])
    now = sequences_per_step(recipe, processes)
    if now == wanted:
        return recipe
    if processes == were:
        named = [*anyway, _BATCH[1]] if _BATCH[0] in anyway else anyway
        refuse_changes(
            checkpoint, {_BATCH[1]: f"{wanted} sequences a step"}, {_BATCH[1]: f"{now} sequences a step"}, named
        )
        return recipe
    each = recipe.training.get("per_device_train_batch_size", training_fields()["per_device_train_batch_size"].default)
    accumulation, rest = divmod(wanted, each * processes)
    if rest:
        raise UserError(
            f"--resume: the run of {checkpoint.folder} had {wanted} sequences a step ({were} processes), which "
            f"{processes} processes of {each} at a time can't share evenly. Take a number of processes, or a "
            "training.per_device_train_batch_size, that divides it."
        )
    if is_first_rank():
        print(
            f"on {processes} processes in the place of {were}: training.gradient_accumulation_steps is {accumulation}, "
            f"so that a step has {wanted} sequences as before",
            flush=True,
        )
    training = {**recipe.training, "gradient_accumulation_steps": accumulation}
    changed = recipe.model_copy(update={"training": training})
    changed._origin = recipe._origin
    return changed


def _newest(recipe: Recipe) -> Checkpoint | str | None:
    """The newest whole checkpoint; why there is none, if there are some; None if there are none."""
    passed_over: list[str] = []
    for folder in list_checkpoints(recipe.output_dir, recipe.save.mirror_dir):
        opened = _opened(folder)
        if isinstance(opened, Checkpoint):
            if passed_over and is_first_rank():
                print(f"passed over: {' '.join(passed_over)}", flush=True)
            return opened
        passed_over.append(opened)
    return f"none of the checkpoints in {recipe.output_dir} is whole: {' '.join(passed_over)}" if passed_over else None


@contextmanager
def loading(folder: str | Path | None) -> Iterator[None]:
    """Raises UserError where what is loaded inside doesn't fit: --resume-anyway can name what no run can go on from."""
    try:
        yield
    except (ValueError, RuntimeError, LookupError) as fault:
        text = " ".join(str(fault).split())
        if isinstance(fault, RuntimeError) and "state_dict" not in text and "mismatch" not in text:
            raise  # of memory, or of another process
        raise UserError(
            f"--resume: {folder} can't be loaded into the model and optimizer that this run has: {text[:300]} Change "
            "back what --resume-anyway names, or write `--resume never` to start anew."
        ) from fault
