"""Models to trace: the run's own model class on fake tensors, with a few of its layers.

Layers of one kind have the same modules, shapes and settings. A trace needs the first layer, one of each kind after it,
and the last one: all others keep and free what another layer of their kind does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from train.model.adapters import lora_config
from train.model.attention import torch_varlen
from train.model.attention.selection import attention_needs, choose_attention, machine
from train.model.text_part import build_meta_model, find_idle_parameters, freeze, output_layer
from train.recipe import QuantizationSection, Recipe

_FLASH = "traced_varlen"
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number", "layer_index")
"""Attributes that number the layers and say nothing on their kind."""
_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit layers."""


@dataclass(frozen=True)
class LayerKinds:
    """Kinds of all decoder layers, and those to trace.

    - `kinds`: number of the kind of each layer;
    - `traced`: indices of the layers to trace, ascending: all, or the first, one of each kind after it, and the last.
    """

    kinds: tuple[int, ...]
    traced: tuple[int, ...]

    def representatives(self) -> list[int]:
        """Return for each layer the place in `traced` of one like it: the first and the last stand for themselves."""
        last = len(self.traced) - 1
        by_kind = {self.kinds[layer]: place for place, layer in enumerate(self.traced) if 0 < place < last}
        return [0, *(by_kind[kind] for kind in self.kinds[1:-1]), last]

    def latest(self) -> dict[int, int]:
        """Return for each kind the last place in `traced` of such a layer: the one least like the first."""
        return {self.kinds[layer]: place for place, layer in enumerate(self.traced)}


def find_layers(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """Return the decoder layers; None where they can't be told from other lists of modules."""
    layers = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.get_decoder().children() if isinstance(module, torch.nn.ModuleList)]
    fitting = [modules for modules in lists if len(modules) == layers]
    return fitting[0] if len(fitting) == 1 and len(lists) == 1 else None


def classify_layers(model: PreTrainedModel) -> LayerKinds | None:
    """Return the kinds of the layers of `model`; None where its layers can't be found."""
    layers = find_layers(model)
    if layers is None:
        return None
    config = model.config.get_text_config()
    lists = list(_layer_lists(config).values())
    numbers: dict[str, int] = {}
    kinds = []
    for place, layer in enumerate(layers):
        signature = f"{[values[place] for values in lists]} {_describe(layer)}"
        kinds.append(numbers.setdefault(signature, len(numbers)))
    last = len(kinds) - 1
    traced = {0, last} | {kinds.index(kind, 1, last) for kind in set(kinds[1:last])}
    return LayerKinds(tuple(kinds), tuple(sorted(traced)))


