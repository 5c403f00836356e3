"""Weights in a model's files that are not part of the model of its config.json, which transformers ignores.

Ignored layers or biases of the model's own change the model and are an error. Other parts (heads for multi-token
prediction, value heads, towers) are reported.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from train.model.folder import INDEX, WEIGHTS, read_json

if TYPE_CHECKING:  # importing them takes seconds, which `--check` on a warm cache does without
    from transformers import PreTrainedConfig, PreTrainedModel


_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""PyTorch's names of the types in safetensors files."""


def read_weight_names(folder: Path) -> list[str]:
    """Return the names of the weights in a local model's safetensors files; empty without such files."""
    if (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, "numpy") as tensors:
            return list(tensors.keys())
    return list(read_json(folder / INDEX).get("weight_map", ()))


def read_weight_dtype(folder: Path) -> str | None:
    """Return the type of the first weight of floating point numbers in a local model; None without safetensors."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if dtype := _DTYPES.get(tensors.get_slice(name).get_dtype()):
                    return dtype
    return None


def left_out(model: "PreTrainedModel", config: "PreTrainedConfig", names: Iterable[str]) -> str | None:
    """Return a sentence on layers and biases in the files that `model` lacks; None if there are none.

    `names`: of the weights in its files; `config`: as in its config.json.
    """
    dropped = sorted(_left_out(model, config, names))
    if not dropped:
        return None
    return (
        f"its files hold weights of the model that its config.json leaves out: {listed(dropped)}. They would be lost. "
        "Get the config.json that belongs to these weights, or weights that were saved with this one."
    )


def listed(names: list[str]) -> str:
    """Return the first of the names, and the number of others."""
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def _left_out(model: "PreTrainedModel", config: "PreTrainedConfig", names: Iterable[str]) -> Iterator[str]:
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    of_any_layer = {_of_any_layer(name) for name in own}
    on_purpose = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    text = config.get_text_config()
    layers, predictors = (
        getattr(text, key, None) or 0 for key in ("num_hidden_layers", "num_nextn_predict_layers")
    )  # the latter follow the layers under the same names (DeepSeek-V3, GLM-4.5)
    quantized = bool(getattr(config, "quantization_config", None))  # GPTQ writes biases of zeros
    prefix = f"{model.base_model_prefix}."
    for name in names:
        spellings = {name, f"{prefix}{name}", name.removeprefix(prefix)}
        if spellings & own or any(pattern.search(name) for pattern in on_purpose):
            continue
        number = re.search(r"\blayers\.(\d+)\.", name)
        if number and layers <= int(number[1]) < layers + predictors:
            continue
        linear = {f"{spelling.removesuffix('.bias')}.weight" for spelling in spellings if spelling.endswith(".bias")}
        if {_of_any_layer(spelling) for spelling in spellings} & of_any_layer or (linear & own and not quantized):
            yield name


def _of_any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
