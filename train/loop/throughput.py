"""What a step takes and yields: tokens, FLOPs and seconds, counted where that costs nothing.

Counts come from the batches while they are still on the host; sums that only the model knows stay on its device. The
ranks' numbers meet in one gather a logging step, where TRL gathers three or four times and waits for the device at
every micro-batch.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import TrainerCallback

from train.data.loss_mask import NOT_TRAINED
from train.model.architecture import Architecture
from train.model.flops import count_training_flops, peak_flops

BATCH_INFO = "held"
"""Where a batch says what it holds; taken out before the model sees it."""
CLOCKED = (
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
"""Figures that differ from one run to the next of the same recipe."""


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """What a batch of one process holds. `sequences`: their indices in the data set; `documents`: tokens of each
    document, those of the first sequence first; `trained_tokens`: tokens that have a loss."""

    sequences: tuple[int, ...]
    documents: NDArray[np.int64]
    trained_tokens: int


class CountingCollator:
    """A collator that says beside each batch, under HELD, what it holds."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as the collator makes it, and HELD."""
        documents = np.concatenate([example.get("seq_lengths") or [len(example["input_ids"])] for example in examples])
        trained = np.concatenate([example["labels"] for example in examples]) != NOT_TRAINED
        trained[np.cumsum(documents) - documents] = False  # nothing foretells a document's first token
        sequences = tuple(example["sequence"] for example in examples)
        return {
            **self._collate(examples),
            BATCH_INFO: BatchInfo(sequences, documents.astype(np.int64), int(trained.sum())),
        }


class Sums(NamedTuple):
    """Over the tokens that have a loss, on the device: losses and entropies in nats, and how often the likeliest token
    was right."""

    loss: torch.Tensor
    entropy: torch.Tensor
    correct: torch.Tensor
    tokens: torch.Tensor

    @staticmethod
    def of(outputs: Any) -> "Sums":
        """Of TRL's fused head: its fields are 0 where a token has no loss."""
        each = (-outputs.log_probs, outputs.entropy, outputs.is_top1, outputs.label_mask)
        return Sums(*(values.detach().sum(dtype=torch.float64) for values in each))

    def plus(self, other: "Sums | None") -> "Sums":
        """The sums of both."""
        return self if other is None else Sums(*(one + two for one, two in zip(self, other, strict=True)))


