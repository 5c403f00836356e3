"""Generation with a model in training: greedy answers to conversations, by all processes together."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from train.errors import UserError
from train.llm.reasoning import without_reasoning
from train.model.inference import generate_batch, has_partitioned_weights
from train.pressure.conversations import Message
from train.samples.rows import render_prompt

Item = TypeVar("Item")


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer as `evaluate.py` judges it: without reasoning and control tokens. `tokens`: all that were generated."""

    text: str
    tokens: int


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None],
) -> list[GeneratedAnswer | None]:
    """Return the greedy answer to each conversation; None if the prompt fills the model's context.

    - `model`: as a trainer wraps it. Its modes and weights, the tokenizer and the random state don't change;
    - `accelerator`: all its processes must call this with the same conversations, and each gets all answers. The
      batches are distributed over them, with the same number of rounds on each;
    - `on_progress`: is called after each round with the number of answers.

    A model whose weights are partitioned (ZeRO-3, FSDP) gathers them layer by layer in each forward pass, as in
    training: gathering all of them at once is faster, and only possible where the model fits one GPU. So all processes
    run as many forward passes as the longest answer of a round has tokens.
    """
    prompts = [render_prompt(tokenizer, messages) for messages in conversations]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False).input_ids]
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    positions = getattr(bare.config.get_text_config(), "max_position_embeddings", None) or math.inf
    fitting = [row for row, length in enumerate(lengths) if length < positions]
    fitting.sort(key=lambda row: (-lengths[row], row))  # an out-of-memory error occurs at the start
    # Prompts that may reach the context length are batches of one: it cuts their answer, and no others.
    singles = [row for row in fitting if lengths[row] + max_new_tokens > positions]
    rest = fitting[len(singles) :]
    processes, process = accelerator.num_processes, accelerator.process_index
    partitioned = has_partitioned_weights(accelerator)
    size = min(batch_size, -(-len(rest) // processes)) or 1
    # With partitioned weights a process that is done runs on with the others, beyond the context: these share a batch.
    rounds = [
        *_split(_split(singles, 1), 1 if partitioned else processes),
        *_split(_split(rest, size), processes),
    ]
    answers: dict[int, GeneratedAnswer] = {}
    # Inside one block of autocast each weight is cast once, in place of once for each token. The copies are as large as
    # those of a training step. Of partitioned weights they would be the complete model.
    with nullcontext() if partitioned else accelerator.autocast():
        for batches in rounds:
            # If a round has no batch for this process, it joins in with the first one and discards the result.
            is_mine = process < len(batches)
            batch = batches[process if is_mine else 0]
            longest = max(lengths[row] for row in batch)
            if is_mine or partitioned:
                try:
                    generated = generate_batch(
                        bare,
                        tokenizer,
                        [prompts[row] for row in batch],
                        max_new_tokens=int(min(max_new_tokens, positions - longest)),
                        device=accelerator.device,
                        synced=partitioned,
                    )
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"evaluation.batch_size: {len(batch)} prompts of up to {longest:,} tokens "
                        f"with answers of {max_new_tokens:,} do not fit in the GPU's memory. Write a smaller "
                        "number."
                    ) from error
            if is_mine:
                for row, text in zip(batch, generated, strict=True):
                    answers[row] = GeneratedAnswer(without_reasoning(text.text, conversations[row]).text, text.tokens)
            on_progress(sum(map(len, batches)))
    gathered: Mapping[int, GeneratedAnswer] = {
        row: answer for part in gather_object([answers]) for row, answer in part.items()
    }
    return [gathered.get(row) for row in range(len(conversations))]


def _split(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Return parts of `size` items in order; the last may have fewer."""
    return [items[start : start + size] for start in range(0, len(items), size)]
