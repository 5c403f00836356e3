"""LoRA and 4-bit weights: from a recipe's sections to the configurations of peft and bitsandbytes."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from train.errors import MachineError, UserError
from train.model.classifier import find_score_head
from train.model.text_part import find_idle_modules, output_layer
from train.recipe import AdapterSection, QuantizationSection
from train.recipe.yaml_document import closest_match, did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(
    adapter: AdapterSection | None, model: PreTrainedModel | None = None, idle: frozenset[str] = frozenset()
) -> "LoraConfig | None":
    """Return the adapter as a configuration of peft; None for full fine-tuning.

    `idle`: parameters of `model` that text never trains (`find_idle_parameters`); modules of these get no adapter.
    """
    if adapter is None:
        return None
    from peft import LoraConfig

    settings = adapter.model_dump(mode="json")
    if model is not None:
        if outside := find_idle_modules(model, idle):
            settings["exclude_modules"] = rf"(?:{'|'.join(map(re.escape, outside))})(?:\..*)?"
        if adapter.modules_to_save:
            settings["modules_to_save"] = _exact(adapter.modules_to_save, model, outside)
    reward = model is not None and find_score_head(model) is not None  # of which peft trains the head in full
    return LoraConfig(task_type="SEQ_CLS" if reward else "CAUSAL_LM", **settings)


def check_adapter(adapter: AdapterSection | None, model: PreTrainedModel, idle: frozenset[str] = frozenset()) -> None:
    """Raise UserError for a name in target_modules or modules_to_save that matches no trainable module of `model`.

    peft ignores such a name if another one matches. `idle`: as in `lora_config`.
    """
    if adapter is None:
        return
    outside = _inside(find_idle_modules(model, idle))
    modules: dict[str, torch.nn.Module] = dict(model.named_modules())
    adaptable = {name: module for name, module in modules.items() if isinstance(module, _adaptable_types())}
    if adapter.target_modules == "all-linear":
        output = output_layer(model)
        linear = [
            name
            for name, module in adaptable.items()
            if not isinstance(module, torch.nn.Embedding) and module is not output and not outside(name)
        ]
        if not linear:
            raise UserError(
                f"adapter.target_modules: {type(model).__name__} has no linear layers that LoRA can adapt. Take "
                "`adapter` out to train in full."
            )
    else:
        for pattern in adapter.target_modules:
            _check_name("adapter.target_modules", pattern, modules, adaptable, outside)
            saved = re.compile(rf"(?:.*\.)?(?:{'|'.join(adapter.modules_to_save or ('$.',))})(?:\..*)?")
            if all(saved.fullmatch(name) for name in modules if _matches(pattern, name)):
                raise UserError(
                    f"adapter.target_modules: {pattern!r} lies in adapter.modules_to_save, which trains it in full, so "
                    "it gets no adapter. Take it out of one of the two."
                )
    weighted = {name: module for name, module in modules.items() if list(module.parameters(recurse=False))}
    for pattern in adapter.modules_to_save or ():
        _check_name("adapter.modules_to_save", pattern, modules, weighted, outside, any_type=True)


def _adaptable_types() -> tuple[type, ...]:
    """Return the types of layers that peft's LoRA adapts, as they are in a model without weights."""
    from transformers.pytorch_utils import Conv1D

    nn = torch.nn
    return (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)


def _matches(pattern: str, name: str) -> bool:
    """Return whether peft matches the module `name` with `pattern`: the complete name, or its end after a dot."""
    return name == pattern or name.endswith(f".{pattern}")


def _inside(modules: list[str]) -> Callable[[str], bool]:
    """Return a test whether a module is one of `modules` or inside one."""
    return lambda name: any(name == module or name.startswith(f"{module}.") for module in modules)


def _check_name(
    key: str,
    pattern: str,
    modules: dict[str, torch.nn.Module],
    suitable: dict[str, torch.nn.Module],
    outside: Callable[[str], bool],
    *,
    any_type: bool = False,
) -> None:
    matches = [name for name in modules if _matches(pattern, name)]
    trained = [name for name in matches if not outside(name)]
    offered = sorted({name.rpartition(".")[2] for name in suitable if not outside(name)})
    offered = [name for name in offered if not name.isdecimal()]
    if not matches:
        hint = " (`all-linear` is a value by itself, not an item of a list)" if pattern == "all-linear" else ""
        remedy = did_you_mean(closest_match(pattern.rpartition(".")[2], offered, 0.5))
        raise UserError(
            f"{key}: the model has no module {pattern!r}{hint}.{remedy} Its modules with weights are "
            f"{', '.join(offered)}."
        )
    if not trained:
        raise UserError(
            f"{key}: {pattern!r} is only in {matches[0].rpartition('.')[0]}, which text never reaches, so it would not "
            f"be trained. Remove it. The text part has {', '.join(offered)}."
        )
    unfit = next((name for name in trained if name not in suitable), None)
    if unfit is not None and not any_type:
        within = sorted({name.rpartition(".")[2] for name in suitable if name.startswith(f"{unfit}.")})
        inside = f" It holds {', '.join(within)}: name those." if within else f" Name some of {', '.join(offered)}."
        raise UserError(
            f"{key}: {unfit} is a {type(modules[unfit]).__name__}, and LoRA adapts linear, convolutional and embedding "
            f"layers.{inside}"
        )


def _exact(ends: tuple[str, ...], model: PreTrainedModel, outside: list[str]) -> list[str]:
    """Return the names, or complete ones if peft, which compares the ends of names, would match other modules too.

    `norm` is the end of `input_layernorm`, for example.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    intended = [name for name in names if any(_matches(end, name) for end in ends) and not _inside(outside)(name)]
    matched_by_peft = [name for name in names if name.endswith(tuple(ends))]
    return list(ends) if intended == matched_by_peft else intended


def quantization_config(quantization: QuantizationSection | None) -> BitsAndBytesConfig | None:
    """Return the 4-bit quantization as a configuration of transformers; None without quantization.

    Raises MachineError if bitsandbytes is not installed.
    """
    if quantization is None:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "quantization: 4-bit weights need the package bitsandbytes, which is not installed",
            "Install it with `pip install bitsandbytes`, or take the section out.",
        ) from error
    settings = quantization.model_dump()
    for key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        settings[key] = getattr(torch, settings[key])
    return BitsAndBytesConfig(**settings)
