"""How likely a model finds given answers: the sum of log-probabilities of just the tokens that are trained.

Rows of like length share a batch, padded on the right. There needs to be no attention mask: in a causal model no token
sees what stands behind it, so the padding changes nothing, under any kernel. Logits are made for the tokens before
trained ones alone, by picking their hidden states where they enter the output layer, so that all a model does after it
(Gemma's soft cap, Granite's scale) stays; the softmax is taken in float32, some of the tokens at a time.

Prefixes aren't computed once for several rows. Between the messages of one row only the template's head is shared.
Between siblings the whole prompt under one message is: a cache of it would save 45 % of all tokens on the quickstart's
short held-out answers (counted), and about a quarter at Multifaceted Collection's lengths (350 tokens of prompt, 500 of
answer, three siblings). For that, each batch would need two forwards and a cache, which packed kernels, sliding windows
and models with a state each hold in their own way, and figures would not come from the forward that is trained. It
doesn't pay: 128 rows of that length under four messages are 435,000 tokens forward, where a step of Janus 7B takes
262,144 forward and backward, so an evaluation costs about half a step, and a quarter of that could be saved.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.loss_mask import EncodedRow
from train.model.inference import evaluation_mode

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOGITS = 1 << 28
"""Most logits at once, in number: a batch has no more trained tokens than that, but for a single longer answer."""
_TOKENS_OF_A_SOFTMAX = 512


def batches(
    lengths: Sequence[int], trained: Sequence[int], tokens_per_batch: int, trained_per_batch: int
) -> list[list[int]]:
    """Which rows go together: the longest first, so that what doesn't fit in memory doesn't fit at once.

    A batch is at most `tokens_per_batch` with its padding, and has at most `trained_per_batch` trained tokens; one row
    that is larger is a batch by itself.
    """
    made: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fits = made and (len(made[-1]) + 1) * lengths[made[-1][0]] <= tokens_per_batch and trained[row] <= room
        if not fits:
            made.append([])
            room = trained_per_batch
        made[-1].append(row)
        room -= trained[row]
    return made


def log_likelihoods(
    model: Any,
    rows: Sequence[EncodedRow],
    accelerator: "Accelerator | None" = None,
    *,
    tokens_per_batch: int = 8_192,
    known: Mapping[int, float] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_scored: Callable[[Sequence[int], Sequence[float]], None] | None = None,
) -> NDArray[np.float64]:
    """For each row the sum of ln p(token) over its trained tokens, in nats: [rows].

    `known`: sums by row that need not be computed. `on_scored` hears of each batch, its rows and their sums.

    `model`: from transformers or peft, or as a trainer has wrapped it. With an `accelerator` all its processes must
    call this with the same rows; each scores every so-manieth batch, and gets all figures. The number of forwards is
    the same on each, as ZeRO-3 and FSDP need it. The model's modes and random numbers stay as they were.
    """
    spans = [piece.trained.tolist() for piece in rows]
    # The first token of a row has none before it that it could be predicted from; it is never an answer's.
    targets = [np.concatenate([np.arange(max(a, 1), b) for a, b in of_row] or [np.arange(0)]) for of_row in spans]
    bare = accelerator.unwrap_model(model) if accelerator else model
    head = bare.get_output_embeddings()
    vocabulary = bare.config.get_text_config().vocab_size
    known = known or {}
    left = [row for row in range(len(rows)) if row not in known]
    sizes = [len(rows[row].ids) for row in left], [len(targets[row]) for row in left]
    plan = [[left[place] for place in batch] for batch in batches(*sizes, tokens_per_batch, _LOGITS // vocabulary)]
    processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    device = accelerator.device if accelerator else next(model.parameters()).device
    sums = torch.zeros(len(rows), dtype=torch.float64)
    if process == 0:
        sums[list(known)] = torch.tensor(list(known.values()), dtype=torch.float64)
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(plan), processes):
            # Where the last round has no batch for this process, it scores one again and forgets it.
            mine = start + process < len(plan)
            chosen = plan[start + process if mine else start]
            found = _score(model, head, [rows[row] for row in chosen], [targets[row] for row in chosen], device)
            if mine:
                sums[chosen] = found
                if on_scored:
                    on_scored(chosen, found.tolist())
            if on_progress:
                on_progress(sum(len(batch) for batch in plan[start : start + processes]))
    if accelerator is not None and processes > 1:
        sums = accelerator.reduce(sums.to(device), reduction="sum").cpu()
    return sums.numpy()


def _score(
    model: Any, head: Any, rows: Sequence[EncodedRow], targets: Sequence[NDArray[np.int64]], device: torch.device
) -> torch.Tensor:
    """The sums of one batch: float64 on the CPU, [rows]."""
    longest = max(len(piece.ids) for piece in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, piece in enumerate(rows):
        ids[row, : len(piece.ids)] = torch.from_numpy(piece.ids.astype(np.int64))
    row_of = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(places) for places in targets]))
    place = torch.from_numpy(np.concatenate(targets)).long()
    wanted = ids[row_of, place].to(device)
    row_of_token, before = row_of.to(device), (place - 1).to(device)
    ids = ids.to(device)

    def pick(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return arguments[0][row_of_token, before][None], *arguments[1:]

    hook = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    # An output layer that isn't called as a module has made them all.
    logits = logits[0] if logits.shape[:2] == (1, len(wanted)) else logits[row_of_token, before]
    scores = []
    for start in range(0, len(wanted), _TOKENS_OF_A_SOFTMAX):
        some = slice(start, start + _TOKENS_OF_A_SOFTMAX)
        # in float64 there is nothing to be gained by float32
        of_some = logits[some] if logits.dtype == torch.float64 else logits[some].float()
        scores.append(of_some.log_softmax(-1).gather(1, wanted[some, None])[:, 0])
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row_of, torch.cat(scores).cpu().double())
