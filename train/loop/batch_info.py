"""Batch contents: which sequences and documents a batch holds, noted by the collator while it is on the host."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import ProcessGroup

from train.data.dataset import LOSS_WEIGHTS
from train.data.loss_mask import NOT_TRAINED
from train.loop.sequence_slice import slice_batch

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
BATCH_INFO = "batch_info"
"""Key of a batch's BatchInfo, which is removed before the model sees the batch."""


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """Contents of a batch of one process.

    - `sequences`: indices in the data set.
    - `documents`: tokens of each document, in order of the sequences.
    - `trained_tokens`: tokens that have a loss.
    - `first_token`: position of this process's first token, where processes share the batch (sequence parallelism).
      All else is then of the complete batch.
    """

    sequences: tuple[int, ...]
    documents: NDArray[np.int64]
    trained_tokens: int
    first_token: int = 0

    @property
    def is_counted_here(self) -> bool:
        """Return whether this process counts the batch: of those that share it, the first one does."""
        return self.first_token == 0


class CountingCollator:
    """A collator that adds a BatchInfo to each batch, and cuts it for a group of processes that share it."""

    def __init__(self, collate: Collate, group: ProcessGroup | None = None) -> None:
        """`collate`: the collator to wrap. `group`: the processes that share a batch."""
        self._collate = collate
        self._rank, self._ranks = (group.rank(), group.size()) if group else (0, 1)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of the wrapped collator or this process's slice of it, with a BatchInfo under BATCH_INFO."""
        batch = self.collate_whole(examples)
        if self._ranks == 1:
            return batch
        part = slice_batch(batch, self._rank, self._ranks)
        first_token = self._rank * part["input_ids"].shape[1]
        return {**part, BATCH_INFO: replace(batch[BATCH_INFO], first_token=first_token)}

    def collate_whole(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the complete batch with its BatchInfo, and the loss weights if the data set has some.

        `loss_weights`: float32 [rows, tokens - 1], that of each token's successor, 0 where it has no label.
        """
        documents = np.concatenate([example.get("seq_lengths") or [len(example["input_ids"])] for example in examples])
        trained = np.concatenate([example["labels"] for example in examples]) != NOT_TRAINED
        trained[np.cumsum(documents) - documents] = False  # a document's first token has no prediction target
        sequences = tuple(example["sequence"] for example in examples)
        batch = self._collate(examples)
        if LOSS_WEIGHTS in examples[0]:
            batch[LOSS_WEIGHTS] = _collate_weights([example[LOSS_WEIGHTS] for example in examples], batch["labels"])
        return {**batch, BATCH_INFO: BatchInfo(sequences, documents.astype(np.int64), int(trained.sum()))}


def sum_loss_weights(batches: list[dict[str, Any]]) -> torch.Tensor | None:
    """Return the sum of the loss weights of these batches; None if their data set has none.

    In float32, as the losses are: a divisor in float64 would make the loss float64.
    """
    if not batches or LOSS_WEIGHTS not in batches[0]:
        return None
    return torch.stack([batch[LOSS_WEIGHTS].sum(dtype=torch.float64) for batch in batches]).sum().float()


def _collate_weights(weights: list[NDArray[np.float32]], labels: torch.Tensor) -> torch.Tensor:
    """Return the loss weights of the labels [rows, tokens] but the first, which no token predicts: [rows, tokens - 1].

    `weights`: of the tokens of each example. An example is a row, or all of them are one (`padding_free`).
    """
    rows = weights if len(labels) == len(weights) else [np.concatenate(weights)]
    collated = torch.zeros(labels.shape)
    for number, row in enumerate(rows):
        collated[number, : len(row)] = torch.from_numpy(row)
    return collated.masked_fill_(labels == NOT_TRAINED, 0)[:, 1:].contiguous()
