"""A saved model that answers in this process: which one it is, and batches of answers from it."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from train.data.chat.system_role import SystemRole, apply_system_role
from train.data.chat.template import use_template
from train.errors import UserError, replace_in_errors
from train.evaluation.models.options import LocalModel
from train.llm.client import RequestFailed
from train.llm.journal import Answer, Decoding
from train.model.inference import Generated, generate_batch
from train.model.load import load_config, load_saved
from train.model.tokenizer import load_tokenizer
from train.recipe import ModelSection

Messages = Sequence[Mapping[str, Any]]

KNOWN_EXTRA = ("top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "chat_template_kwargs")
"""What else of a request's decoding a model in this process knows, beside OpenAI's names."""

_TEXT_FILES = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer.model")

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
"""What every kind of tokenizer has at least one of."""


def open_tokenizer(model: str, template: str | None, system_role: SystemRole) -> PreTrainedTokenizerBase:
    """The tokenizer of --model (`tokenizer_of`), with the template and policy asked for.

    Raises UserError where there is none, and where its template would lose system messages.
    """
    tokenizer = tokenizer_of(model)
    use_template(tokenizer, template)
    apply_system_role(tokenizer, system_role)
    return tokenizer


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of --model; of an adapter's folder without one, its base's. Raises UserError where neither has one.

    peft saves none; our trainer does, as an adapter may be trained under another template than its base's.
    """
    base = base_of(model)
    own = base is None or any(path for kind in _TOKENIZER_FILES for path in Path(model).glob(kind))
    named = f"--model {model}" if own else f"--model {model} has no tokenizer of its own, nor can its base's be had"
    with replace_in_errors({"model.name_or_path": named}):
        return load_tokenizer(ModelSection(name_or_path=model if own or base is None else base))


def base_of(model: str) -> str | None:
    """The model that an adapter's folder names as its base; None of what is no such folder. Raises UserError."""
    adapter = Path(model) / "adapter_config.json"
    if not adapter.is_file():
        return None
    try:
        base = json.loads(adapter.read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(f"--model {model}: {adapter} names no base model")
    return base


class LocalGenerator:
    """A checkpoint whose tokenizer is there; its weights are loaded with the first batch.

    Raises UserError where it can't be opened, and where its template would lose system messages.
    """

    def __init__(self, checkpoint: LocalModel) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = open_tokenizer(checkpoint.model, checkpoint.template, checkpoint.system_role)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        told_apart = [fingerprint(checkpoint.model), str(self.tokenizer.chat_template), checkpoint.dtype]
        digest = hashlib.blake2b(json.dumps(told_apart).encode(), digest_size=6).hexdigest()
        self.name = f"{checkpoint.model}@{digest}"
        """What the journal knows it by."""

    @cached_property
    def _model(self) -> Any:
        return load_saved(self.checkpoint.model, self.checkpoint.dtype)

    def answers(
        self, asked: Mapping[bytes, Messages], decoding: Decoding
    ) -> Iterator[dict[bytes, Answer | RequestFailed]]:
        """The answer to each of the conversations, batch by batch, by the keys of `asked`.

        Prompts of like length share a batch, the longest first: what doesn't fit in memory doesn't fit at once. What
        is drawn depends on the keys that share a batch, and on nothing else.
        """
        options = decoding.extra.get("chat_template_kwargs", {})
        prompts: dict[bytes, str] = {}
        refused: dict[bytes, Answer | RequestFailed] = {}
        for key, messages in asked.items():
            try:
                prompts[key] = self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **options
                )
            except Exception as fault:  # whatever a template's author lets it raise
                refused[key] = RequestFailed(f"the chat template refuses it: {fault}")
        lengths = {
            key: len(self.tokenizer(prompt, add_special_tokens=False).input_ids) for key, prompt in prompts.items()
        }
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", math.inf)
        for key, length in lengths.items():
            if length >= positions:
                refused[key] = RequestFailed(f"the prompt has {length:,} tokens; the model was made for {positions:,}")
        if refused:
            yield refused
        waiting = sorted((key for key in prompts if key not in refused), key=lambda key: -lengths[key])
        # Those that may come to the model's last position are by themselves: it ends them, and no others.
        alone = [key for key in waiting if lengths[key] + decoding.max_tokens > positions]
        rest = waiting[len(alone) :]
        size = self.checkpoint.batch_size
        for batch in [[key] for key in alone] + [rest[start : start + size] for start in range(0, len(rest), size)]:
            longest = max(lengths[key] for key in batch)
            room = int(min(decoding.max_tokens, positions - longest))
            began = time.monotonic()
            try:
                written = self._write(batch, [prompts[key] for key in batch], room, decoding)
            except torch.OutOfMemoryError as fault:
                raise UserError(
                    f"{self.checkpoint.model}: {len(batch)} prompts of up to {longest:,} tokens with answers of "
                    f"{room:,} don't fit in the GPU's memory. Give a smaller --batch-size; what was answered is in "
                    "the journal."
                ) from fault
            seconds = time.monotonic() - began
            yield {
                key: _as_answer(generated, decoding.stop, lengths[key], seconds)
                for key, generated in zip(batch, written, strict=True)
            }

    def _write(self, keys: Sequence[bytes], prompts: Sequence[str], room: int, decoding: Decoding) -> list[Generated]:
        seed = int.from_bytes(hashlib.blake2b(b"".join(keys), digest_size=7).digest(), "big")
        model = self._model
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return generate_batch(model, self.tokenizer, prompts, max_new_tokens=room, sampling=_sampling(decoding))


def _as_answer(generated: Generated, stops: Sequence[str], prompt_tokens: int, seconds: float) -> Answer:
    """As a server would have it: the text ends before what stopped it."""
    end = min((place for stop in stops if (place := generated.text.find(stop)) >= 0), default=None)
    reason = "length" if generated.cut and end is None else "stop"
    return Answer(generated.text[:end], reason, None, prompt_tokens, generated.tokens, seconds)


def _sampling(decoding: Decoding) -> dict[str, Any]:
    """As transformers' generate has it: greedy at temperature 0, the model's own where nothing is said."""
    extra = {name: value for name, value in decoding.extra.items() if name != "chat_template_kwargs"}
    sampling: dict[str, Any] = dict(extra)
    if decoding.stop:
        sampling["stop_strings"] = list(decoding.stop)
    if decoding.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | sampling
    if decoding.temperature is not None:
        sampling |= {"do_sample": True, "temperature": decoding.temperature}
    if decoding.top_p is not None:
        sampling["top_p"] = decoding.top_p
    return sampling


def fingerprint(model: str) -> list[Any]:
    """What tells a checkpoint from another, trained anew in the same folder say: its files, of an adapter its base's.

    Of weights, names, sizes and times; copying them elsewhere may make them others. Of a hub id, the commit.
    """
    folder = Path(model)
    if not folder.is_dir():
        return [model, getattr(load_config(ModelSection(name_or_path=model)), "_commit_hash", None)]
    weights = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))
    ]
    texts = [
        (name, hashlib.blake2b((folder / name).read_bytes(), digest_size=16).hexdigest())
        for name in _TEXT_FILES
        if (folder / name).is_file()
    ]
    base = base_of(model)
    return [weights, texts, base and fingerprint(base)]
