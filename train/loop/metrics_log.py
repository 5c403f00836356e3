"""Step log of a run: a printed line and a JSON object in metrics.jsonl for each logging step."""

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
from train.storage.atomic_write import atomic_write, write_text
from train.storage.jsonl import read_metrics


class StepLog(TrainerCallback):
    """Writes metrics.jsonl and a line a logging step, and moves the progress bar."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"
        self._open = ExitStack()
        self._job: ProgressBar | None = None
        self._evaluation: ProgressBar | None = None
        self._started = 0.0
        self._first_step = 0
        self._unwritten = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; after a resume, keep the lines of the steps that the checkpoint holds, and those alone."""
        self._started = time.monotonic()
        self._first_step = state.global_step
        if not is_first_rank():
            return
        kept = []
        if state.global_step:
            kept = [
                metrics
                for metrics in (read_metrics(self.path) if self.path.exists() else [])
                if metrics["step"] <= state.global_step and "loaded_step" not in metrics
            ]
            kept = _with_lost_lines(kept, state.log_history)
        with atomic_write(self.path) as [unfinished]:  # a full disk must not cost the lines that were there
            write_text(unfinished, "".join(json.dumps(metrics) + "\n" for metrics in kept))
        self._job = self._open.enter_context(
            progress_bar("training", total=state.max_steps, unit="steps", done=state.global_step)
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
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
        """Write what was logged, and show the little of it that a person follows."""
        if not logs or not is_first_rank() or "train_runtime" in logs:
            return
        metrics: dict[str, Any] = {"step": state.global_step, **logs}
        self._write(metrics)
        line = self._line(state, metrics)
        if self._job:
            self._job.show(line)
        else:
            print(line, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step of the model that is saved, where it is the best one and not the last."""
        if args.load_best_model_at_end and state.best_global_step and is_first_rank():
            self._write({"step": state.global_step, "loaded_step": state.best_global_step})

    def _write(self, metrics: dict[str, Any]) -> None:
        """Append a line; where the disk is full or gone, with the next one: saving says what becomes of it."""
        self._unwritten += json.dumps({key: _plain(value) for key, value in metrics.items()}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(self._unwritten)
        except OSError as fault:
            if not self._unwritten.startswith("\n"):  # after half a line, which is passed over
                self._unwritten = "\n" + self._unwritten
                print(f"warning: {self.path} can't be written: {fault.strerror}; its lines are kept", flush=True)
        else:
            self._unwritten = ""

    def _line(self, state: TrainerState, metrics: dict[str, Any]) -> str:
        if "loss" not in metrics:
            shown = " ".join(f"{key} {metrics[key]:.4f}" for key in ("eval_loss", "eval_system_gain") if key in metrics)
            return f"step {state.global_step}/{state.max_steps} {shown}"
        seconds_a_step = (time.monotonic() - self._started) / max(state.global_step - self._first_step, 1)
        left = duration(seconds_a_step * (state.max_steps - state.global_step))
        mfu = f"mfu {metrics['mfu']:.1%} " if "mfu" in metrics else ""
        return (
            f"step {state.global_step}/{state.max_steps} loss {metrics['loss']:.4f} "
            f"lr {metrics.get('learning_rate', 0):.2e} grad_norm {metrics.get('grad_norm', math.nan):.3f} "
            f"{metrics['tokens_per_second']:,.0f} tokens/s {mfu}{left} left"
        )

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far the evaluation is."""
        if self._job is None:
            return
        if self._evaluation is None:
            self._evaluation = self._job.part("evaluating", len(kwargs["eval_dataloader"]), "batches")
        self._evaluation.advance()

    def part(self, description: str, total: int, unit: str) -> ProgressBar | None:
        """The progress of a part of the evaluation, below that of training; None where this process shows none."""
        return self._job.part(description, total, unit) if self._job else None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the evaluation's bar away."""
        if self._evaluation:
            self._evaluation.finish()
            self._evaluation = None

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the terminal as it was, also after an error."""
        self._open.close()
        self._job = None


def _with_lost_lines(kept: list[dict[str, Any]], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`kept`, and what the checkpoint knows besides: lines that a crash took, or that are in another folder."""

    def what(metrics: dict[str, Any]) -> tuple[int, bool]:
        return metrics["step"], "loss" in metrics

    there = {what(metrics) for metrics in kept}
    lost = [
        {"step": logged["step"], **{key: _plain(value) for key, value in logged.items() if key != "step"}}
        for logged in history
        if what(logged) not in there and "train_runtime" not in logged
    ]
    return sorted(kept + lost, key=lambda metrics: (metrics["step"], "loss" not in metrics)) if lost else kept


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become strings, as JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
