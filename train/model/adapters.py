"""LoRA and 4-bit weights: from the recipe's sections to what peft and transformers call the same things."""

from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from train.errors import UserError
from train.recipe import AdapterSection, QuantizationSection

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(adapter: AdapterSection | None) -> "LoraConfig | None":
    """The adapter as peft wants it; None for full fine-tuning."""
    if adapter is None:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **adapter.model_dump(mode="json"))


def check_modules_to_save(adapter: AdapterSection | None, model: PreTrainedModel) -> None:
    """Raise UserError for a name in adapter.modules_to_save that the model hasn't: peft says nothing of it."""
    names = [name for name, _ in model.named_modules()]
    for wanted in (adapter and adapter.modules_to_save) or ():
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            parts = {
                name.rpartition(".")[2] for name, module in model.named_modules() if list(module.parameters(False))
            }
            raise UserError(
                f"adapter.modules_to_save: the model has no module {wanted!r}. Those with weights are called "
                f"{', '.join(sorted(parts))}."
            )


def quantization_config(quantization: QuantizationSection | None) -> BitsAndBytesConfig | None:
    """The 4-bit weights as transformers wants them; None for weights as they are.

    Raises UserError where bitsandbytes is not installed.
    """
    if quantization is None:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as fault:
        raise UserError(
            "quantization: 4-bit weights need the package bitsandbytes, which is not installed. Install it with "
            "`pip install bitsandbytes`, or take the section out."
        ) from fault
    settings = quantization.model_dump()
    for key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        settings[key] = getattr(torch, settings[key])
    return BitsAndBytesConfig(**settings)
