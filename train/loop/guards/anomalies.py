"""What keeps a run from going on with broken numbers: steps that aren't finite are left out, loss spikes are named.

A gradient that is not finite makes every weight so, and a mean hides it (trl#6702). Here such a step changes no weight,
and the rows of its batch are named: a person can look at them. DeepSpeed and a scaler of float16 leave the step out
themselves. Both guards look at numbers that the step has computed anyway, once a step.
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

from train.errors import UserError
from train.loop.output_dir import SUSPECTS
from train.loop.throughput import BatchInfo
from train.ranks import is_first_rank
from train.recipe import GuardsSection

_RECENT, _ENOUGH = 64, 16
"""Steps that a loss is compared with, at most and at least."""
_NAMED, _SHOWN = 16, 3
"""Rows of a process that are written down, and rows of all that are shown."""
_DEVIATION = 1.4826
"""Of a normal distribution's standard deviation to its median absolute deviation."""


@dataclass(frozen=True)
class Row:
    """A row of a suspicious batch. `loss`: mean over its trained tokens in nats; a string where JSON has no number."""

    place: str
    loss: float | str


@dataclass(frozen=True)
class Suspect:
    """A step that a guard named. `loss`: of the process's own rows; `usual`: the median of its recent steps."""

    step: int
    kind: str
    loss: float | str
    usual: float | None
    rows: list[Row]


class Guards:
    """Both guards of one process."""

    def __init__(
        self,
        settings: GuardsSection,
        accelerator: Accelerator,
        places: Callable[[int], list[str]],
        output_dir: str,
    ) -> None:
        """`places`: where each document of a sequence stands, by the sequence's index."""
        self._settings, self._accelerator, self._places = settings, accelerator, places
        self._file = Path(output_dir) / SUSPECTS
        self._batches: list[tuple[BatchInfo, torch.Tensor, torch.Tensor]] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._spikes: list[Suspect] = []
        self._not_finite = 0  # steps, in a row

    def state(self) -> list[float]:
        """The losses that a step is compared with, for a checkpoint."""
        return list(self._recent)

    def load(self, recent: Sequence[float]) -> None:
        """Go on from these losses."""
        self._recent.extend(recent)

    @property
    def spikes(self) -> int:
        """Jumps of this process's loss that were not told yet."""
        return len(self._spikes)

    def add(self, held: BatchInfo, losses: torch.Tensor, counted: torch.Tensor) -> None:
        """Note a micro-batch. `losses`: of its tokens in nats, [rows, tokens - 1]; `counted`: which have one."""
        self._batches.append((held, losses.detach(), counted))

    def loss_sum(self) -> torch.Tensor:
        """Of this process's part of the step, in nats: float64, on the device."""
        nothing = torch.zeros((), dtype=torch.float64, device=self._accelerator.device)
        return sum((losses.sum(dtype=torch.float64) for _, losses, _ in self._batches), nothing)

    def finite(self, step: int, judged: float, loss_sum: float) -> bool:
        """Whether this step's gradients are. Where they are not, all processes tell the rows of it.

        `judged`: a number that all processes have alike, not finite where the gradients aren't. `loss_sum`: of this
        process. All processes must call it. Raises UserError, on each, where too many steps in a row are not finite.
        """
        mean = loss_sum / max(sum(held.trained_tokens for held, _, _ in self._batches), 1)
        if math.isfinite(judged):
            self._not_finite = 0
            self._watch(step, mean)
            self._batches.clear()
            return True
        self._not_finite += 1
        self._tell([Suspect(step, "not finite", _plain(mean), None, self._rows(only_broken=True))])
        self._batches.clear()
        if self._not_finite >= self._settings.non_finite_steps:
            raise UserError(
                f"training: {counted_steps(self._not_finite)} whose gradients were not finite, the last of them step "
                f"{step}. Their rows are in {self._file}; no weight was changed by them. Look at those rows, take a "
                "smaller training.learning_rate or bfloat16 in the place of float16, or allow more such steps: "
                "guards.non_finite_steps."
            )
        return False

    def _watch(self, step: int, mean: float) -> None:
        """Compare a step's loss with the recent ones."""
        limit = self._settings.loss_spike
        if limit is not None and len(self._recent) >= _ENOUGH:
            usual = statistics.median(self._recent)
            deviation = _DEVIATION * statistics.median(abs(loss - usual) for loss in self._recent)
            if mean - usual > limit * deviation and deviation > 0:
                self._spikes.append(Suspect(step, "spike", mean, usual, self._rows(only_broken=False)))
        self._recent.append(mean)

    def tell_spikes(self) -> None:
        """Name the batches of jumps that were not told yet. All processes must call it."""
        self._tell(self._spikes)
        self._spikes = []

    def _rows(self, *, only_broken: bool) -> list[Row]:
        """The step's rows, the highest losses first; where some are not finite and `only_broken`, those alone."""
        found: list[tuple[float, BatchInfo, int]] = []
        for held, losses, counted in self._batches:
            values, have_one = losses.double().cpu().numpy(), counted.cpu().numpy()
            ends = np.cumsum(held.documents)
            for number, (end, length) in enumerate(zip(ends, held.documents, strict=True)):
                packed = len(values) < len(held.documents)  # into one row, where no border has a loss
                part = (0, slice(end - length, end - 1)) if packed else (number, slice(None))
                found.append((values[part].sum() / max(have_one[part].sum(), 1), held, number))
        broken = [one for one in found if not math.isfinite(one[0])]
        if only_broken and broken:
            found = broken
        found.sort(key=lambda one: -math.inf if math.isnan(one[0]) else -one[0])
        return [Row(self._place(held, number), _plain(float(loss))) for loss, held, number in found[:_NAMED]]

    def _place(self, held: BatchInfo, document: int) -> str:
        return [place for sequence in held.sequences for place in self._places(sequence)][document]

    def _tell(self, suspects: list[Suspect]) -> None:
        """Write and show what all processes found, those of one step together."""
        everyone: list[Suspect] = gather_object(suspects)
        if not is_first_rank():
            return
        broken = {one.step for one in everyone if isinstance(one.loss, str)}  # on some process; others' rows are sound
        everyone = [one for one in everyone if one.step not in broken or isinstance(one.loss, str)]
        with self._file.open("a", encoding="utf-8") as lines:
            for one in everyone:
                lines.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
        for step in sorted({one.step for one in everyone}):
            of_step = [one for one in everyone if one.step == step]
            print(_line(of_step), flush=True)


def _line(suspects: list[Suspect]) -> str:
    """One line for one step."""
    first = suspects[0]
    rows = sorted((row for one in suspects for row in one.rows), key=_height, reverse=True)
    shown = ", ".join(f"{row.place} ({_short(row.loss)})" for row in rows[:_SHOWN])
    what = f"the loss jumped to {_short(first.loss)} (usual: {_short(first.usual)})"
    if first.kind != "spike":
        what = "the gradients are not finite, so no weight was changed"
    return f"step {first.step}: {what}; its rows by loss: {shown}; more in {SUSPECTS}"


def _height(row: Row) -> float:
    return math.inf if isinstance(row.loss, str) else row.loss


def _short(loss: float | str | None) -> str:
    return f"{loss:.3f}" if isinstance(loss, float) else str(loss)


def _plain(loss: float) -> float | str:
    return loss if math.isfinite(loss) else str(loss)


def counted_steps(number: int) -> str:
    """`1 step`, `3 steps in a row`."""
    return "1 step" if number == 1 else f"{number} steps in a row"
