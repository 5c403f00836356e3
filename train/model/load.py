"""Load a model from a folder or the hub: safetensors and no code of its own, unless the recipe allows it."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from train.errors import UserError, noted_elsewhere
from train.model.adapters import check_adapter, quantization_config
from train.model.attention.selection import attention_needs, choose_attention, machine, select_attention
from train.model.attention.sequence_parallel import check_sequence_parallel, register
from train.model.classifier import SCORE_WEIGHT, as_classifier, find_score_head, is_classifier
from train.model.cpu_memory import keep_freed_memory
from train.model.float8 import check_float8, check_float8_start, convert
from train.model.folder import adapter_base, is_adapter_alone, read_json
from train.model.hub_kernels import check_layer_kernels
from train.model.pretrained import optional_file, origin, reading, unloadable
from train.model.quantized_weights import (
    check_quantized,
    describe_quantized,
    quantization_to_load,
    read_saved_quantization,
)
from train.model.text_part import auto_model_class, build_meta_model, describe_idle, find_idle_parameters
from train.model.unloaded_weights import left_out, listed, read_weight_dtype, read_weight_names
from train.ranks import is_first_rank
from train.recipe import ModelSection, Recipe


def disable_bars_in_logs() -> None:
    """Disable transformers' progress bars if the output is a log file, where they write one long line."""
    if not sys.stdout.isatty():
        transformers_logging.disable_progress_bar()


def load_config(model: ModelSection) -> PreTrainedConfig:
    """Return the model's config. Raises UserError if there is none that can be opened."""
    with reading(model, "config.json"):
        return AutoConfig.from_pretrained(**origin(model))


def trained_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the config of the model that a recipe trains: its model's, or that of a reward model on it.

    Raises UserError if there is none.
    """
    config = load_config(recipe.model)
    return as_classifier(config, recipe.model.name_or_path) if recipe.trains_reward_model else config


def copy_processor(model: ModelSection, folder: Path) -> list[str]:
    """Copy the processor files of a multimodal model to `folder`; return their names.

    Without them no server loads a model that has a tower for images or sound.
    """
    copied = []
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        file = optional_file(model, name)
        if file and Path(file).parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / name)
            copied.append(name)
    return copied


class CheckedModel(NamedTuple):
    """Facts of a model that a recipe can train on this machine."""

    notes: list[str]
    """Sentences for the start screen: parameters that are not trained, weights that are unpacked, and what was not
    checked on this machine."""
    embeddings: int
    """Entries of the input embedding: token ids must be smaller."""
    dtype: str
    """Type of the weights once they are loaded: model.dtype, and for auto that of the files."""


def check_model(recipe: Recipe, *, elsewhere: bool = False) -> CheckedModel:
    """Check that this machine can train the model as the recipe says, without its weights.

    `elsewhere`: another machine will, so that a device or package that this one lacks is a note.
    Raises UserError for a missing kernel or package, a model of another kind, quantized weights that can't be trained,
    weights that its config.json leaves out, names in `adapter` that the model lacks, sequences longer than its
    positions, and heads that `model.sequence_parallel` doesn't divide.
    """
    lacks: list[str] = []
    with noted_elsewhere(lacks, elsewhere=elsewhere):
        quantization_config(recipe.quantization)
    with noted_elsewhere(lacks, elsewhere=elsewhere):
        check_float8(recipe)
    with noted_elsewhere(lacks, elsewhere=elsewhere):
        check_layer_kernels(recipe.model)
    config = trained_config(recipe)
    with reading(recipe.model, "config.json"):
        _check_kind(recipe, config)
        check_quantized(recipe, config)
        bare = build_meta_model(config, recipe.model)
    if recipe.trains_reward_model and find_score_head(bare) is None:
        raise UserError(f"model.name_or_path: {type(bare).__name__} has no head `score`. Name another model.")
    if dropped := left_out(bare, config, read_weight_names(Path(recipe.model.name_or_path))):
        raise unloadable(recipe.model, ValueError(dropped))
    idle = find_idle_parameters(bare)
    check_adapter(recipe.adapter, bare, idle)
    needs = attention_needs(recipe, config)
    kernel = recipe.model.attention
    with noted_elsewhere(lacks, elsewhere=elsewhere):
        choice = choose_attention(kernel, needs, machine())
        kernel = kernel if elsewhere else choice.kernel  # there `auto` may choose another
    check_sequence_parallel(recipe, bare, needs, kernel)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions and recipe.data.max_length > positions:
        raise UserError(
            f"data.max_length: {recipe.data.max_length:,} is more than the {positions:,} positions of "
            f"{recipe.model.name_or_path}. Write {positions} or less."
        )
    notes = (describe_quantized(config, recipe.model.dtype), describe_idle(bare, idle))
    dtype = loaded_dtype(recipe.model, config)
    return CheckedModel([*filter(None, notes), *lacks], text.vocab_size, dtype)


def loaded_dtype(model: ModelSection, config: PreTrainedConfig) -> str:
    """Return the type that the weights have once they are loaded, as transformers finds it.

    Of `auto` the type in config.json, or that of the first weights in a local file. Where neither is known: float32.
    """
    if model.dtype != "auto":
        return model.dtype
    if config.dtype is not None:
        return str(config.dtype).removeprefix("torch.")
    return read_weight_dtype(Path(model.name_or_path)) or "float32"


def _check_kind(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise UserError for a model that isn't a decoder with an output layer, which a reward model doesn't need."""
    name = recipe.model.name_or_path
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise UserError(
            f"model.name_or_path: {name} is an encoder-decoder model ({config.model_type}). Name a decoder-only one."
        )
    if recipe.trains_reward_model:
        return
    saved_as = (config.architectures or [""])[0]
    head = re.search(
        r"For(?:Sequence|Token|Image|Audio)\w*Classification$|ForQuestionAnswering$|ForMaskedLM$", saved_as
    )
    if head or (saved_as.endswith("Model") and not config.get_text_config().tie_word_embeddings):
        has = f"the output layer of {saved_as}" if head else "no output layer"
        raise UserError(
            f"model.name_or_path: {name} was saved as {saved_as}: it has {has}, so the layer that predicts tokens "
            "would be random. Name the original model, with its language model's output layer."
        )


