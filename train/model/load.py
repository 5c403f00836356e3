"""Weights and tokenizer from a folder or the hub: safetensors only and no foreign code, unless the recipe allows it."""

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from train.errors import UserError
from train.model.adapters import quantization_config
from train.model.attention import attention_for, choose_attention, machine, needs_of
from train.model.float8 import check_float8, check_start, convert
from train.recipe import ModelSection, Recipe


def hide_bars_in_logs() -> None:
    """Keep transformers' own progress bars out of a log file, where each step of theirs is a piece of one long line."""
    if not sys.stdout.isatty():
        transformers_logging.disable_progress_bar()


def _origin(model: ModelSection) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": model.name_or_path,
        "revision": model.revision or "main",
        "trust_remote_code": model.trust_remote_code,  # never None: None asks at the terminal and waits
    }


def _refuse(model: ModelSection, fault: Exception) -> UserError:
    """What to tell the user of a model that can't be opened."""
    name, text = model.name_or_path, str(fault).strip()
    if "trust_remote_code" in text:
        return UserError(
            f"model.name_or_path: {name} runs code of its own to load. Read that code; if you trust it, write "
            "`model.trust_remote_code: true`."
        )
    if isinstance(fault, StrictDataclassError):  # the first of its lines names the key, the next ones the value
        return UserError(f"model.name_or_path: {name}: config.json: {' '.join(text.split())} Correct that value.")
    first_line = text.splitlines()[0] if text else type(fault).__name__
    return UserError(f"model.name_or_path: {name} can't be loaded: {first_line}")


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError where there is none that can be opened."""
    path = Path(model.name_or_path)
    looks_local = model.name_or_path.startswith((".", "/", "~")) or len(path.parts) > 2 or Path(path.parts[0]).is_dir()
    if looks_local and not path.is_dir():  # said before the hub is asked, which takes long where there is no network
        raise UserError(
            f"model.name_or_path: there is no folder {path} in {Path.cwd()}. Write a model folder or a hub id."
        )
    try:
        return AutoTokenizer.from_pretrained(**_origin(model))
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as fault:
        raise _refuse(model, fault) from fault


def load_config(model: ModelSection) -> PreTrainedConfig:
    """The model's config. Raises UserError where there is none that can be opened."""
    try:
        return AutoConfig.from_pretrained(**_origin(model))
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as fault:
        raise _refuse(model, fault) from fault


def check_fits(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where the run can't work on this machine or model: found before the data is prepared.

    A kernel or package that is missing, token ids beyond the model's vocabulary, sequences longer than its positions.
    """
    quantization_config(recipe.quantization)
    check_float8(recipe)
    whole = load_config(recipe.model)
    choose_attention(recipe.model.attention, needs_of(recipe, whole), machine())
    config = whole.get_text_config()
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"model.name_or_path: the tokenizer of {recipe.model.name_or_path} has {len(tokenizer):,} tokens, its "
            f"model only {config.vocab_size:,} embeddings. Use the tokenizer that belongs to this model."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and recipe.data.max_length > positions:
        raise UserError(
            f"data.max_length: {recipe.data.max_length:,} is more than the {positions:,} positions that "
            f"{recipe.model.name_or_path} was made for. Write {positions} or less."
        )


def load_model(recipe: Recipe) -> PreTrainedModel:
    """The weights, in the dtype and with the attention kernel of the recipe, quantized or in float8 where it says so.

    Under DeepSpeed ZeRO-3 the training arguments must exist before this is called: then no rank holds the whole model.
    Raises UserError where the weights can't be opened or are pickled and the recipe doesn't allow that, and where this
    machine can't multiply in float8 and the recipe asks for it.
    """
    hide_bars_in_logs()
    model = recipe.model
    check_start(recipe)
    attention = attention_for(recipe, load_config(model))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            **_origin(model),
            dtype=getattr(torch, model.dtype, "auto"),
            attn_implementation=attention.kernel,
            quantization_config=quantization_config(recipe.quantization),
            use_safetensors=None if model.allow_pickle else True,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as fault:
        if not model.allow_pickle and _has_pickled_weights(model.name_or_path):
            raise UserError(
                f"model.name_or_path: {model.name_or_path} holds its weights in pickle files, which can run code when "
                "they are opened. Use a safetensors version; if you trust them, write `model.allow_pickle: true`."
            ) from fault
        raise _refuse(model, fault) from fault
    if model.float8 is not None:
        convert(loaded, model.float8)
    return loaded


def load_saved(name: str, dtype: str | None = None) -> PreTrainedModel:
    """A model as it is used: `name` is a folder or hub id of a whole model or an adapter; on a GPU, if there is one.

    `dtype`: float32 or bfloat16; None = bfloat16 on a GPU and float32 on a CPU. Raises UserError.
    """
    hide_bars_in_logs()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=chosen, use_safetensors=True).to(device)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as fault:
        raise UserError(f"{name}: can't be loaded: {' '.join(str(fault).split())}") from fault


def _has_pickled_weights(name: str) -> bool:
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return False
    return any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
