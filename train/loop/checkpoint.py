"""Which checkpoint a run goes on from: only one that says of itself that it was written to the end."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.errors import UserError
from train.progress import is_first_rank

COMPLETE = "COMPLETE.json"


class MarkComplete(TrainerCallback):
    """Writes COMPLETE.json into a checkpoint once all else of it is there."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by transformers on every rank when a checkpoint has been written."""
        args.distributed_state.wait_for_everyone()
        if not is_first_rank():
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        unfinished = folder / f"{COMPLETE}.unfinished"
        unfinished.write_text(json.dumps({"step": state.global_step}) + "\n", encoding="utf-8")
        unfinished.rename(folder / COMPLETE)


def find_checkpoint(resume: str, output_dir: str) -> Path | None:
    """The checkpoint that `--resume auto|never|DIR` means; None to start from the beginning.

    Raises UserError where DIR is no complete checkpoint, or where there are checkpoints but none is complete.
    """
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
