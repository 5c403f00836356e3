"""Log-likelihood of answers under a model: the sum of the log-probabilities of the trained tokens.

- Rows of similar length share a batch, padded on the right. No attention mask is needed: in a causal model no token
  attends to later ones, so the padding changes nothing, under any kernel.
- Logits are computed only for the tokens before trained ones: a hook selects their hidden states at the output layer,
  so that what a model does after it (Gemma's soft cap, Granite's scale) still applies. The softmax is in float32, for
  some of the tokens at a time.

Common prefixes are computed again for each row. The messages of a row share only the head of the template. Siblings
share the complete prompt under one message: caching it would save 45 % of all tokens on the quickstart's short held-out
answers (counted), and about a quarter at Multifaceted Collection's lengths (350 tokens of prompt, 500 of answer, three
siblings). But each batch would need two forward passes and a cache, which packed kernels, sliding windows and models
with a state implement in different ways, and figures would not come from the forward pass that is trained. The gain
is small: 128 rows of that length under four messages are 435,000 tokens forward, and a step of Janus 7B is 262,144
forward and backward. An evaluation costs about half a step, of which a quarter could be saved.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.loss_mask import EncodedRow
from train.model.inference import evaluation_mode

if TYPE_CHECKING:
    from accelerate import Accelerator

_MAX_LOGITS = 1 << 28
"""Maximum number of logits in memory, which limits the trained tokens of a batch; a longer answer is a batch alone."""
_TOKENS_PER_SOFTMAX = 512


def make_batches(
    lengths: Sequence[int], trained: Sequence[int], tokens_per_batch: int, trained_per_batch: int
) -> list[list[int]]:
    """Divide rows into batches, the longest first, so that an out-of-memory error occurs at the start.

    A batch has at most `tokens_per_batch` tokens with its padding, and at most `trained_per_batch` trained tokens; a
    larger row is a batch by itself.
    """
    batches: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        batch = batches[-1] if batches else []
        fits = batch and (len(batch) + 1) * lengths[batch[0]] <= tokens_per_batch and trained[row] <= room
        if not fits:
            batches.append([])
            room = trained_per_batch
        batches[-1].append(row)
        room -= trained[row]
    return batches


def compute_log_likelihoods(
    model: Any,
    rows: Sequence[EncodedRow],
    accelerator: "Accelerator | None" = None,
    *,
    tokens_per_batch: int = 8_192,
    cached: Mapping[int, float] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_scored: Callable[[Sequence[int], Sequence[float]], None] | None = None,
) -> NDArray[np.float64]:
    """Return the sum of ln p(token) over the trained tokens of each row, in nats: [rows].

    - `model`: from transformers or peft, or wrapped by a trainer. Its modes and the random state don't change;
    - `accelerator`: all its processes must call this with the same rows. The batches are distributed over them, with
      the same number of forward passes on each, as ZeRO-3 and FSDP require, and each process gets all sums;
    - `cached`: sums by row that are not computed again;
    - `on_progress`: is called with the number of rows scored; `on_scored`: with the rows of each batch and their sums.
    """
    spans = [piece.trained.tolist() for piece in rows]
    # The first token of a row has no prefix to predict it from; it is never part of an answer.
    targets = [np.concatenate([np.arange(max(a, 1), b) for a, b in of_row] or [np.arange(0)]) for of_row in spans]
    bare = accelerator.unwrap_model(model, keep_torch_compile=False) if accelerator else model
    head = bare.get_output_embeddings()
    vocabulary = bare.config.get_text_config().vocab_size
    cached = cached or {}
    remaining = [row for row in range(len(rows)) if row not in cached]
    sizes = [len(rows[row].ids) for row in remaining], [len(targets[row]) for row in remaining]
    batches = [
        [remaining[index] for index in batch]
        for batch in make_batches(*sizes, tokens_per_batch, _MAX_LOGITS // vocabulary)
    ]
    processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    device = accelerator.device if accelerator else next(model.parameters()).device
    sums = torch.zeros(len(rows), dtype=torch.float64)
    if process == 0:
        sums[list(cached)] = torch.tensor(list(cached.values()), dtype=torch.float64)
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(batches), processes):
            # If the last round has no batch for this process, it scores the first one and discards the result.
            is_mine = start + process < len(batches)
            batch = batches[start + process if is_mine else start]
            tokens = _score(model, head, [rows[row] for row in batch], [targets[row] for row in batch], device)
            scores = _sum_segments(tokens, [len(targets[row]) for row in batch])
            if is_mine:
                sums[batch] = scores
                if on_scored:
                    on_scored(batch, scores.tolist())
            if on_progress:
                on_progress(sum(len(scored) for scored in batches[start : start + processes]))
    if accelerator is not None and processes > 1:
        sums = accelerator.reduce(sums.to(device), reduction="sum").cpu()
    return sums.numpy()


def compute_span_log_likelihoods(
    model: Any, rows: Sequence[EncodedRow], *, tokens_per_batch: int = 8_192
) -> Iterator[dict[int, list[float]]]:
    """Yield batch by batch the sums of ln p(token) over each trained span, in nats: row -> [spans].

    One forward pass scores all answers of a conversation, each after the turns before it. As
    `compute_log_likelihoods` on a single process.
    """
    head = model.get_output_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    targets = [np.concatenate([np.arange(a, b) for a, b in row.trained.tolist()]) for row in rows]
    sizes = [len(row.ids) for row in rows], [len(positions) for positions in targets]
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad():
        for batch in make_batches(*sizes, tokens_per_batch, _MAX_LOGITS // vocabulary):
            tokens = _score(model, head, [rows[row] for row in batch], [targets[row] for row in batch], device)
            spans = iter(
                _sum_segments(tokens, [b - a for row in batch for a, b in rows[row].trained.tolist()]).tolist()
            )
            yield {row: [next(spans) for _ in rows[row].trained] for row in batch}


def _sum_segments(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the sums of consecutive segments of `values`: [segments]."""
    segment_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.zeros(len(lengths), dtype=values.dtype).index_add_(0, segment_of, values)


def _score(
    model: Any, head: Any, rows: Sequence[EncodedRow], targets: Sequence[NDArray[np.int64]], device: torch.device
) -> torch.Tensor:
    """Return ln p of the target tokens of one batch: float64 on the CPU, [targets of all rows]."""
    longest = max(len(piece.ids) for piece in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, piece in enumerate(rows):
        ids[row, : len(piece.ids)] = torch.from_numpy(piece.ids.astype(np.int64))
    row_of = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(positions) for positions in targets]))
    position = torch.from_numpy(np.concatenate(targets)).long()
    labels = ids[row_of, position].to(device)
    row_of_token, before = row_of.to(device), (position - 1).to(device)
    ids = ids.to(device)

    def select(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return arguments[0][row_of_token, before][None], *arguments[1:]

    hook = head.register_forward_pre_hook(select) if head is not None else None
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    # An output layer that isn't called as a module computes the logits of all tokens.
    logits = logits[0] if logits.shape[:2] == (1, len(labels)) else logits[row_of_token, before]
    scores = []
    for start in range(0, len(labels), _TOKENS_PER_SOFTMAX):
        chunk = slice(start, start + _TOKENS_PER_SOFTMAX)
        logits_of_chunk = logits[chunk] if logits.dtype == torch.float64 else logits[chunk].float()
        scores.append(logits_of_chunk.log_softmax(-1).gather(1, labels[chunk, None])[:, 0])
    return torch.cat(scores).cpu().double()
