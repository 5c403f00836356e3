"""Stopping in good time: a signal, a stop file or the end of the job is seen by all processes, which save and leave.

Slurm signals the batch script, whose trap touches a file; nothing signals the elastic agent, which would kill its
workers half a minute later (pytorch#119856). Whatever one process sees, all agree on before any of them acts, at each
step and inside evaluation (a flag that evaluation never looks at is lost for as long as it takes).
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.errors import UserError
from train.loop.time_limit import seconds_of, time_conflicts
from train.ranks import is_first_rank
from train.recipe import SaveSection

STOP = "stop"
"""A file of this name in output_dir, or `stop-<SLURM_JOB_ID>`, asks the run to save and stop."""
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_SECONDS_BETWEEN_LOOKS = 1.0


class StopError(Exception):
    """Raised inside an evaluation that is given up as the run has to stop."""


class StopWhenAsked(TrainerCallback):
    """Has a run save and stop where any of its processes is asked to."""

    def __init__(self, preemption: "Preemption", accelerator: Accelerator) -> None:
        self._preemption, self._accelerator = preemption, accelerator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on there is something to save."""
        self._preemption.step, self._preemption.training = state.global_step, True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All that a checkpoint would hold is in the last one, or in the finished model."""
        self._preemption.training = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop here; where an epoch ends with the step, after what is due then. The last step of all ends by itself."""
        self._preemption.step = state.global_step
        if self._preemption.all_asked and state.global_step < state.max_steps:
            self._preemption.agree()
            self._stop(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch that is broken off has no end at which anything would be due."""
        if self._preemption.reason and state.epoch is not None and state.epoch != int(state.epoch):
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._preemption.reason:
            self._stop(control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises StopError in an evaluation that has to be given up: on all processes, at the same batch."""
        asked = torch.tensor(float(self._preemption.asked()), device=self._accelerator.device)
        if self._accelerator.reduce(asked).item() and state.global_step < state.max_steps:
            self._preemption.agree()
            raise StopError

    def _stop(self, control: TrainerControl) -> None:
        control.should_save = control.should_training_stop = True


class Preemption:
    """What asks this process to stop."""

    def __init__(self, output_dir: str, settings: SaveSection, step: int = 0) -> None:
        """The clock of `save.time_limit` starts now. `step`: where the run goes on.

        Raises UserError where that time would be over before the first step.
        """
        for conflict in time_conflicts(settings):
            raise UserError(conflict)
        job = os.environ.get("SLURM_JOB_ID")
        self._files = [Path(output_dir) / name for name in (STOP, f"{STOP}-{job}" if job else STOP)]
        ends = [float(os.environ["SLURM_JOB_END_TIME"])] if os.environ.get("SLURM_JOB_END_TIME", "").isdigit() else []
        if settings.time_limit is not None:
            ends.append(time.time() + seconds_of(settings.time_limit))
        self._deadline = min(ends) - settings.seconds_before_end if ends else None
        self._started = time.time()
        self._signal: str | None = None
        self._looked = 0.0
        self._seen: str | None = None
        self.all_asked = False
        """Whether any process was asked, as of the last step."""
        self.reason: str | None = None
        """Why the run stops, once all processes agree on it."""
        self.step = step
        """Optimizer steps that are done."""
        self.training = False
        """Whether there is something to save: before training, and after it, Ctrl-C stops at once."""
        self.ended = False
        """True once the run is over and its end is being recorded: Ctrl-C would lose that."""

    @contextmanager
    def watching(self) -> Iterator["Preemption"]:
        """Take signals as long as the block runs: the first asks to stop, a second Ctrl-C stops at once."""
        general = self._files[0]
        if is_first_rank() and general.exists() and general.stat().st_mtime < self._started:
            general.unlink(missing_ok=True)  # it was for a run before this one
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.ended:
                return
            if self._signal is not None or not self.training:
                raise KeyboardInterrupt
            if is_first_rank():
                print("\nstopping after this step, with a checkpoint; Ctrl-C again stops now", flush=True)
        self._signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def asked(self) -> bool:
        """Whether anything asks this process to stop. Looks at files and the clock once a second."""
        if self._seen is None:
            self._seen = self._signal
        if self._seen is None and time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            found = next((path.name for path in self._files if path.exists()), None)
            if found:
                self._seen = f"the file {found}"
            elif self._deadline is not None and time.time() >= self._deadline:
                self._seen = "the end of the time"
        return self._seen is not None

    def agree(self) -> None:
        """All processes stop now. The first one says why, and takes away the file that asked for it."""
        self._looked = -_SECONDS_BETWEEN_LOOKS
        self.asked()  # another process may have looked at the files first, and the batch script asks which one it was
        self.reason = self._seen or "another process was asked to"
        if is_first_rank():
            print(f"stopping: {self.reason}", flush=True)
            for path in self._files:
                path.unlink(missing_ok=True)
