"""Guards of training: skip non-finite steps and report loss spikes with their rows.

A gradient that is not finite would make every weight so, and a mean hides it (trl#6702). Here such a step changes no
weight, and the rows of its batch are reported. DeepSpeed and the float16 scaler skip the step themselves. Both guards
use numbers that the step has computed anyway, once a step.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import ProcessGroup, all_reduce

from train.errors import UserError
from train.loop.batch_info import BatchInfo
from train.loop.output_dir import SUSPECTS
from train.ranks import is_first_rank
from train.recipe import GuardsSection

_MAX_RECENT, _MIN_RECENT = 64, 16
"""Steps that a loss is compared with, at most and at least."""
_MAX_WRITTEN, _MAX_SHOWN = 16, 3
"""Rows of a process in the file, and rows of all processes in the log line."""
_DEVIATION = 1.4826
"""Standard deviation of a normal distribution divided by its median absolute deviation."""


@dataclass(frozen=True)
class SuspectRow:
    """A row of a reported batch.

    `place`: file and line. `loss`: mean over its trained tokens in nats; a string if it is not finite, as JSON has no
    such numbers.
    """

    place: str
    loss: float | str


@dataclass(frozen=True)
class Suspect:
    """A reported step of one process. `loss`: mean of its rows; `usual`: median of its recent steps."""

    step: int
    kind: str
    loss: float | str
    usual: float | None
    rows: list[SuspectRow]


class Guards:
    """Both guards of one process."""

    def __init__(
        self,
        settings: GuardsSection,
        accelerator: Accelerator,
        places: Callable[[int], list[str]],
        output_dir: str,
    ) -> None:
        """Begin without losses. `places`: returns file and line of each document of a sequence, by its index."""
        self._settings, self._accelerator, self._places = settings, accelerator, places
        self._file = Path(output_dir) / SUSPECTS
        self._batches: list[tuple[BatchInfo, torch.Tensor, torch.Tensor]] = []
        self._recent: deque[float] = deque(maxlen=_MAX_RECENT)
        self._spikes: list[Suspect] = []
        self._consecutive_skips = 0

    def state(self) -> list[float]:
        """Return the losses that a step is compared with, for a checkpoint."""
        return list(self._recent)

    def load(self, recent: Sequence[float]) -> None:
        """Continue from these losses."""
        self._recent.extend(recent)

    @property
    def unreported_spikes(self) -> int:
        """Return the number of spikes of this process's loss that are not reported yet."""
        return len(self._spikes)

    def add(self, batch: BatchInfo, losses: torch.Tensor, has_loss: torch.Tensor) -> None:
        """Note a micro-batch.

        Args:
            batch: its contents.
            losses: of its tokens in nats, [rows, tokens - 1]; of a shared batch the part of this process.
            has_loss: whether a token has a loss, of the same shape.
        """
        self._batches.append((batch, losses.detach(), has_loss))

    def loss_sum(self, group: ProcessGroup | None = None) -> torch.Tensor:
        """Return the loss of this process's batches of the step in nats: float64, on the device.

        `group`: processes that share these batches, all of which must call this.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self._accelerator.device)
        loss = sum((losses.sum(dtype=torch.float64) for _, losses, _ in self._batches), zero)
        if group is not None:
            all_reduce(loss, group=group)
        return loss

    def check_step(self, step: int, judged: float, loss_sum: float) -> bool:
        """Return whether the gradients of a step are finite. If not, report its rows on all processes.

        All processes must call it.

        Args:
            step: number of the step.
            judged: a number that is equal on all processes, and not finite if the gradients aren't.
            loss_sum: that of this process.

        Raises UserError, on each process, after too many consecutive steps that are not finite.
        """
        mean = loss_sum / max(sum(batch.trained_tokens for batch, _, _ in self._batches), 1)
        if math.isfinite(judged):
            self._consecutive_skips = 0
            self._compare(step, mean)
            self._batches.clear()
            return True
        self._consecutive_skips += 1
        self._report(
            [Suspect(step, "not finite", _as_json(mean), None, self._rank_rows(only_broken=not math.isfinite(mean)))]
        )
        self._batches.clear()
        if self._consecutive_skips >= self._settings.non_finite_steps:
            raise UserError(
                f"training: the gradients of {format_steps(self._consecutive_skips)} were not finite; the last was "
                f"step {step}. Their rows are in {self._file}; these steps changed no weight. Inspect the rows, lower "
                "training.learning_rate, use bfloat16 instead of float16, or allow more such steps: "
                "guards.non_finite_steps."
            )
        return False

    def report_spikes(self) -> None:
        """Report the batches of spikes that are not reported yet. All processes must call it."""
        self._report(self._spikes)
        self._spikes = []

    def _compare(self, step: int, mean: float) -> None:
        """Compare the loss of a step with the recent ones."""
        limit = self._settings.loss_spike
        if limit is not None and len(self._recent) >= _MIN_RECENT:
            usual = statistics.median(self._recent)
            deviation = _DEVIATION * statistics.median(abs(loss - usual) for loss in self._recent)
            if mean - usual > limit * deviation and deviation > 0:
                self._spikes.append(Suspect(step, "spike", mean, usual, self._rank_rows(only_broken=False)))
        self._recent.append(mean)

    def _rank_rows(self, *, only_broken: bool) -> list[SuspectRow]:
        """Return the step's rows, the highest losses first; with `only_broken`, those that are not finite."""
        documents: list[tuple[float, BatchInfo, int]] = []
        for batch, losses, has_loss in self._batches:
            values, counts = losses.double().cpu().numpy(), has_loss.cpu().numpy()
            ends = np.cumsum(batch.documents) - batch.first_token
            for number, (end, length) in enumerate(zip(ends, batch.documents, strict=True)):
                packed = len(values) < len(batch.documents)  # into one row; a document's first token has no loss
                part = (0, slice(max(end - length, 0), max(end - 1, 0))) if packed else (number, slice(None))
                if length > 1 and not counts[part].any():  # its tokens are elsewhere, or a rejected answer
                    continue
                documents.append((values[part].sum() / max(counts[part].sum(), 1), batch, number))
        broken = [document for document in documents if not math.isfinite(document[0])]
        if only_broken:  # where processes share a batch, perhaps only on others
            documents = broken
        documents.sort(key=lambda document: -math.inf if math.isnan(document[0]) else -document[0])
        return [
            SuspectRow(self._find_place(batch, number), _as_json(float(loss)))
            for loss, batch, number in documents[:_MAX_WRITTEN]
        ]

    def _find_place(self, batch: BatchInfo, document: int) -> str:
        return [place for sequence in batch.sequences for place in self._places(sequence)][document]

    def _report(self, suspects: list[Suspect]) -> None:
        """Write and print the suspects of all processes, those of one step together."""
        gathered: list[Suspect] = gather_object(suspects)
        if not is_first_rank():
            return
        broken = {suspect.step for suspect in gathered if isinstance(suspect.loss, str)}
        # where a step is broken on one process, the rows of the others are sound
        reported = [suspect for suspect in gathered if suspect.step not in broken or isinstance(suspect.loss, str)]
        with self._file.open("a", encoding="utf-8") as lines:
            for suspect in reported:
                lines.write(json.dumps(asdict(suspect), ensure_ascii=False) + "\n")
        for step in sorted({suspect.step for suspect in reported}):
            print(_format_step([suspect for suspect in reported if suspect.step == step]), flush=True)


def format_steps(number: int) -> str:
    """Return `1 step`, `3 consecutive steps`."""
    return "1 step" if number == 1 else f"{number} consecutive steps"


def _format_step(suspects: list[Suspect]) -> str:
    """Return the line for one step."""
    first = suspects[0]
    rows = sorted((row for suspect in suspects for row in suspect.rows), key=_sort_key, reverse=True)
    shown = ", ".join(f"{row.place} ({_format_loss(row.loss)})" for row in rows[:_MAX_SHOWN])
    event = (
        f"the loss jumped to {_format_loss(first.loss)} (usual: {_format_loss(first.usual)})"
        if first.kind == "spike"
        else "the gradients are not finite, so no weight was changed"
    )
    return f"step {first.step}: {event}; its rows by loss: {shown}; more in {SUSPECTS}"


def _sort_key(row: SuspectRow) -> float:
    return math.inf if isinstance(row.loss, str) else row.loss


def _format_loss(loss: float | str | None) -> str:
    return f"{loss:.3f}" if isinstance(loss, float) else str(loss)


def _as_json(loss: float) -> float | str:
    return loss if math.isfinite(loss) else str(loss)
