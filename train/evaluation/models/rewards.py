"""Rewards of answers by a local reward model, each stored in a journal as soon as it exists.

    model = open_reward_model("outputs/reward")
    score_answers(model, [[*prompt, {"role": "assistant", "content": answer}]], Path("a.sqlite"), 16)

A conversation is rendered with the reward model's own template and scored at its last token, as in its training. A
second call takes the rewards of the first from the journal, also of one that was killed.
"""

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from train.errors import UserError, replace_in_errors
from train.evaluation.models.local import Messages, journal_name, load_tokenizer_of
from train.evaluation.required_paths import require_model
from train.formatting import format_count
from train.llm.journal import Journal
from train.llm.request import Answer, Decoding, Request
from train.model.folder import is_adapter_alone
from train.model.load import is_reward_model, load_saved
from train.progress import progress_bar


class RewardModel:
    """A reward model, whose weights are loaded with the first batch. `name`: its name in the journal."""

    def __init__(self, model: str, dtype: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self._dtype, self.tokenizer = model, dtype, tokenizer
        self.name = journal_name(model, tokenizer, dtype)

    @cached_property
    def weights(self) -> Any:
        """Return the model itself, loaded at the first use."""
        model = load_saved(self.model, self._dtype, scores=True).eval()
        config = model.config.get_text_config()
        # The reward is read before padding. A config may name no token; that of an adapter's base is not its own.
        if config.pad_token_id is None or is_adapter_alone(Path(self.model)):
            config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def score(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the rewards of a batch of tokenized conversations."""
        longest = max(map(len, texts))
        padding = self.weights.config.get_text_config().pad_token_id
        ids = [[*text, *[padding] * (longest - len(text))] for text in texts]
        mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        tensors = [torch.tensor(rows, device=self.weights.device) for rows in (ids, mask)]
        with torch.inference_mode():
            logits = self.weights(input_ids=tensors[0], attention_mask=tensors[1], use_cache=False).logits
        return logits[:, 0].float().tolist()


def open_reward_model(model: str, dtype: str | None = None) -> RewardModel:
    """Return the model of --reward-model. Raises UserError if it is none, or has no tokenizer with a template."""
    option = f"--reward-model {model}"
    require_model("--reward-model", model)
    try:
        if not is_reward_model(model):
            raise UserError(f"{option}: it is no reward model. Train one with `preference: {{loss: reward}}`.")
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: can't be loaded: {' '.join(str(error).split())}") from error
    with replace_in_errors({f"--model {model}": option}):
        tokenizer = load_tokenizer_of(model)
    if tokenizer.chat_template is None:
        raise UserError(f"{option}: its tokenizer has no chat template.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return RewardModel(model, dtype, tokenizer)


def score_answers(
    model: RewardModel, conversations: Sequence[Messages], journal_file: Path, batch_size: int
) -> list[float | None]:
    """Return the reward of each conversation, which ends with an answer; None where its template or length refuses it.

    Raises UserError if a batch does not fit in memory.
    """
    requests = [Request("reward", messages, Decoding(0)) for messages in conversations]
    keys = [request.key(model.name) for request in requests]
    by_key = dict(zip(keys, requests, strict=True))
    with Journal(journal_file) as journal:
        answers = {key: journal.find(key, 0) for key in by_key}
        rewards = {key: float(answer.text) for key, answer in answers.items() if answer}
        missing = {key: request for key, request in by_key.items() if key not in rewards}
        if missing:
            asyncio.run(_score_missing(model, missing, rewards, journal, batch_size))
    return [rewards.get(key) for key in keys]


async def _score_missing(
    model: RewardModel, missing: dict[bytes, Request], rewards: dict[bytes, float], journal: Journal, batch_size: int
) -> None:
    """Add the rewards of the missing conversations, batch by batch, to the journal and to `rewards`."""
    with progress_bar("rewards", total=len(rewards) + len(missing), unit="answers", done=len(rewards)) as bar:
        for batch in _batches(model, missing, batch_size):
            began = time.monotonic()
            try:
                scores = model.score([*batch.values()])
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"--reward-model {model.model}: {len(batch)} answers of up to {max(map(len, batch.values())):,} "
                    "tokens do not fit in the GPU's memory. Give a smaller --batch-size; the rewards so far are in the "
                    "journal."
                ) from error
            if not all(map(math.isfinite, scores)):
                raise UserError(f"--reward-model {model.model}: its rewards are not finite numbers.")
            seconds = time.monotonic() - began
            of_batch = dict(zip(batch, scores, strict=True))
            answers = {key: Answer(repr(reward), "stop", None, len(batch[key]), 0, seconds)
                       for key, reward in of_batch.items()}  # fmt: skip
            await asyncio.gather(
                *(journal.add(key, model.name, missing[key], answer) for key, answer in answers.items())
            )
            rewards |= of_batch
            bar.advance(len(batch))


def _batches(model: RewardModel, requests: dict[bytes, Request], size: int) -> Iterator[dict[bytes, list[int]]]:
    """Yield the tokens of batches of similar length, the longest first. Prints a warning about those left out."""
    positions = getattr(model.weights.config.get_text_config(), "max_position_embeddings", None) or math.inf
    tokenized: dict[bytes, list[int]] = {}
    for key, request in requests.items():
        try:
            text = model.tokenizer.apply_chat_template([dict(turn) for turn in request.messages], tokenize=False)
        except Exception as error:  # templates raise errors of their own
            raise UserError(f"--reward-model {model.model}: its chat template refuses a row: {error}") from error
        tokenized[key] = model.tokenizer(text, add_special_tokens=False).input_ids
    fitting = [key for key, ids in tokenized.items() if len(ids) <= positions]
    fitting.sort(key=lambda key: -len(tokenized[key]))
    if left_out := len(tokenized) - len(fitting):
        longer = format_count(left_out, "answer", "is longer", "are longer")
        print(f"warning: {longer} than the {positions:,} positions of {model.model}: no reward", flush=True)
    for start in range(0, len(fitting), size):
        yield {key: tokenized[key] for key in fitting[start : start + size]}
