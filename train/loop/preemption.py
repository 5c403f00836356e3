"""Preemption: on a signal, a stop file or the end of the job's time, all processes save a checkpoint and stop.

Slurm signals the batch script, whose trap creates the stop file. Nothing signals the elastic agent, which would kill
its workers half a minute later (pytorch#119856). The processes agree before any of them acts: `preemption_callback.py`.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from train.errors import UserError
from train.loop.time_limit import parse_time_limit, time_conflicts
from train.ranks import is_first_rank
from train.recipe import SaveSection

STOP = "stop"
"""Name of the stop file in output_dir; also `stop-<SLURM_JOB_ID>`."""
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_POLL_SECONDS = 1.0


class Preemption:
    """Requests to stop that this process has received, and the decision of all processes."""

    def __init__(self, output_dir: str, settings: SaveSection, step: int = 0) -> None:
        """Start the clock of `save.time_limit`. `step`: the one that the run resumes from.

        Raises UserError if that time would be over before the first step.
        """
        for conflict in time_conflicts(settings):
            raise UserError(conflict)
        job = os.environ.get("SLURM_JOB_ID")
        self._files = [Path(output_dir) / name for name in (STOP, f"{STOP}-{job}" if job else STOP)]
        ends = [float(os.environ["SLURM_JOB_END_TIME"])] if os.environ.get("SLURM_JOB_END_TIME", "").isdigit() else []
        if settings.time_limit is not None:
            ends.append(time.time() + parse_time_limit(settings.time_limit))
        self._deadline = min(ends) - settings.seconds_before_end if ends else None
        self._started = time.time()
        self._signal: str | None = None
        self._last_poll = 0.0
        self._request: str | None = None
        self.requested_on_any_rank = False
        """True if any process had a request at the last step."""
        self.reason: str | None = None
        """Reason of the stop, once all processes agree on it."""
        self.step = step
        """Optimizer steps done."""
        self.training = False
        """True while there is something to save: before training and after it, Ctrl-C stops at once."""
        self.ended = False
        """True if the run is over and its outcome is being recorded, which Ctrl-C must not interrupt."""

    @contextmanager
    def watching(self) -> Iterator["Preemption"]:
        """Handle signals inside the block: the first one requests a stop, a second Ctrl-C stops at once."""
        general = self._files[0]
        if is_first_rank() and general.exists() and general.stat().st_mtime < self._started:
            general.unlink(missing_ok=True)  # for an earlier run
        handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.ended:
                return
            if self._signal is not None or not self.training:
                raise KeyboardInterrupt
            if is_first_rank():
                print("\nstopping after this step, with a checkpoint; Ctrl-C again stops now", flush=True)
        self._signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def is_requested(self) -> bool:
        """Return whether this process is asked to stop. Files and the clock are polled once a second."""
        if self._request is None:
            self._request = self._signal
        if self._request is None and time.monotonic() - self._last_poll >= _POLL_SECONDS:
            self._last_poll = time.monotonic()
            file = next((path.name for path in self._files if path.exists()), None)
            if file:
                self._request = f"the file {file}"
            elif self._deadline is not None and time.time() >= self._deadline:
                self._request = "the end of the time"
        return self._request is not None

    def agree(self) -> None:
        """Note that all processes stop now. The first one prints the reason and deletes the stop files."""
        self._last_poll = -_POLL_SECONDS
        self.is_requested()  # another process may have seen the file first, and the batch script needs the reason
        self.reason = self._request or "a request to another process"
        if is_first_rank():
            print(f"stopping: {self.reason}", flush=True)
            for path in self._files:
                path.unlink(missing_ok=True)
