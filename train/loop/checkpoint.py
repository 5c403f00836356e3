"""Which checkpoint a run goes on from: only one that says of itself that it was written to the end."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.errors import UserError
from train.progress import is_first_rank
from train.recipe import Recipe

COMPLETE = "COMPLETE.json"


class MarkComplete(TrainerCallback):
    """Writes COMPLETE.json into a checkpoint once all else of it is there, with the recipe that it belongs to."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = _decides_the_run(recipe)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by transformers on every rank when a checkpoint has been written."""
        args.distributed_state.wait_for_everyone()
        if not is_first_rank():
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        unfinished = folder / f"{COMPLETE}.unfinished"
        unfinished.write_text(json.dumps({"step": state.global_step, "recipe": self._recipe}) + "\n", encoding="utf-8")
        unfinished.rename(folder / COMPLETE)


def _decides_the_run(recipe: Recipe) -> dict[str, Any]:
    """The dotted keys of the recipe that a run can't change half-way, with their values as JSON has them."""
    sections = recipe.model_dump(mode="json", exclude={"output_dir", "tracking", "guards"})
    flat = {}
    for section, values in sections.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            flat[f"{section}.{key}".rstrip(".")] = value
    return flat


def find_checkpoint(resume: str, recipe: Recipe) -> Path | None:
    """The checkpoint that `--resume auto|never|DIR` means; None to start from the beginning.

    Raises UserError where DIR is no complete checkpoint, where there are checkpoints but none is complete, or where
    the one found is damaged, holds no optimizer or belongs to another recipe.
    """
    found = _find(resume, recipe.output_dir)
    if found is None:
        return None
    _refuse_damaged(found, resume)
    before = json.loads((found / COMPLETE).read_text(encoding="utf-8")).get("recipe", {})
    if before.get("training.save_only_model"):
        raise UserError(
            f"--resume {resume}: {found} holds no optimizer (training.save_only_model: true), so no run can go on from "
            "it. Name another output_dir, or write `--resume never` to start anew."
        )
    now = _decides_the_run(recipe)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        differences = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise UserError(
            f"--resume {resume}: {found} belongs to another recipe: {differences}. Name another output_dir, change the "
            "recipe back, or write `--resume never` to start anew."
        )
    return found


def _refuse_damaged(checkpoint: Path, resume: str) -> None:
    """Raise UserError for a file that was cut short: told by its ends, without reading the weights."""
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                raise ValueError("not what torch.save writes")
        except (OSError, ValueError, SafetensorError) as fault:
            raise UserError(
                f"--resume {resume}: {path} is damaged: {fault}. Take {checkpoint} away to go on from an older "
                "checkpoint, or write `--resume never` to start anew."
            ) from fault


def _find(resume: str, output_dir: str) -> Path | None:
    if resume == "never":
        return None
    if resume != "auto":
        if not (Path(resume) / COMPLETE).is_file():
            raise UserError(
                f"--resume {resume}: no complete checkpoint is there (it would hold {COMPLETE}). Write `auto`, `never` "
                "or the folder of a complete checkpoint."
            )
        return Path(resume)
    found = sorted(Path(output_dir).glob("checkpoint-*"), key=_step, reverse=True)
    complete = [folder for folder in found if (folder / COMPLETE).is_file()]
    if found and not complete:
        raise UserError(
            f"--resume auto: {output_dir} holds checkpoints, but none that was written to the end "
            f"({', '.join(folder.name for folder in found)}). Move them away, or write `--resume never` to start anew."
        )
    return complete[0] if complete else None


def _step(folder: Path) -> int:
    number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(number[1]) if number else -1
