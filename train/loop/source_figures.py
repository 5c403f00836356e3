"""Figures by source: the loss and the trained tokens of each source of a data set.

documents            [ a  a  a  a | b  b  b ]      sources: a -> 0, b -> 1
losses                  0  l3 l4    0  l6 l7       [1, tokens - 1] of a packed batch
sources                 0  0  0     1  1  1        of the same shape; [rows, 1] where each row has one document
sums of losses       [l3 + l4, l6 + l7]            on the device, until a logging step gathers them
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.dataset import PackedDataset
from train.loop.batch_info import BatchInfo


class SourceFigures:
    """Sums of this process, by source, since they were last cleared; none for a data set with a single source.

    `sums`: float64 [3, sources] on the device: the losses in nats, times their loss weights; these weights; and the
    number of tokens that have a loss.
    """

    def __init__(self, sequences: PackedDataset, device: torch.device) -> None:
        self._names = [*sequences.rows_by_source] if len(sequences.rows_by_source) > 1 else []
        self._sources_of = sequences.sources
        self._numbers = torch.arange(len(self._names), dtype=torch.int32, device=device)
        self.clear()

    def clear(self) -> None:
        """Begin again at 0."""
        self.sums = torch.zeros(3, len(self._names), dtype=torch.float64, device=self._numbers.device)

    def add(
        self, batch: BatchInfo, losses: torch.Tensor, has_loss: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        """Add a micro-batch, without waiting for the device.

        Args:
            batch: its contents.
            losses: of its tokens in nats, [rows, tokens - 1]; of a shared batch the part of this process.
            has_loss: whether a token has a loss, of the same shape.
            weights: the loss weights of the tokens, of the same shape; None = 1.
        """
        if not self._names:
            return
        sources = torch.from_numpy(self._sources_of_tokens(batch, losses.shape))
        if losses.is_cuda:  # the copy of other memory would wait for the device
            sources = sources.pin_memory()
        mask = sources.to(losses.device, non_blocking=True) == self._numbers[:, None, None]  # [sources, rows, tokens]
        # no index_add_: on a GPU it adds in another order each time, and a resumed run logs the same numbers
        weighted = losses.detach() if weights is None else losses.detach() * weights
        for sums, values in zip(self.sums, (weighted, has_loss if weights is None else weights, has_loss), strict=True):
            sums += torch.where(mask, values, 0).sum((1, 2), dtype=torch.float64)

    def _sources_of_tokens(self, batch: BatchInfo, shape: torch.Size) -> NDArray[np.int32]:
        """Return the source of each loss: int32, of a shape that broadcasts to `shape`."""
        sources = np.concatenate([self._sources_of(sequence) for sequence in batch.sequences]).astype(np.int32)
        rows, tokens = shape
        if rows == len(batch.documents):
            return sources[:, None]
        first = batch.first_token + 1  # the token that the first loss belongs to
        of_tokens = np.repeat(sources, batch.documents)[first : first + tokens]
        return np.pad(of_tokens, (0, tokens - len(of_tokens)), constant_values=-1)[None]

    def state(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint."""
        return {"by_source": self.sums.tolist()} if self._names else {}

    def load(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Continue from the sums of these processes: 0 of an older version, or where a resume allows other sources."""
        self.clear()
        for state in states:
            sums = torch.tensor(state.get("by_source", []), dtype=torch.float64, device=self.sums.device)
            self.sums += sums if sums.shape == self.sums.shape else 0

    def metrics(self, sums: Sequence[float] | NDArray[np.float64], prefix: str = "") -> dict[str, float]:
        """Return the metrics of each source that has trained tokens.

        Args:
            sums: those of all processes together, flattened.
            prefix: of the metrics' names; the number of trained tokens is a metric of training, without one.
        """
        figures = [figure for figure in zip(self._names, *np.reshape(sums, (3, -1)).tolist(), strict=True) if figure[2]]
        metrics: dict[str, float] = {f"{prefix}loss/{name}": loss / weight for name, loss, weight, _ in figures}
        if not prefix:
            metrics |= {f"trained_tokens/{name}": int(tokens) for name, _, _, tokens in figures}
        return metrics
