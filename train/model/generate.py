"""Answers from a model in memory, in batches, and where the answers of a saved one stop."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, Any]]],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The likeliest answer to each conversation, under the tokenizer's own template, in the order asked.

    Decoding is greedy, so the same model gives the same answers; `max_new_tokens` cuts them. Conversations of like
    length share a batch; `on_progress` hears how many more are answered.
    """
    prompts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    model.eval()
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs = tokenizer(
            [prompts[index] for index in indices],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(model.device)
        outputs = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = outputs[:, inputs["input_ids"].shape[1] :]
        for index, text in zip(indices, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
            answers[index] = text
        if on_progress:
            on_progress(len(indices))
    return answers


def stop_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str]) -> None:
    """Have the saved generation settings stop at each of `stop_tokens`, at eos and at what the model stops at already.

    Call it before the trainer makes the first of them the tokenizer's eos.
    """
    known = model.generation_config.eos_token_id
    before = known if isinstance(known, list) else [] if known is None else [known]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stops = [*map(tokenizer.convert_tokens_to_ids, stop_tokens), *eos, *before]
    model.generation_config.eos_token_id = list(dict.fromkeys(stops)) or None
