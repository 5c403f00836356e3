"""Models whose weights are saved quantized: checks whether they can be trained, and how to load them.

By the quantization_config of the model:

- 4 or 8 bits of bitsandbytes, and other methods that transformers trains under an adapter: LoRA on these weights;
- methods that transformers can undo while loading (FP8, MXFP4): weights in the recipe's dtype, trained in any way;
- other methods, and those whose package is missing: a UserError.
"""

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from train.errors import UserError
from train.recipe import QuantizationSection, Recipe


def read_saved_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the quantization that the weights of `config` were saved with; None if they are not quantized."""
    for part in (config, config.get_text_config()):
        declared = getattr(part, "quantization_config", None)
        if declared:
            return dict(declared) if isinstance(declared, dict) else dict(declared.to_dict())
    return None


def check_quantized(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise UserError if the weights are saved in a form that can't be trained on this machine as the recipe says."""
    declared = read_saved_quantization(config)
    if declared is None:
        return
    name = recipe.model.name_or_path
    method = _method(declared)
    problem = f"model.name_or_path: the weights of {name} are quantized ({method})"
    original = "name the model that it was quantized from"
    if method not in AUTO_QUANTIZER_MAPPING:
        raise UserError(f"{problem}, which the installed transformers doesn't load. Instead {original}.")
    if recipe.quantization is not None:
        _check_section(recipe.quantization, declared, name)
    try:
        quantizer = AutoHfQuantizer.from_config(_as_loaded(declared), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
        trainable = quantizer.is_trainable
    except (ImportError, RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise UserError(f"{problem}: {' '.join(str(error).split()).rstrip('.')}. Or {original}.") from error
    if getattr(quantizer.quantization_config, "dequantize", False):
        return
    if not trainable:
        raise UserError(f"{problem}, and no adapter can be trained on such weights. Instead {original}.")
    if recipe.adapter is None:
        raise UserError(
            f"{problem}, and such weights can't be trained in full. Add `adapter: {{r: 16}}` (LoRA on top of them), or "
            f"{original}."
        )
    if recipe.model.float8:
        raise UserError(f"model.float8: the weights of {name} are quantized ({method}). Write null.")


def quantization_to_load(config: PreTrainedConfig) -> QuantizationConfigMixin | None:
    """Return the `quantization_config` to load quantized weights with; None = don't pass any.

    Passing `quantization_config=None` would make transformers forget the model's own.
    """
    declared = read_saved_quantization(config)
    as_loaded = _as_loaded(declared) if declared else None
    return as_loaded if getattr(as_loaded, "dequantize", False) else None


def with_saved_quantization(recipe: Recipe, config: PreTrainedConfig) -> Recipe:
    """Return the recipe with the `quantization` of a base that was saved in 4 bits by bitsandbytes.

    It is for reports, plans and checks of settings; runs are compared by the recipe as written.
    """
    declared = read_saved_quantization(config)
    if declared is None or recipe.quantization is not None or _method(declared) != "bitsandbytes_4bit":
        return recipe
    return recipe.model_copy(update={"quantization": QuantizationSection.model_construct(**_bitsandbytes(declared))})


def describe_quantized(config: PreTrainedConfig, dtype: str) -> str | None:
    """Return a sentence on weights that are unpacked while loading; None if none are."""
    if quantization_to_load(config) is None:
        return None
    into = "" if dtype == "auto" else f" to {dtype}"
    method = _method(read_saved_quantization(config) or {})
    return f"The weights are quantized ({method}) and are unpacked{into} to be trained"


def _method(declared: dict[str, Any]) -> str:
    """Return the name of the method in transformers' table, where bitsandbytes has two entries."""
    if declared.get("load_in_4bit") or declared.get("load_in_8bit"):
        return "bitsandbytes_4bit" if declared.get("load_in_4bit") else "bitsandbytes_8bit"
    method = declared.get("quant_method") or "no method named"
    return str(getattr(method, "value", method))


def _as_loaded(declared: dict[str, Any]) -> QuantizationConfigMixin:
    """Return the quantization with `dequantize`, if transformers supports that; else as saved."""
    plain = AutoQuantizationConfig.from_dict(dict(declared))
    if not hasattr(plain, "dequantize"):
        return plain
    return AutoQuantizationConfig.from_dict({**declared, "dequantize": True})


def _bitsandbytes(declared: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the keys of `quantization` in the saved weights."""
    saved = BitsAndBytesConfig.from_dict(dict(declared))
    values = {name: getattr(saved, name) for name in QuantizationSection.model_fields}
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in values.items()
    }


def _check_section(section: QuantizationSection, declared: dict[str, Any], name: str) -> None:
    if _method(declared) != "bitsandbytes_4bit":
        raise UserError(
            f"quantization: the weights of {name} are quantized already ({_method(declared)}). Take the section out."
        )
    saved = _bitsandbytes(declared)
    for key in sorted(section.model_fields_set):
        if getattr(section, key) != saved[key]:
            raise UserError(
                f"quantization.{key}: the weights of {name} are saved in 4 bits already, with {saved[key]}, and that "
                "can't be changed. Take the key out."
            )