def _layer_lists(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """Return the settings of `config` that are lists with an item for each layer."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    }


def _describe(layer: torch.nn.Module) -> str:
    """Return the types, parameters and settings of the modules of a layer."""
    return repr(
        [
            (
                name,
                type(module).__name__,
                sorted(
                    (key, value)
                    for key, value in vars(module).items()
                    if isinstance(value, bool | int | str) and key not in _INDEX_NAMES
                ),
                [
                    (key, tuple(value.shape), value.requires_grad)
                    for key, value in module.named_parameters(recurse=False)
                ],
            )
            for name, module in layer.named_modules()
        ]
    )


def planned_attention(recipe: Recipe, config: PreTrainedConfig) -> str:
    """Return the kernel that training takes: the recipe's, or that of `auto` on a GPU with the packages installed here.

    Without a GPU here it is the choice for an H100 (compute capability 9.0).
    """
    if recipe.model.attention != "auto":
        return recipe.model.attention
    here = machine()
    here = here if here.capability else replace(here, capability=(9, 0))
    return choose_attention("auto", attention_needs(recipe, config), here).kernel


def traced_kernel(attention: str) -> str:
    """Return the kernel to trace in place of `attention`: flex_attention and all of FlashAttention keep no square."""
    return attention if attention in ("eager", "sdpa") else _FLASH


def _flash_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
    """Call torch's kernel without settings that other kernels of FlashAttention have, and that allocate nothing."""
    for name in ("softcap", "s_aux", "dropout"):
        settings.pop(name, None)
    if settings.get("cu_seq_lens_q") is None:  # code that hands on positions alone: fake ones have no borders
        settings |= _borders(query.shape[2])
    return torch_varlen.attention(module, query, key, value, mask, **settings)


def register_flash_attention() -> None:
    """Register the attention that stands for all kernels of FlashAttention with transformers."""
    AttentionInterface.register(_FLASH, _flash_attention)
    AttentionMaskInterface.register(_FLASH, flash_attention_mask)


def build_model(
    recipe: Recipe, config: PreTrainedConfig, *, weights: str, kernel: str, traced: tuple[int, ...] = ()
) -> PreTrainedModel:
    """Return the model on the meta device: in the dtype `weights`, with the layers `traced` alone (empty = all).

    The adapter of the recipe, its 4-bit layers and its frozen parts are not applied yet.
    """
    model = build_meta_model(config, recipe.model.model_copy(update={"dtype": weights}))
    register_flash_attention()
    model.set_attn_implementation(kernel)
    for module in model.modules():
        kind = getattr(module, "rope_type", None)  # RoPE by the longest position would read a fake number
        if isinstance(kind, str):
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")
    layers = find_layers(model)
    if traced and layers is not None and len(traced) < len(layers):
        text = model.config.get_text_config()
        for name, values in _layer_lists(text).items():
            setattr(text, name, [values[place] for place in traced])
        chosen = [layers[place] for place in traced]
        for place, layer in enumerate(chosen):
            for module in layer.modules():
                for name in _INDEX_NAMES:
                    if hasattr(module, name):
                        setattr(module, name, place)
        del layers[len(chosen) :]
        for place, layer in enumerate(chosen):
            layers[place] = layer
        text.num_hidden_layers = len(traced)
    return model


def prepare_training(model: PreTrainedModel, recipe: Recipe, *, checkpointing: str, adapter: torch.dtype) -> Any:
    """Return `model` as the trainer has it: 4-bit layers, adapter, frozen parts, checkpointing.

    `adapter`: dtype of the adapter's matrices.
    """
    idle = find_idle_parameters(model)
    freeze(model, idle)
    if recipe.quantization:
        _quantize(model, recipe.quantization)
    base = model
    prepared: Any = model
    if recipe.adapter:
        from peft import get_peft_model

        with torch.device("meta"):
            prepared = get_peft_model(model, lora_config(recipe.adapter, model, idle))
        for name, parameter in prepared.named_parameters():
            if ".lora_" in name and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(adapter)
    prepared.train()
    if checkpointing == "selective":
        from trl.models import enable_selective_activation_checkpointing

        enable_selective_activation_checkpointing(base)
    if checkpointing != "none":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.adapter:
            prepared.enable_input_require_grads()
    return prepared


def _quantize(model: PreTrainedModel, section: QuantizationSection) -> None:
    """Replace the linear layers but the output layer by bitsandbytes' 4-bit ones, without weights."""
    import bitsandbytes

    output = output_layer(model)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, torch.nn.Linear) and module is not output:
                layer = bitsandbytes.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    torch.float32 if section.bnb_4bit_compute_dtype == "float32" else torch.bfloat16,
                    compress_statistics=section.bnb_4bit_use_double_quant,
                    quant_type=section.bnb_4bit_quant_type,
                    quant_storage=getattr(torch, section.bnb_4bit_quant_storage),
                    device="meta",
                )
                layer.requires_grad_(False)
                setattr(parent, name, layer)
    model.is_loaded_in_4bit = True


@contextmanager
def fake_tensors(model: torch.nn.Module) -> Iterator[None]:
    """Context in which tensors are fake, those of `model` included. It is of no use after it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        replaced: dict[int, Any] = {}  # tied weights stay tied
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = _fake_parameter(parameter, module)
                module.register_parameter(name, replaced[id(parameter)])
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
        yield


def _fake_parameter(parameter: torch.nn.Parameter, module: Any) -> torch.nn.Parameter:
    """Return a fake tensor like `parameter`; of a 4-bit weight the packed one, with the scales that its layer reads."""
    if type(parameter).__name__ != "Params4bit":
        return torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
    from bitsandbytes.functional import QuantState

    settings: dict[str, Any] = vars(parameter)
    shape = torch.Size((module.out_features, module.in_features))
    storage, nested = settings["quant_storage"], settings["compress_statistics"]
    scales = -(-shape.numel() // _BLOCK)
    packed = torch.empty((-(-shape.numel() // (2 * storage.itemsize)), 1), dtype=storage)
    inner = QuantState(torch.empty(-(-scales // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    weight: Any = torch.nn.Parameter(packed, requires_grad=False)
    weight.quant_state = QuantState(
        torch.empty(scales, dtype=torch.uint8 if nested else torch.float32), shape=shape, code=torch.empty(16),
        blocksize=_BLOCK, quant_type=settings["quant_type"], dtype=module.compute_dtype,
        offset=torch.empty(()) if nested else None, state2=inner if nested else None,
    )  # fmt: skip
    return weight


def is_flash(kernel: str) -> bool:
    """Return whether `kernel` stands for FlashAttention."""
    return kernel == _FLASH


def build_inputs(model: PreTrainedModel, kernel: str, tokens: int, rows: int) -> dict[str, Any]:
    """Return the inputs of the backbone: equal rows, with the borders of documents for FlashAttention."""
    length = tokens // rows
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(rows, length, dtype=torch.long),
        "position_ids": torch.arange(length)[None].expand(rows, length).contiguous(),
    }
    if kernel == _FLASH:
        inputs |= _borders(length)
    return inputs


def _borders(longest: int) -> dict[str, Any]:
    """Return the borders of eight documents, as TRL's collator names them."""
    borders = torch.empty(9, dtype=torch.int32)
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