def load_model(recipe: Recipe) -> PreTrainedModel:
    """Load the weights in the dtype, attention kernel, quantization and float8 mode of the recipe.

    Under DeepSpeed ZeRO-3 the training arguments must exist before: then no rank holds the complete model.
    Raises UserError if the weights can't be opened, belong to another model, or are pickled without the recipe's
    permission, and if the recipe asks for float8 on a machine without it.
    """
    disable_bars_in_logs()
    model = recipe.model
    check_float8_start(recipe)
    config = trained_config(recipe)
    attention = select_attention(recipe, config)
    settings: dict[str, Any] = {**attention.load_arguments, "dtype": getattr(torch, model.dtype, "auto")}
    settings["use_safetensors"] = None if model.allow_pickle else True
    quantization = quantization_to_load(config)
    if read_saved_quantization(config) is None:
        quantization = quantization_config(recipe.quantization)
    if quantization is not None:
        settings["quantization_config"] = quantization
    new_head = recipe.trains_reward_model and not is_classifier(load_config(model))
    if new_head:
        torch.manual_seed(recipe.seed)
    try:
        loaded, others = _load_complete(config, {**origin(model), **settings}, new_head=new_head)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if not model.allow_pickle and _has_pickled_weights(model.name_or_path):
            raise UserError(
                f"model.name_or_path: {model.name_or_path} holds its weights in pickle files, which can run code when "
                "they are opened. Use a safetensors version; if you trust them, write `model.allow_pickle: true`."
            ) from error
        raise unloadable(model, error) from error
    if others and is_first_rank():
        print(
            f"weights that are not part of {type(loaded).__name__} are neither loaded nor saved: {listed(others)}",
            flush=True,
        )
    if model.sequence_parallel > 1:
        register(loaded.config._attn_implementation)
    if model.float8 is not None:
        convert(loaded, model.float8)
    if recipe.trains_reward_model:  # it has none, and TRL's SFTTrainer writes the padding token there
        loaded.generation_config = GenerationConfig()
    return loaded


def _load_complete(
    config: PreTrainedConfig, settings: dict[str, Any], *, new_head: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """Load the model of `config` with all of its weights; return the names of other weights in its files too.

    `new_head`: it is a reward model whose files lack the score head, which is initialized at random.
    Raises ValueError if the files lack weights, have other shapes, or hold layers that `config` leaves out.
    transformers would initialize what is missing at random, ignore the rest and continue.
    """
    if new_head:
        settings = {**settings, "config": config}
    loaded, report = auto_model_class(config).from_pretrained(
        **settings, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if missing := sorted(set(report["missing_keys"]) - ({SCORE_WEIGHT} if new_head else set())):
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ValueError(
            f"its files lack weights that {type(loaded).__name__} has: {missing[0]}{more}. They are those of another "
            "kind of model, or are incomplete."
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, in_file, in_model = mismatched[0]
        raise ValueError(
            f"{name} is {' x '.join(map(str, in_file))} in its files, and its config.json asks for "
            f"{' x '.join(map(str, in_model))}. Weights and config.json are not of the same model."
        )
    others = sorted(report["unexpected_keys"])
    if dropped := left_out(loaded, config, others):
        raise ValueError(dropped)
    return loaded, others


def is_reward_model(name: str) -> bool:
    """Return whether a model or adapter, in a folder or on the hub, was saved as a reward model."""
    if is_adapter_alone(Path(name)):
        return read_json(Path(name, "adapter_config.json")).get("task_type") == "SEQ_CLS"
    config = AutoConfig.from_pretrained(name)
    return is_classifier(config) and config.num_labels == 1


def load_saved(name: str, dtype: str | None = None, *, scores: bool = False) -> PreTrainedModel:
    """Load a model for inference, on a GPU if there is one.

    - `name`: folder or hub id of a model, or folder of an adapter, whose base is loaded with it;
    - `dtype`: float32 or bfloat16; None = bfloat16 on a GPU and float32 on a CPU;
    - `scores`: it must be a reward model; else a language model.

    Raises UserError if it can't be loaded.
    """
    disable_bars_in_logs()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    chosen = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    # With a config.json beside it transformers would look for the base's weights in the adapter's folder.
    base = adapter_base(Path(name)) if is_adapter_alone(Path(name)) else None
    settings = {"pretrained_model_name_or_path": base or name, "dtype": chosen, "use_safetensors": True}
    try:
        config = AutoConfig.from_pretrained(base or name)
        if scores and not is_reward_model(name):
            raise ValueError("it is no reward model")
        if not scores and (is_classifier(config) or is_reward_model(name)):
            raise ValueError("it is a reward model or another classifier, which writes no answers")
        new_head = scores and not is_classifier(config)  # the adapter has it
        if new_head:
            config = as_classifier(config, name)
        if quantization := quantization_to_load(config):
            settings["quantization_config"] = quantization
        loaded, _ = _load_complete(config, settings, new_head=new_head)
        if base:
            loaded.load_adapter(name)
        return loaded if read_saved_quantization(loaded.config) else loaded.to(device)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{name}: can't be loaded: {' '.join(str(error).split())}") from error


def _has_pickled_weights(name: str) -> bool:
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return False
    return any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
