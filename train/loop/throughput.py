"""Throughput metrics: tokens/s, MFU, seconds per step and part of a step, peak memory.

A step lasts from the request for its batches to the end of the optimizer's last kernel. On a GPU both are events in the
device's queue, so that no step waits for the device and no kernel is left out:

    host     | request | launch kernels | request | launch kernels |
    device             |forward, backward, optimizer|forward, backward, optimizer|
    steps    |             step 1                   |          step 2            |

Counts come from the batches while they are on the host; sums that only the model knows stay on its device. One gather
per logging step combines the ranks; TRL gathers several times and waits for the device at every micro-batch.
"""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import TrainerCallback

from train.loop.batch_info import BatchInfo
from train.loop.loss import TOKEN_METRICS, MeanMetrics
from train.loop.source_figures import SourceFigures
from train.model.architecture import Architecture
from train.model.flops import count_training_flops, peak_flops

TIMING_METRICS = (
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "trained_tokens_per_second_per_gpu",
    "mfu",
    "seconds_per_step",
    "seconds_waiting_for_data",
    "seconds_forward",
    "seconds_backward",
    "seconds_optimizer",
    "peak_memory_gib",
)
"""Metrics that differ between runs of the same recipe."""


class _Clock:
    """Times on the device, read without waiting for it; on a CPU wall-clock times."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Return the seconds between two times; wait for `end`."""
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Throughput(TrainerCallback):
    """Throughput of the steps since the last logging step, without evaluation and saving, which lie between steps.

    MFU is the share of the device's bfloat16 peak by `train.model.flops.CONVENTION`: attention within each document,
    no recomputation. It is left out for devices of unknown peak and for mixtures of experts.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        shape: Architecture | None,
        sources: SourceFigures,
        metrics: MeanMetrics = TOKEN_METRICS,
    ) -> None:
        """Begin to count.

        Args:
            accelerator: of the trainer.
            shape: the model's dimensions; None if its FLOPs can't be counted.
            sources: figures by source, which are gathered, saved and cleared together with these.
            metrics: those that sums of the model are divided into.
        """
        self._accelerator, self._shape, self._sources, self._metrics = accelerator, shape, sources, metrics
        self._clock = _Clock(accelerator.device)
        self._peak = peak_flops(torch.cuda.get_device_name()) if accelerator.device.type == "cuda" else None
        self._step_began = self._optimizer_began = self._clock.now()
        self._clear()

    def _clear(self) -> None:
        self._documents: list[NDArray[np.int64]] = []
        self._sums = torch.zeros(self._metrics.sums, dtype=torch.float64, device=self._accelerator.device)
        self._spans: list[tuple[str, Any, Any]] = []
        self._trained_tokens = self._steps = 0
        self._waited = 0.0
        self._carried = np.zeros(9)
        self._sources.clear()

    def state(self) -> dict[str, Any]:
        """Return what this process has counted since the last logging step, for a checkpoint."""
        return {"counts": self._counts().tolist(), "sums": self._sums.tolist(), **self._sources.state()}

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the counts of these processes."""
        self._clear()
        self._sources.load(states)
        self._carried = np.sum([state["counts"] for state in states], axis=0) if states else self._carried
        for state in states:
            values = (state["sums"] + state["sums"][3:4])[: self._metrics.sums]  # no loss weights in earlier versions
            self._sums += torch.tensor(values, dtype=torch.float64, device=self._sums.device)

    def _counts(self) -> NDArray[np.float64]:
        """Return tokens, trained tokens, FLOPs, steps, and seconds: total, waiting, forward, backward, optimizer."""
        documents = np.concatenate([np.empty(0, np.int64), *self._documents])
        flops = count_training_flops(self._shape, documents).total if self._shape else 0.0
        parts = dict.fromkeys(("step", "forward", "backward", "optimizer"), 0.0)
        for part, start, end in self._spans:
            parts[part] += self._clock.between(start, end)
        parts["backward"] -= parts["forward"]  # timed around both
        counts = [documents.sum(), self._trained_tokens, flops, self._steps, parts.pop("step"), self._waited]
        return self._carried + np.array([*counts, *parts.values()], np.float64)

    def begin_step(self) -> None:
        """Start the clock of a step: its batches are requested."""
        self._step_began = self._clock.now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Start the optimizer's clock. Under DeepSpeed its step is part of the backward pass."""
        self._optimizer_began = self._clock.now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Stop the optimizer's clock."""
        self._spans.append(("optimizer", self._optimizer_began, self._clock.now()))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock of the step; logging, evaluation and saving follow."""
        self._steps += 1
        self._spans.append(("step", self._step_began, self._clock.now()))

    def time_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and count the time until each arrives as waiting for data."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield batch

    def add(self, batch: BatchInfo, sums: torch.Tensor | None) -> None:
        """Count a micro-batch. `sums`: those of the model, on its device."""
        if batch.is_counted_here:
            self._documents.append(batch.documents)
            self._trained_tokens += batch.trained_tokens
        if sums is not None:
            self._sums += sums

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time of the block as `part` of a step."""
        start = self._clock.now()
        yield
        self._spans.append((part, start, self._clock.now()))

    def gather_metrics(self, extra: Sequence[float] = ()) -> tuple[dict[str, float], list[list[float]]]:
        """Return the metrics by their names in metrics.jsonl, and the `extra` of each process; then count from 0.

        All processes must call it, after the device has done all steps: one gather.
        """
        own = [*self._counts(), self._peak_memory(), *extra]
        local = torch.tensor(own, dtype=torch.float64, device=self._accelerator.device)
        numbers = torch.cat([self._sums, local, self._sources.sums.flatten()])
        gathered = self._accelerator.gather(numbers[None]).cpu().numpy()
        size = self._metrics.sums
        sums, counts, by_source = np.split(gathered, [size, size + len(local)], axis=1)
        tokens, trained, flops = counts[:, :3].sum(0)
        processes, steps = len(counts), max(counts[0, 3], 1)
        seconds = max(float(counts[:, 4].max()), 1e-9)
        metrics = self._metrics.means(sums.sum(0))
        metrics.pop("loss", None)  # transformers logs the mean over the steps
        metrics |= {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens / seconds / processes,
            "trained_tokens_per_second_per_gpu": trained / seconds / processes,
        }
        if self._peak and self._shape:
            metrics["mfu"] = flops / seconds / processes / self._peak
        metrics["seconds_per_step"] = seconds / steps
        metrics["seconds_waiting_for_data"] = counts[:, 5].max() / steps
        for column, part in enumerate(("forward", "backward", "optimizer"), 6):
            metrics[f"seconds_{part}"] = counts[:, column].mean() / steps
        metrics["peak_memory_gib"] = counts[:, 9].max()
        self._clear()
        metrics = {name: float(value) for name, value in metrics.items()} | self._sources.metrics(by_source.sum(0))
        return metrics, counts[:, 10:].tolist()

    def _peak_memory(self) -> float:
        """Return the peak GiB since the process began: PyTorch's on the GPU, or the process's on a CPU."""
        if self._accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
