"""Layers computed by compiled kernels of the hub (`model.use_kernels`): transformers' `kernelize`, and its effect.

transformers replaces layers whenever the model changes between training and evaluation, by kernels for that mode and
the device of the model, and keeps a layer's own code where it finds none, without a word. Here both sets are loaded
when training begins, when the model is on its device; a run in which no layer is replaced ends with an error. Loading,
LoRA and saving are not affected: only `forward` changes.
"""

from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from train.errors import UserError
from train.ranks import is_first_rank


class LayerKernels(TrainerCallback):
    """Replaces the layers when training begins."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Replace layers. Raises UserError on every process if that fails, or replaces none, on any."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)
        model = model if isinstance(model, PreTrainedModel) else model.get_base_model()
        error = None
        try:
            model.set_use_kernels(True)
            model.eval()  # loads the kernels of evaluations too: now rather than at the first of them
            model.train()
        except Exception as caught:  # of the hub, the package kernels, compilers and kernels, which share no class
            error = (str(caught).strip() or type(caught).__name__).splitlines()[0].rstrip(".")
        layers = replaced_layers(model)
        if error is None and not layers:
            error = f"transformers has no kernel that trains a layer of {type(model).__name__} on this device"
        failed = torch.tensor([error is not None], device=args.device)
        if self._trainer.accelerator.gather(failed).any():
            raise UserError(f"model.use_kernels: {error or 'it failed on another process'}. Write false.")
        if is_first_rank():
            print(f"layers of the hub: {', '.join(f'{count} {name}' for name, count in layers.items())}", flush=True)


def replaced_layers(model: torch.nn.Module) -> Counter[str]:
    """Count the layers of `model` whose code is a kernel's, by the name of the kernel's class."""
    layers: Counter[str] = Counter()
    for module in model.modules():
        forward = vars(module).get("forward")  # of the instance, where `kernelize` puts it
        if hasattr(type(module), "kernel_layer_name") and forward and forward.__func__ is not type(module).forward:
            layers[forward.__func__.__qualname__.rpartition(".")[0]] += 1
    return layers
