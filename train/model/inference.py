"""Answers from a model in memory, in batches, and where the answers of a saved one stop."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model wrote. `tokens`: how many, with the one that ended it. `cut`: the limit ended it."""

    text: str
    tokens: int
    cut: bool


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Mapping[str, Any] | None = None,
) -> list[Generated]:
    """What the model writes after each prompt, all at once. `sampling`: as transformers' generate; None = greedy.

    What `sampling` doesn't name is as the model's own generation settings have it, and else not done (top_k 50, a
    default of transformers, isn't). Special tokens aren't in the text.
    """
    model.eval()
    inputs = tokenizer(
        list(prompts),
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    ).to(model.device)
    if sampling is None:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif model.generation_config.top_k is None:
        sampling = {"top_k": 0, **sampling}
    if "stop_strings" in sampling:
        sampling = {**sampling, "tokenizer": tokenizer}
    outputs = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
    written = outputs[:, inputs["input_ids"].shape[1] :].tolist()
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    known = model.generation_config.eos_token_id
    stops = set(known) if isinstance(known, list) else {known}
    generated = []
    for ids, text in zip(written, texts, strict=True):
        tokens = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
        cut = tokens == max_new_tokens and ids[-1] not in stops
        generated.append(Generated(text, tokens, cut))
    return generated


def set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str]) -> None:
    """Have the saved generation settings stop at each of `stop_tokens`, at eos and at what the model stops at already.

    Call it before the trainer makes the first of them the tokenizer's eos.
    """
    known = model.generation_config.eos_token_id
    before = known if isinstance(known, list) else [] if known is None else [known]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stops = [*map(tokenizer.convert_tokens_to_ids, stop_tokens), *eos, *before]
    model.generation_config.eos_token_id = list(dict.fromkeys(stops)) or None


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """The model without dropout and the like, each of its modules afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if type(module).__name__ == "Linear4bit":
            module.training = True  # in evaluation, bitsandbytes packs the weights anew on a CPU, for good
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
