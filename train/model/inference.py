"""Inference with a model in memory: batched generation, stop tokens and evaluation mode."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Generated:
    """Generated text. `tokens`: their number, with the stop token; `cut`: the limit of tokens ended it."""

    text: str
    tokens: int
    cut: bool


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    synced: bool = False,
) -> list[Generated]:
    """Generate a continuation of each prompt, in one batch. Special tokens are left out of the text.

    Settings that `sampling` doesn't name are the model's own, else off (transformers' default of top_k 50 is not used).
    The model's modes and the tokenizer's settings don't change.

    Args:
        model: the model, without a trainer's wrapper.
        tokenizer: its tokenizer, with a padding token.
        prompts: rendered conversations.
        max_new_tokens: maximum tokens of a continuation.
        sampling: arguments of `generate`; None = greedy.
        device: device of the inputs, if not the model's.
        synced: all processes run as many forward passes as the one with the longest continuation.
    """
    ids = tokenizer(list(prompts), add_special_tokens=False).input_ids
    longest = max(map(len, ids))
    # Padded here: a tokenizer that pads keeps that as a setting, and saves it with the model.
    padding = [longest - len(row) for row in ids]
    inputs = {
        "input_ids": [[tokenizer.pad_token_id] * missing + row for row, missing in zip(ids, padding, strict=True)],
        "attention_mask": [[0] * missing + [1] * (longest - missing) for missing in padding],
    }
    tensors = {name: torch.tensor(rows, device=device or model.device) for name, rows in inputs.items()}
    if sampling is None:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif model.generation_config.top_k is None:
        sampling = {"top_k": 0, **sampling}
    if "stop_strings" in sampling:
        sampling = {**sampling, "tokenizer": tokenizer}
    # Not in inference mode: weights that ZeRO-3 or FSDP2 gather in it can't be trained afterwards.
    with evaluation_mode(model):
        outputs = model.generate(
            **tensors,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=synced,
            **sampling,
        )
    written = outputs[:, longest:].tolist()
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    eos = model.generation_config.eos_token_id
    stops = set(eos) if isinstance(eos, list) else {eos}
    generated = []
    for ids, text in zip(written, texts, strict=True):
        tokens = next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))
        cut = tokens == max_new_tokens and ids[-1] not in stops
        generated.append(Generated(text, tokens, cut))
    return generated


def set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str]) -> None:
    """Add `stop_tokens` and the tokenizer's eos to the stop tokens of the model's generation settings.

    Call it before the trainer makes the first of them the tokenizer's eos.
    """
    own = model.generation_config.eos_token_id
    before = own if isinstance(own, list) else [] if own is None else [own]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stops = [*map(tokenizer.convert_tokens_to_ids, stop_tokens), *eos, *before]
    model.generation_config.eos_token_id = list(dict.fromkeys(stops)) or None


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Set the model to evaluation mode inside the block; every module has its mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if type(module).__name__ == "Linear4bit":
            module.training = True  # in evaluation mode bitsandbytes repacks the weights on a CPU, permanently
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def has_partitioned_weights(accelerator: Accelerator) -> bool:
    """Return whether each process holds a part of the weights, so that a forward pass needs all processes."""
    plugin = accelerator.state.deepspeed_plugin
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED and plugin.zero_stage == 3
    return zero3 or accelerator.distributed_type == DistributedType.FSDP
