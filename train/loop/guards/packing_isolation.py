"""Packing isolation test: before the first step, prove that no packed document sees another.

It runs on the model that is trained, in the way it is trained: isolation depends on the kernel, masks, positions, the
cache and the model's own code. Leaking packs have gone unnoticed in other trainers (trl#1230, #3910; torchtune#892).

    pack       [ first | second | third ]      loss of `second` must not change when `first` is replaced

Rows that are not packed are tested too, where those of a batch are joined.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from train.data.dataset import PackedDataset
from train.errors import UserError
from train.loop.batch_info import BATCH_INFO
from train.loop.sequence_slice import gather_slices
from train.model.attention.document_borders import takes_borders
from train.model.classifier import find_score_head, score_tokens
from train.model.float8 import without_float8
from train.model.inference import evaluation_mode
from train.ranks import is_first_rank

_LENGTHS = (43, 48, 40)
"""Tokens of the three documents of a pack; all different, so that borders at equal distances would show."""
_MAX_SHARE_OF_LEAK = 0.01
_MAX_TIMES_NOISE = 5
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest relative difference between a document's mean loss in a pack and alone. The two have other shapes, so that
roundings differ: half an epsilon each (2**-9 = 0.2 % in bfloat16), over some dozen consecutive roundings that mostly
cancel in the mean over 47 tokens. float32 allows for TF32, whose epsilon is 2**-10."""


@dataclass(frozen=True)
class Isolation:
    """Measurements of the test in nats, on the second document of a pack: root mean squares over its tokens."""

    change: float
    """Change of its tokens' losses when the document before it is replaced. All shapes stay the same, so it is exactly
    0 if documents are isolated, unless tokens share more than attention (batches of experts, scales of float8)."""
    noise: float
    """The same when the document AFTER it is replaced, which no causal model can see: the effect of such sharing."""
    leak: float
    """The same between the document alone and one that continues the document before it: a complete leak."""
    packed_loss: float
    alone_loss: float
    dtype: torch.dtype

    def find_error(self) -> str | None:
        """Return what is wrong; None if documents are isolated, or if losses are not finite for any reason."""
        if not torch.tensor([self.alone_loss, self.leak]).isfinite().all():
            return None
        allowed = max(_MAX_TIMES_NOISE * self.noise, _MAX_SHARE_OF_LEAK * self.leak)
        if not self.change <= allowed:
            return (
                f"lets packed documents see each other: replacing one changed the losses of the next one's tokens by "
                f"{self.change:.2g} (noise: {self.noise:.2g}; complete leak: {self.leak:.2g})"
            )
        allowed = max(_MAX_TIMES_NOISE * self.noise, _TOLERANCE.get(self.dtype, 3e-2) * self.alone_loss)
        if not abs(self.packed_loss - self.alone_loss) <= allowed:
            return f"gives a document the loss {self.packed_loss:.4f} in a pack and {self.alone_loss:.4f} alone"
        return None