class _Clock:
    """Moments on the device, which are read without waiting for it; on a CPU those of the wall."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds; waits for `end` to come."""
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Throughput(TrainerCallback):
    """The figures of the steps since the last logging step. Evaluation and saving lie between steps and don't count.

    MFU is the share of the device's bfloat16 peak that `train.model.flops.CONVENTION` counts, by the documents that
    were trained: attention within each of them, nothing computed again. There is none on a device whose peak isn't
    known, and for a mixture of experts.
    """

    def __init__(self, accelerator: Accelerator, shape: Architecture | None) -> None:
        """`shape`: the model's, None where its arithmetic isn't known."""
        self._accelerator, self._shape = accelerator, shape
        self._clock = _Clock(accelerator.device)
        self._peak = peak_flops(torch.cuda.get_device_name()) if accelerator.device.type == "cuda" else None
        self._step_began = time.perf_counter()
        self._optimizer_began = self._clock.now()
        self._clear()

    def _clear(self) -> None:
        self._documents: list[NDArray[np.int64]] = []
        self._sums: Sums | None = None
        self._spans: list[tuple[str, Any, Any]] = []
        self._trained_tokens = self._steps = 0
        self._seconds = self._waited = 0.0
        self._carried = np.zeros(9)

    def state(self) -> dict[str, list[float]]:
        """What this process has counted since the last logging step, for a checkpoint."""
        return {"counts": self._counts().tolist(), "sums": torch.stack(list(self._all_sums())).tolist()}

    def load(self, states: Sequence[dict[str, list[float]]]) -> None:
        """Go on from the counts of these processes."""
        self._clear()
        self._carried = np.sum([state["counts"] for state in states], axis=0) if states else self._carried
        device = self._accelerator.device
        for state in states:
            sums = Sums(*torch.tensor(state["sums"], dtype=torch.float64, device=device))
            self._sums = sums.plus(self._sums)

    def _counts(self) -> NDArray[np.float64]:
        """Tokens, trained tokens, FLOPs, steps, and seconds: in all, waiting, forward, backward, in the optimizer."""
        documents = np.concatenate([np.empty(0, np.int64), *self._documents])
        flops = count_training_flops(self._shape, documents).total if self._shape else 0.0
        parts = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        for part, start, end in self._spans:
            parts[part] += self._clock.between(start, end)
        parts["backward"] -= parts["forward"]  # it is timed around both
        counted = [documents.sum(), self._trained_tokens, flops, self._steps, self._seconds, self._waited]
        return self._carried + np.array([*counted, *parts.values()], np.float64)

    def _all_sums(self) -> Iterator[torch.Tensor]:
        for one in self._sums or [0.0] * len(Sums._fields):
            yield torch.as_tensor(one, dtype=torch.float64, device=self._accelerator.device)

    def begin_step(self) -> None:
        """From here on a step takes time: its batches are asked for."""
        self._step_began = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The gradients are there, clipped. Under DeepSpeed the optimizer's step is part of the backward pass."""
        self._optimizer_began = self._clock.now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step is on its way."""
        self._spans.append(("optimizer", self._optimizer_began, self._clock.now()))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Here a step ends; logging, evaluation and saving come after it."""
        self._steps += 1
        self._seconds += time.perf_counter() - self._step_began

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time until each is there counts as waiting for data."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield batch

    def add(self, held: BatchInfo, sums: Sums | None) -> None:
        """Count a micro-batch."""
        self._documents.append(held.documents)
        self._trained_tokens += held.trained_tokens
        if sums is not None:
            self._sums = sums.plus(self._sums)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """What is done inside belongs to `part` of a step."""
        start = self._clock.now()
        yield
        self._spans.append((part, start, self._clock.now()))

    def figures(self, extra: Sequence[float] = ()) -> tuple[dict[str, float], list[list[float]]]:
        """The figures by their names in metrics.jsonl, and of each process what it gave as `extra`; then begins anew.

        All processes must call it, where the device has done all steps: one gather.
        """
        own = [*self._counts(), self._peak_memory(), *extra]
        local = torch.tensor(own, dtype=torch.float64, device=self._accelerator.device)
        gathered = self._accelerator.gather(torch.cat([torch.stack(list(self._all_sums())), local])[None]).cpu().numpy()
        _, entropy, correct, counted = gathered[:, :4].sum(0)
        tokens, trained, flops = gathered[:, 4:7].sum(0)
        processes, steps = len(gathered), max(gathered[0, 7], 1)
        seconds = max(float(gathered[:, 8].max()), 1e-9)
        found = {"mean_token_accuracy": correct / counted, "entropy": entropy / counted} if counted else {}
        found |= {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens / seconds / processes,
            "trained_tokens_per_second_per_gpu": trained / seconds / processes,
        }
        if self._peak and self._shape:
            found["mfu"] = flops / seconds / processes / self._peak
        found["seconds_per_step"] = seconds / steps
        found["seconds_waiting_for_data"] = gathered[:, 9].max() / steps
        for column, part in enumerate(("forward", "backward", "optimizer"), 10):
            found[f"seconds_{part}"] = gathered[:, column].mean() / steps
        found["peak_memory_gib"] = gathered[:, 13].max()
        self._clear()
        return {name: float(value) for name, value in found.items()}, gathered[:, 14:].tolist()

    def _peak_memory(self) -> float:
        """GiB at most, since the process began: that PyTorch had on the GPU, or that were the process's on a CPU."""
        if self._accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
