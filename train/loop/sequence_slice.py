"""Slices of a batch for sequence parallelism: each rank of a group gets its part of the tokens of one packed row.

documents        [ a  a  a  a  a | b  b  b  b ]     nine tokens for two ranks, which are extended to ten
labels            .  a2 a3 a4 a5 . b2 b3 b4
next labels      a2 a3 a4 a5  .  b2 b3 b4  .  .     shifted before the cut: no rank lacks the label of its last token
rank             [      0      ] [      1      ]
"""

from typing import Any

import torch
from torch import distributed
from torch.nn.functional import pad

from train.data.dataset import LOSS_WEIGHTS
from train.data.loss_mask import NOT_TRAINED


def make_group(size: int) -> distributed.ProcessGroup | None:
    """Return the group of `size` consecutive ranks that this process belongs to; None for 1. All ranks must call it."""
    return None if size == 1 else distributed.new_subgroups(size)[0]


def slice_batch(batch: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Return the part of a batch that one of `ranks` ranks holds.

    - `batch`: of TRL's collator, `padding_free`: one row of tokens [1, tokens].
    - `input_ids`, `labels`, `position_ids`, `shift_labels`: [1, tokens / ranks], rounded up. `shift_labels` has the
      label of the token that each token predicts; TRL's fused head and the count of trained tokens use it.
    - `loss_weights`: [1, tokens / ranks], those of `shift_labels`; only if the batch has them.
    - `cu_seq_lens_q` and the rest that the kernels need describe all documents. The last one is padding, if any.
    """
    tokens = batch["input_ids"].shape[1]
    padding = -tokens % ranks
    labels = pad(batch["labels"], (0, padding), value=NOT_TRAINED)
    rows = {
        "input_ids": pad(batch["input_ids"], (0, padding)),
        "labels": labels,
        "shift_labels": pad(labels[:, 1:], (0, 1), value=NOT_TRAINED),
        "position_ids": torch.cat([batch["position_ids"], torch.arange(padding)[None]], dim=1),
    }
    if LOSS_WEIGHTS in batch:
        rows[LOSS_WEIGHTS] = pad(batch[LOSS_WEIGHTS], (0, padding + 1))
    borders = batch["cu_seq_lens_q"]
    if padding:
        borders = torch.cat([borders, borders[-1:] + padding])
    longest = max(batch["max_length_q"], padding)
    own = slice((tokens + padding) // ranks * rank, (tokens + padding) // ranks * (rank + 1))
    return {
        **{name: row[:, own].contiguous() for name, row in rows.items()},
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def gather_slices(values: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """Return the values of all tokens from those of each rank's: [1, tokens / P] -> [1, tokens], padding included."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    distributed.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=1)