class PackingIsolationTest(TrainerCallback):
    """Runs the test when training begins: the model is wrapped for its processes by then."""

    def __init__(self, trainer: SFTTrainer, documents: str) -> None:
        """`documents`: their name in the line that reports the test."""
        self._trainer, self._documents = trainer, documents

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the test. Raises UserError on every process if documents see each other on any."""
        trainer = self._trainer
        isolation = measure_isolation(trainer)
        error = isolation.find_error()
        failed = torch.tensor([error is not None], device=args.device)
        if trainer.accelerator.gather(failed).any():
            kernel = trainer.model.config._attn_implementation
            padded = "`sdpa` with `data.packing: false`" if takes_borders(trainer.model) else "`data.packing: false`"
            remedy = f"Write another kernel (`auto` selects one), or {padded}"
            if trainer.sequence_group is not None:
                kernel, remedy = f"{kernel} (sequence_parallel)", "Write `model.sequence_parallel: 1`"
            raise UserError(
                f"model.attention: {kernel} {error or 'lets packed documents see each other on another process'}. "
                f"{remedy}."
            )
        if is_first_rank():
            print(
                f"{self._documents} are isolated: replacing one changes the loss of the next by "
                f"{isolation.change:.2g} (complete leak: {isolation.leak:.2g})",
                flush=True,
            )


def measure_isolation(trainer: SFTTrainer) -> Isolation:
    """Run five forward passes of a short pack through the trainer's collator and wrapped model.

    All processes must call it: each uses the same documents, cut from the first rows, and so runs the same number of
    forward passes with the same shapes. The model's mode and the random state stay unchanged; no gradients.
    """
    first, second, third, other_first, other_third = _pieces(trainer.train_dataset)
    # float8 with one scale per tensor couples documents by itself, which would hide a leak of the masks
    with evaluation_mode(trainer.model_wrapped), torch.no_grad(), without_float8(trainer.model_wrapped):
        packed = _token_losses(trainer, [first, second, third])[1]
        replaced_before = _token_losses(trainer, [other_first, second, third])[1]
        replaced_after = _token_losses(trainer, [first, second, other_third])[1]
        joined = _token_losses(trainer, [[*first, *second], third])[0][len(first) :]
        alone = _token_losses(trainer, [second], whole=True)[0]
    return Isolation(
        change=_root_mean_square(packed - replaced_before),
        noise=_root_mean_square(packed - replaced_after),
        leak=_root_mean_square(joined - alone),
        packed_loss=packed.mean().item(),
        alone_loss=alone.mean().item(),
        dtype=_dtype(trainer),
    )


def _pieces(sequences: PackedDataset) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Return the token ids of three documents, and replacements for the first and the third of the same lengths."""
    first, second, third = _LENGTHS
    lengths = (first, second, third, first, third)
    tokens = (token for row in itertools.count() for token in sequences.row(row % len(sequences.lengths))[0].tolist())
    pieces = [list(itertools.islice(tokens, length)) for length in lengths]
    for piece, other in (0, 3), (2, 4):
        if pieces[piece] == pieces[other]:  # a few short rows repeat
            pieces[other].reverse()
    return pieces[0], pieces[1], pieces[2], pieces[3], pieces[4]


def _token_losses(trainer: SFTTrainer, documents: list[list[int]], *, whole: bool = False) -> list[torch.Tensor]:
    """Return the losses of a pack's tokens in nats, float64 on the CPU: [tokens - 1] for each document.

    `whole`: each process computes all tokens, also where processes share a sequence in training.
    """
    tokens = [token for document in documents for token in document]
    lengths = [len(document) for document in documents]
    collate, group = trainer.data_collator, trainer.sequence_group
    if group is not None and whole:
        collate, group = collate.collate_whole, None
    batch = collate([{"input_ids": tokens, "labels": tokens, "seq_lengths": lengths, "sequence": 0}])
    inputs = trainer._prepare_inputs(batch)  # as in training, where it could add a mask
    inputs.pop(BATCH_INFO, None)
    model, head = trainer.model_wrapped, find_score_head(trainer.model)
    with trainer.compute_loss_context_manager():
        if head is not None:  # of a reward model: in place of losses the sizes of the rewards
            values = score_tokens(model, head, inputs)[:, :-1].abs()
        else:
            values = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs  # as TRL's compute_loss does
    if group is not None:
        values = gather_slices(values, group)
    losses = values[0].double().cpu()
    starts = itertools.accumulate(lengths, initial=0)
    return [losses[start : start + length - 1] for start, length in zip(starts, lengths, strict=False)]


def _root_mean_square(differences: torch.Tensor) -> float:
    return differences.square().mean().sqrt().item()


def _dtype(trainer: SFTTrainer) -> torch.dtype:
    """Return the type that the forward pass computes in: under mixed precision not that of the weights."""
    mixed = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(trainer.accelerator.mixed_precision)
    return mixed or next(parameter.dtype for parameter in trainer.model.parameters() if parameter.is_floating_point())
