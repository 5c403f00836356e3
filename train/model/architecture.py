"""Architecture of a model from its config alone: every parameter with its name and shape, without weights.

The model is built on PyTorch's meta device, where tensors have a shape and no memory. peft adds its adapters there, so
the counts are those of the run and not of a formula.
"""

import math
import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.trainer_pt_utils import get_parameter_names

from train.errors import UserError
from train.model.adapters import lora_config
from train.model.text_part import build_meta_model, find_idle_parameters, freeze, output_layer
from train.recipe import Recipe

_NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names without weight decay in Trainer.get_decay_parameter_names of transformers, which forms the optimizer groups."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter.

    - `itemsize`: bytes of an element as loaded, before any cast;
    - `decayed`: whether its optimizer group has weight decay;
    - `role`: body, embedding (of the input; it may be tied to the output layer) or adapter (of peft, including its
      copies of modules_to_save);
    - `unused`: no text reaches it: the original of such a copy, or part of a tower for images or sound.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    decayed: bool
    quantized: bool
    role: str
    unused: bool

    @property
    def elements(self) -> int:
        """Number of elements; of a quantized parameter before packing."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """A dense decoder.

    - `hidden`: width of the hidden states; `query_width`: heads times their size, both in elements per token;
    - `windows`: of each layer, the tokens that a token attends to; None = all before it;
    - `tied`: the embedding is the output layer.
    """

    parameters: tuple[Parameter, ...]
    hidden: int
    query_width: int
    vocabulary: int
    windows: tuple[int | None, ...]
    tied: bool

    @property
    def total(self) -> int:
        """Number of parameters of the model itself, without adapters."""
        return sum(parameter.elements for parameter in self.parameters if parameter.role != "adapter")

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.elements for parameter in self.parameters if parameter.trained)


def try_inspect_architecture(recipe: Recipe, config: PreTrainedConfig) -> "Architecture | None":
    """Return the architecture as `inspect_architecture` does; None where it raises UserError."""
    try:
        return inspect_architecture(recipe, config)
    except UserError:
        return None


def inspect_architecture(recipe: Recipe, config: PreTrainedConfig) -> Architecture:
    """Return the architecture of `config` with the adapter and quantization of the recipe. Loads no weights.

    Raises UserError for a mixture of experts, whose memory and FLOPs can't be planned, and for an adapter that peft
    refuses.
    """
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(
            f"--gpus: the plan knows dense models; {recipe.model.name_or_path} is a mixture of experts. Leave out "
            "--gpus: the rest of the check works."
        )
    model = build_meta_model(config, recipe.model)
    idle = find_idle_parameters(model)
    freeze(model, idle)
    never_used = {id(parameter) for name, parameter in model.named_parameters() if name in idle}
    embedding = model.get_input_embeddings().weight
    output = output_layer(model)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not output]
    quantized = {id(module.weight) for module in linears} if recipe.quantization else set()
    own = {id(parameter) for parameter in model.parameters()}
    if recipe.adapter:
        from peft import get_peft_model

        try:
            with torch.device("meta"):
                model = get_peft_model(model, lora_config(recipe.adapter, model, idle))
        except ValueError as error:
            raise UserError(f"adapter: {' '.join(str(error).split())}") from error
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], _NOT_DECAYED))

    def itemsize(name: str, parameter: torch.nn.Parameter) -> int:
        # TRL casts QLoRA's adapters to bfloat16, except DoRA's magnitudes
        narrow = recipe.quantization and parameter.requires_grad and "lora_magnitude_vector" not in name
        return 2 if narrow else parameter.element_size()

    parameters = tuple(
        Parameter(
            name=name,
            shape=tuple(parameter.shape),
            itemsize=itemsize(name, parameter),
            trained=parameter.requires_grad,
            decayed=name in decayed,
            quantized=id(parameter) in quantized,
            role="embedding" if parameter is embedding else "body" if id(parameter) in own else "adapter",
            unused=id(parameter) in never_used or bool(re.search(r"\.original_module\.", name)),
        )
        for name, parameter in model.named_parameters()
    )
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    return Architecture(
        parameters=parameters,
        hidden=text.hidden_size,
        query_width=text.num_attention_heads * head_size,
        vocabulary=text.vocab_size,
        windows=tuple(window if "sliding" in kind else None for kind in kinds),
        tied=output is not None and output.weight is embedding,
    )
