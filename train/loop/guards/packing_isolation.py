"""Before the first step: no document of a pack sees another, shown on the model that is trained, the way it is trained.

Whether it holds depends on more than the kernel: on masks, positions, a cache left on, a model's own code. Peers have
all trained on leaking packs without a word of it (trl#1230, #3910; torchtune#892).
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from train.data.dataset import PackedDataset
from train.errors import UserError
from train.loop.throughput import BATCH_INFO
from train.model.float8 import without_float8
from train.model.inference import evaluation_mode
from train.ranks import is_first_rank

_LENGTHS = (43, 48, 40)
"""Tokens of the three documents of a pack; no two alike, so that borders at equal distances would show."""
_SHARE_OF_A_LEAK = 0.01
_TIMES_THE_NOISE = 5
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far a document's mean loss may be from its loss alone, as a share of it. The two are computed in other shapes, so
each rounding may fall otherwise: half an epsilon each (2**-9 = 0.2 % in bfloat16), over some dozen roundings in a
row that mostly cancel in the mean over 47 tokens. In float32 it allows for TF32, whose epsilon is 2**-10."""


@dataclass(frozen=True)
class Isolation:
    """What the self-test measured, in nats: of the second document of a pack, root mean squares over its tokens."""

    change: float
    """Of its tokens' losses, where the document before it is replaced. Nothing else changes, no shape either, so where
    no document sees another this is 0 to the bit, but for a model whose tokens share more than attention (experts'
    batches, scales of 8-bit floats)."""
    noise: float
    """The same where the document AFTER it is replaced, which no causal model can see: such sharing alone."""
    leak: float
    """The same between the document alone and one that does go on from the document before it."""
    packed_loss: float
    alone_loss: float
    dtype: torch.dtype

    def fault(self) -> str | None:
        """What is wrong, in words; None if documents are apart, or if losses are not finite, whatever the cause."""
        if not torch.tensor([self.alone_loss, self.leak]).isfinite().all():
            return None
        allowed = max(_TIMES_THE_NOISE * self.noise, _SHARE_OF_A_LEAK * self.leak)
        if not self.change <= allowed:
            return (
                f"lets packed documents see each other: replacing one changed the loss of the next one's tokens by "
                f"{self.change:.2g} (by {self.noise:.2g} is noise; one that sees all of the other: {self.leak:.2g})"
            )
        allowed = max(_TIMES_THE_NOISE * self.noise, _TOLERANCE.get(self.dtype, 3e-2) * self.alone_loss)
        if not abs(self.packed_loss - self.alone_loss) <= allowed:
            return f"gives a document the loss {self.packed_loss:.4f} in a pack and {self.alone_loss:.4f} alone"
        return None


class IsolationTest(TrainerCallback):
    """Runs the self-test where training begins: by then the model is wrapped for its processes."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises UserError on every process where any of them finds that documents see each other."""
        trainer = self._trainer
        measured = measure(trainer)
        fault = measured.fault()
        found = torch.tensor([fault is not None], device=args.device)
        if trainer.accelerator.gather(found).any():
            kernel = trainer.model.config._attn_implementation
            raise UserError(
                f"model.attention: {kernel} {fault or 'lets packed documents see each other on another process'}. "
                "Write another kernel (`auto` chooses one), or `data.packing: false`."
            )
        if is_first_rank():
            print(
                f"packed documents are apart: replacing one changes the next one's loss by {measured.change:.2g} "
                f"({measured.leak:.2g} if it saw it)",
                flush=True,
            )


def measure(trainer: SFTTrainer) -> Isolation:
    """Five forwards of a short pack through the trainer's own collator and wrapped model.

    All processes must call it: each takes the same documents, pieces of the first rows, so that it runs as many
    forwards of the same shapes. Modes of the model and random numbers are left as they were; no gradients.
    """
    first, second, third, other_first, other_third = _pieces(trainer.train_dataset)
    # float8 with one scale for a tensor ties documents together itself, which would drown a leak of the masks
    with evaluation_mode(trainer.model_wrapped), torch.no_grad(), without_float8(trainer.model_wrapped):
        packed = _token_losses(trainer, [first, second, third])[1]
        replaced_before = _token_losses(trainer, [other_first, second, third])[1]
        replaced_after = _token_losses(trainer, [first, second, other_third])[1]
        joined = _token_losses(trainer, [[*first, *second], third])[0][len(first) :]
        alone = _token_losses(trainer, [second])[0]
    return Isolation(
        change=_root_mean_square(packed - replaced_before),
        noise=_root_mean_square(packed - replaced_after),
        leak=_root_mean_square(joined - alone),
        packed_loss=packed.mean().item(),
        alone_loss=alone.mean().item(),
        dtype=_dtype(trainer),
    )


def _pieces(sequences: PackedDataset) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Token ids of three documents, and of others in the place of the first and the third, as long as they."""
    first, second, third = _LENGTHS
    lengths = (first, second, third, first, third)
    rows = (token for place in itertools.count() for token in sequences.row(place % len(sequences.lengths))[0].tolist())
    pieces = [list(itertools.islice(rows, length)) for length in lengths]
    for piece, other in (0, 3), (2, 4):
        if pieces[piece] == pieces[other]:  # a few short rows come round again
            pieces[other].reverse()
    return pieces[0], pieces[1], pieces[2], pieces[3], pieces[4]


def _token_losses(trainer: SFTTrainer, documents: list[list[int]]) -> list[torch.Tensor]:
    """Losses of a pack's tokens in nats, float64 on the CPU: [tokens - 1] for each document."""
    tokens = [token for document in documents for token in document]
    lengths = [len(document) for document in documents]
    batch = trainer.data_collator([{"input_ids": tokens, "labels": tokens, "seq_lengths": lengths, "sequence": 0}])
    inputs = trainer._prepare_inputs(batch)
    inputs.pop(BATCH_INFO, None)
    with trainer.compute_loss_context_manager():
        outputs = trainer.model_wrapped(**inputs, use_cache=False, fused_lm_head=True)  # as TRL's compute_loss does
    losses = -outputs.log_probs[0].double().cpu()
    starts = itertools.accumulate(lengths, initial=0)
    return [losses[start : start + length - 1] for start, length in zip(starts, lengths, strict=False)]


def _root_mean_square(differences: torch.Tensor) -> float:
    return differences.square().mean().sqrt().item()


def _dtype(trainer: SFTTrainer) -> torch.dtype:
    """What the forward computes in: under mixed precision not the weights' type."""
    mixed = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(trainer.accelerator.mixed_precision)
    return mixed or next(parameter.dtype for parameter in trainer.model.parameters() if parameter.is_floating_point())
