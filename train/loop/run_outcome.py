"""Run outcome: how the last run in output_dir ended (outcome.json), and each attempt before it (attempts.jsonl).

Exit codes don't survive `accelerate launch`; the batch script and a later start read these files.
"""

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.loop.checkpoint.manifest import list_complete_checkpoints
from train.loop.checkpoint.run_inputs import describe_by_samples, list_files_beside_weights
from train.loop.output_dir import ATTEMPTS, OUTCOME
from train.ranks import is_first_rank
from train.storage.atomic_write import atomic_write, write_text
from train.storage.jsonl import read_json_lines

if TYPE_CHECKING:
    from train.loop.preemption import Preemption


def newest_checkpoint(*parents: str | Path | None) -> Path | None:
    """Return the newest complete checkpoint in these folders."""
    return next(iter(list_complete_checkpoints(*parents)), None)


@contextmanager
def record_run_outcome(
    output_dir: str,
    preemption: "Preemption",
    user_fixable_errnos: Collection[int] = (),
    fingerprint: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Record how the block ended. It belongs inside `preemption.watching()`: Ctrl-C must not interrupt the record.

    - finished
    - preempted: saved and stopped
    - interrupted: Ctrl-C, without saving
    - failed: UserError, or an OSError with one of `user_fixable_errnos`; the same attempt would fail again
    - crashed: any other error, after which another attempt may succeed

    `fingerprint`: of the inputs, recorded if the run has finished.
    """
    _append_attempt(output_dir, {"from_step": preemption.step, "time": time.time()}, first=preemption.step == 0)
    if is_first_rank():
        with suppress(OSError):
            Path(output_dir, OUTCOME).unlink(missing_ok=True)  # of an earlier run
    try:
        yield
        outcome, reason = ("preempted", preemption.reason) if preemption.reason else ("finished", None)
        preemption.ended = True
    except KeyboardInterrupt:
        preemption.ended = True
        newest = newest_checkpoint(output_dir)
        kept = f"the newest complete checkpoint is {newest.name}" if newest else "there is no complete checkpoint"
        _write_outcome(output_dir, "interrupted", preemption.step, f"Ctrl-C; {kept}")
        raise
    except BaseException as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        user_fixable = isinstance(error, UserError) or getattr(error, "errno", None) in user_fixable_errnos
        _write_outcome(output_dir, "failed" if user_fixable else "crashed", preemption.step, first_line)
        raise
    finished = outcome == "finished" and is_first_rank()
    details = {**(fingerprint or {}), **describe_results(output_dir)} if finished else {}
    _write_outcome(output_dir, outcome, preemption.step, reason, details)


def describe_results(output_dir: str | Path) -> dict[str, Any]:
    """Return what a later start checks: the weights of a finished run, files beside them, the newest checkpoint."""
    newest = newest_checkpoint(output_dir)
    return {
        "weights": {path.name: describe_by_samples(path) for path in sorted(Path(output_dir).glob("*.safetensors"))},
        "beside weights": list_files_beside_weights(Path(output_dir)),
        "checkpoint": newest and newest.name,
    }


def read_restarts(output_dir: str | Path) -> list[tuple[int, str]]:
    """Return the restarts of the run in this folder: the first step of each, and how the attempt before it ended."""
    restarts: list[tuple[int, str]] = []
    ending = "killed"
    try:
        lines = read_json_lines(Path(output_dir, ATTEMPTS))
    except OSError:
        return []
    for number, line in enumerate(lines):
        if "outcome" in line:
            reason = f": {line['reason']}" if line["reason"] else ""
            ending = f"{line['outcome']} at step {line['step']}{reason}"
        else:
            if number:
                restarts.append((line["from_step"], ending))
            ending = "killed"
    return restarts


def print_resume_hint(output_dir: Path) -> None:
    """Print where the next start of a stopped run begins: its last line."""
    if is_first_rank():
        newest = newest_checkpoint(output_dir)
        start = f"continues from {newest}" if newest else "starts from the beginning"
        print(f"stopped; the same command {start}", flush=True)


def _write_outcome(
    output_dir: str, outcome: str, step: int, reason: str | None, details: Mapping[str, Any] | None = None
) -> None:
    """Write OUTCOME and the last line of ATTEMPTS. `details`: only in OUTCOME."""
    if not is_first_rank():
        return
    line: dict[str, Any] = {
        "outcome": outcome, "step": step, "reason": reason, "job": os.environ.get("SLURM_JOB_ID"), "time": time.time(),
    }  # fmt: skip
    with suppress(OSError), atomic_write(Path(output_dir) / OUTCOME) as [staged]:  # a full disk has its own error
        write_text(staged, json.dumps({**line, **(details or {})}) + "\n")
    _append_attempt(output_dir, line)


def _append_attempt(output_dir: str, line: Mapping[str, Any], *, first: bool = False) -> None:
    """Append a line to ATTEMPTS. `first`: replace the lines of another run."""
    if not is_first_rank():
        return
    with suppress(OSError), Path(output_dir, ATTEMPTS).open("w" if first else "a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
