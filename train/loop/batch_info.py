"""Batch contents: which sequences and documents a batch holds, noted by the collator while it is on the host."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.loss_mask import NOT_TRAINED

BATCH_INFO = "batch_info"
"""Key of a batch's BatchInfo, which is removed before the model sees the batch."""


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """Contents of a batch of one process.

    `sequences`: indices in the data set. `documents`: tokens of each document, in order of the sequences.
    `trained_tokens`: tokens that have a loss.
    """

    sequences: tuple[int, ...]
    documents: NDArray[np.int64]
    trained_tokens: int


class CountingCollator:
    """A collator that adds a BatchInfo to each batch."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of the wrapped collator, with a BatchInfo under BATCH_INFO."""
        documents = np.concatenate([example.get("seq_lengths") or [len(example["input_ids"])] for example in examples])
        trained = np.concatenate([example["labels"] for example in examples]) != NOT_TRAINED
        trained[np.cumsum(documents) - documents] = False  # a document's first token has no prediction target
        sequences = tuple(example["sequence"] for example in examples)
        return {
            **self._collate(examples),
            BATCH_INFO: BatchInfo(sequences, documents.astype(np.int64), int(trained.sum())),
        }
