"""Local models: their tokenizer, their fingerprint, and batches of answers generated in this process."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from train.data.chat.system_role import SystemRole
from train.errors import UserError, replace_in_errors
from train.evaluation.models.options import LocalModel
from train.llm.failures import RequestFailed
from train.llm.request import Answer, Decoding
from train.model.inference import Generated, generate_batch
from train.model.load import load_config, load_saved
from train.model.tokenizer import apply_chat_section, load_tokenizer
from train.recipe import ChatSection, ModelSection

Messages = Sequence[Mapping[str, Any]]

KNOWN_EXTRA = ("top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "chat_template_kwargs")
"""Request fields that generation in this process supports, besides OpenAI's names."""

_TEXT_FILES = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer.model")

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
"""Every kind of tokenizer has at least one of these files."""


def open_tokenizer(model: str, template: str | None, system_role: SystemRole) -> PreTrainedTokenizerBase:
    """Return the tokenizer of --model (`load_tokenizer_of`) with the given template and system role.

    Raises UserError if there is none, or if its template would lose system messages.
    """
    tokenizer = load_tokenizer_of(model)
    apply_chat_options(tokenizer, template, system_role)
    return tokenizer


def apply_chat_options(tokenizer: PreTrainedTokenizerBase, template: str | None, system_role: SystemRole) -> None:
    """Give `tokenizer` the template of --template and --system-role. Raises UserError that names these options."""
    options = {
        f"chat.system_role: {system_role}: ": f"--system-role {system_role}: ",
        "chat.template: ": "--template: ",
        "`chat.template`": "--template",
        ", or `error` if no row has one": "",
        "leave the key out": "leave it out",
    }
    with replace_in_errors(options):
        apply_chat_section(tokenizer, ChatSection(template=template, system_role=system_role))


def load_tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of --model, or of its base for an adapter without one. Raises UserError if there is none.

    peft saves no tokenizer. Our trainer does, as an adapter may be trained with another template than its base.
    """
    base = base_of(model)
    own = base is None or any(path for kind in _TOKENIZER_FILES for path in Path(model).glob(kind))
    option = (
        f"--model {model}" if own else f"--model {model} has no tokenizer, and its base has none that can be loaded"
    )
    with replace_in_errors({"model.name_or_path": option}):
        return load_tokenizer(ModelSection(name_or_path=model if own or base is None else base))


def base_of(model: str) -> str | None:
    """Return the base model of an adapter's folder; None for anything else. Raises UserError if it names none."""
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
    """Generates answers with a local model; loads the weights with the first batch.

    `name`: the model's name in the journal, with a digest of its files, template and dtype. Folders `x/` and `./x` are
    `x` there. Raises UserError if the tokenizer cannot be loaded, or if its template would lose system messages.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.tokenizer = open_tokenizer(model.model, model.template, model.system_role)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.name = journal_name(model.model, self.tokenizer, model.dtype)

    @cached_property
    def weights(self) -> Any:
        """Return the model itself, loaded at the first use."""
        return load_saved(self.model.model, self.model.dtype)

    def answers(
        self, conversations: Mapping[bytes, Messages], decoding: Decoding
    ) -> Iterator[dict[bytes, Answer | RequestFailed]]:
        """Yield the answers batch by batch, by the keys of `conversations`.

        Prompts of similar length share a batch, the longest first, so that a lack of memory shows at once. Sampling
        depends only on the keys that share a batch. Raises UserError if a batch does not fit in memory.
        """
        options = decoding.extra.get("chat_template_kwargs", {})
        prompts: dict[bytes, str] = {}
        refused: dict[bytes, Answer | RequestFailed] = {}
        for key, messages in conversations.items():
            try:
                prompts[key] = self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **options
                )
            except Exception as error:  # templates raise errors of their own
                refused[key] = RequestFailed(f"the chat template refuses it: {error}")
        lengths = {
            key: len(self.tokenizer(prompt, add_special_tokens=False).input_ids) for key, prompt in prompts.items()
        }
        positions = getattr(self.weights.config.get_text_config(), "max_position_embeddings", math.inf)
        for key, length in lengths.items():
            if length >= positions:
                refused[key] = RequestFailed(f"the prompt has {length:,} tokens; the context length is {positions:,}")
        if refused:
            yield refused
        waiting = sorted((key for key in prompts if key not in refused), key=lambda key: -lengths[key])
        # Prompts that may reach the context length are batches of one: it cuts their answer, and no others.
        singles = [key for key in waiting if lengths[key] + decoding.max_tokens > positions]
        rest = waiting[len(singles) :]
        size = self.model.batch_size
        for batch in [[key] for key in singles] + [rest[start : start + size] for start in range(0, len(rest), size)]:
            longest = max(lengths[key] for key in batch)
            max_new_tokens = int(min(decoding.max_tokens, positions - longest))
            began = time.monotonic()
            try:
                generated = self._generate(batch, [prompts[key] for key in batch], max_new_tokens, decoding)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{self.model.model}: {len(batch)} prompts of up to {longest:,} tokens with answers of "
                    f"{max_new_tokens:,} do not fit in the GPU's memory. Give a smaller --batch-size; the answers so "
                    "far are in the journal."
                ) from error
            seconds = time.monotonic() - began
            yield {
                key: _as_answer(text, decoding.stop, lengths[key], seconds)
                for key, text in zip(batch, generated, strict=True)
            }

    def _generate(
        self, keys: Sequence[bytes], prompts: Sequence[str], max_new_tokens: int, decoding: Decoding
    ) -> list[Generated]:
        seed = int.from_bytes(hashlib.blake2b(b"".join(keys), digest_size=7).digest(), "big")
        model, sampling = self.weights, _sampling_arguments(decoding)
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return generate_batch(model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)


def _as_answer(generated: Generated, stops: Sequence[str], prompt_tokens: int, seconds: float) -> Answer:
    """Return the answer as a server would: the text ends before the stop sequence."""
    end = min((position for stop in stops if (position := generated.text.find(stop)) >= 0), default=None)
    reason = "length" if generated.cut and end is None else "stop"
    return Answer(generated.text[:end], reason, None, prompt_tokens, generated.tokens, seconds)


def _sampling_arguments(decoding: Decoding) -> dict[str, Any]:
    """Return arguments of transformers' generate: greedy at temperature 0, the model's own settings by default."""
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


def journal_name(model: str, tokenizer: PreTrainedTokenizerBase, dtype: str | None) -> str:
    """Return the model's name in a journal, with a digest of its files, template and dtype."""
    identity = [fingerprint(model), str(tokenizer.chat_template), dtype]
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=6).hexdigest()
    return f"{os.path.normpath(model)}@{digest}"


def fingerprint(model: str) -> list[Any]:
    """Return what identifies a model, such as one trained again in the same folder: its files, and those of its base.

    Weights count by name, size and time, so a copy may count as another model. A hub id counts by its commit.
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
