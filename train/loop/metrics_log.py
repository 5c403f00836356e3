"""Metrics log: a line on the screen and a JSON object in metrics.jsonl for each logging step, and the progress bar."""

import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.formatting import duration
from train.progress import ProgressBar, progress_bar
from train.ranks import is_first_rank
from train.recipe.measurements import SAMPLE_METRICS
from train.storage.atomic_write import atomic_write, write_text
from train.storage.jsonl import read_json_lines

_SHOWN = (
    *("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_system_gain"),
    *(f"eval_{metric}" for metric in SAMPLE_METRICS.values()),
)
"""Metrics of an evaluation that are printed."""


class StepLog(TrainerCallback):
    """Writes metrics.jsonl, prints a line per logging step, and advances the progress bar."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"
        self._open = ExitStack()
        self._job: ProgressBar | None = None
        self._evaluation: ProgressBar | None = None
        self._started = 0.0
        self._first_step = 0
        self._pending = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; after a resume, keep only the lines of the steps before the checkpoint."""
        self._started = time.monotonic()
        self._first_step = state.global_step
        if not is_first_rank():
            return
        kept = []
        if state.global_step:
            kept = [
                metrics
                for metrics in (read_json_lines(self.path) if self.path.exists() else [])
                if metrics["step"] <= state.global_step and "loaded_step" not in metrics
            ]
            kept = _restore_lost_lines(kept, state.log_history)
        with atomic_write(self.path) as [unfinished]:  # a full disk must not lose the existing lines
            write_text(unfinished, "".join(json.dumps(metrics) + "\n" for metrics in kept))
        self._job = self._open.enter_context(
            progress_bar("training", total=state.max_steps, unit="steps", done=state.global_step)
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the progress bar."""
        if self._job:
            self._job.advance(state.global_step - self._job.done)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the metrics, and print the most important of them."""
        if not logs or not is_first_rank() or "train_runtime" in logs:
            return
        metrics: dict[str, Any] = {"step": state.global_step, **logs}
        self._write(metrics)
        self.show(self._format_line(state, metrics))

    def show(self, line: str) -> None:
        """Print a line, above the progress bar."""
        if self._job:
            self._job.show(line)
        else:
            print(line, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step of the saved model if it is the best one and not the last."""
        if args.load_best_model_at_end and state.best_global_step and is_first_rank():
            self._write({"step": state.global_step, "loaded_step": state.best_global_step})

    def _write(self, metrics: dict[str, Any]) -> None:
        """Append a line. If that fails, keep it and write it with the next one: saving reports errors of the disk."""
        self._pending += json.dumps({key: _as_json(value) for key, value in metrics.items()}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(self._pending)
        except OSError as error:
            if not self._pending.startswith("\n"):  # after half a line, which readers skip
                self._pending = "\n" + self._pending
                print(
                    f"warning: {self.path} can't be written: {error.strerror}; its lines are kept in memory", flush=True
                )
        else:
            self._pending = ""

    def _format_line(self, state: TrainerState, metrics: dict[str, Any]) -> str:
        if "loss" not in metrics:
            shown = " ".join(f"{key} {metrics[key]:.4f}" for key in _SHOWN if key in metrics)
            return f"step {state.global_step}/{state.max_steps} {shown}"
        seconds_per_step = (time.monotonic() - self._started) / max(state.global_step - self._first_step, 1)
        left = duration(seconds_per_step * (state.max_steps - state.global_step))
        mfu = f"mfu {metrics['mfu']:.1%} " if "mfu" in metrics else ""
        return (
            f"step {state.global_step}/{state.max_steps} loss {metrics['loss']:.4f} "
            f"lr {metrics.get('learning_rate', 0):.2e} grad_norm {metrics.get('grad_norm', math.nan):.3f} "
            f"{metrics['tokens_per_second']:,.0f} tokens/s {mfu}{left} left"
        )

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the progress bar of the evaluation."""
        if self._job is None:
            return
        if self._evaluation is None:
            self._evaluation = self._job.part("evaluating", len(kwargs["eval_dataloader"]), "batches")
        self._evaluation.advance()

    def restart_clock(self) -> None:
        """Start the clock again: what came before the first step says nothing about the time left."""
        self._started = time.monotonic()

    def part(self, description: str, total: int, unit: str) -> ProgressBar | None:
        """Return a progress bar for a part of the evaluation; None on other ranks than the first."""
        return self._job.part(description, total, unit) if self._job else None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the progress bar of the evaluation."""
        if self._evaluation:
            self._evaluation.finish()
            self._evaluation = None

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the terminal, also after an error."""
        self._open.close()
        self._job = None


def _restore_lost_lines(kept: list[dict[str, Any]], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `kept` with the lines of the checkpoint's history that it lacks: lost in a crash, or in another folder."""

    def key(metrics: dict[str, Any]) -> tuple[int, bool]:
        return metrics["step"], "loss" in metrics

    present = {key(metrics) for metrics in kept}
    restored = [
        {"step": logged["step"], **{name: _as_json(value) for name, value in logged.items() if name != "step"}}
        for logged in history
        if key(logged) not in present and "train_runtime" not in logged
    ]
    return sorted(kept + restored, key=lambda line: (line["step"], "loss" not in line)) if restored else kept


def _as_json(value: Any) -> Any:
    """Return `value` for JSON: NaN and infinities as strings, as JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
