"""What a model is made of, from its config alone: every parameter by name and size, and no weights.

The model is built on PyTorch's meta device, where tensors have a shape and no memory, and peft puts its adapters on it
there, so the counts are those of the run and not of a formula.
"""

import math
import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.trainer_pt_utils import get_parameter_names

from train.errors import UserError
from train.model.adapters import lora_config
from train.model.text_part import build_meta_model, find_idle_parameters, freeze
from train.recipe import Recipe

_NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""transformers' Trainer.get_decay_parameter_names: the two groups of parameters that its optimizers get."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter. `itemsize`: bytes of an element as loaded, where nothing casts it; `decayed`: its optimizer group.

    `role`: body, embedding (the input's table; where it is tied it is the output layer too) or adapter (peft's, copies
    of modules_to_save among them). `unused`: the original of such a copy, and
    a tower for images or sound: both stand idle.
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
        """How many numbers it holds; of quantized ones, how many it stands for."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """A dense decoder. Widths are in elements a token.

    `query_width`, `key_width`: heads and key-value heads times their size. `norms`: normalizations of hidden width in a
    layer; `wide_norms`: they scale in float32 (Gemma's). `softcapped`: attention's scores are. `windows`: for each
    layer how far back a token sees, None = to the beginning. `adapted_inputs`: width of what all adapters of the model
    read, together. `tied`: the embedding is the output layer.
    """

    parameters: tuple[Parameter, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    query_width: int
    key_width: int
    norms: int
    wide_norms: bool
    softcapped: bool
    vocabulary: int
    windows: tuple[int | None, ...]
    adapted_inputs: int
    tied: bool

    @property
    def total(self) -> int:
        """Parameters of the model itself, adapters aside."""
        return sum(one.elements for one in self.parameters if one.role != "adapter")

    @property
    def trained(self) -> int:
        """Parameters that are trained, wherever they are."""
        return sum(one.elements for one in self.parameters if one.trained)


def inspect_architecture(recipe: Recipe, config: PreTrainedConfig) -> Architecture:
    """The model of `config` with the adapter and quantization of the recipe. Loads no weights.

    Raises UserError for a mixture of experts, whose memory and arithmetic are not worked out here, and for an adapter
    that peft refuses.
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
    never_used = {id(one) for name, one in model.named_parameters() if name in idle}
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    linears = [one for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not output]
    quantized = {id(one.weight) for one in linears} if recipe.quantization else set()
    own = {id(one) for one in model.parameters()}
    first_layer = next(one for one in model.get_decoder().modules() if isinstance(one, torch.nn.ModuleList))[0]
    norms = sum(
        "norm" in type(one).__name__.lower() and sum(each.numel() for each in one.parameters()) >= text.hidden_size
        for one in first_layer.modules()
    )
    adapted_inputs = 0
    if recipe.adapter:
        from peft import get_peft_model

        try:
            with torch.device("meta"):
                model = get_peft_model(model, lora_config(recipe.adapter, model, idle))
        except ValueError as fault:
            raise UserError(f"adapter: {' '.join(str(fault).split())}") from fault
        adapted_inputs = sum(one.shape[1] for name, one in model.named_parameters() if ".lora_A." in name)
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], _NOT_DECAYED))

    def itemsize(name: str, one: torch.nn.Parameter) -> int:
        # TRL casts QLoRA's adapters to bfloat16, but for DoRA's magnitudes
        narrow = recipe.quantization and one.requires_grad and "lora_magnitude_vector" not in name
        return 2 if narrow else one.element_size()

    parameters = tuple(
        Parameter(
            name=name,
            shape=tuple(one.shape),
            itemsize=itemsize(name, one),
            trained=one.requires_grad,
            decayed=name in decayed,
            quantized=id(one) in quantized,
            role="embedding" if one is embedding else "body" if id(one) in own else "adapter",
            unused=id(one) in never_used or bool(re.search(r"\.original_module\.", name)),
        )
        for name, one in model.named_parameters()
    )
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    return Architecture(
        parameters=parameters,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        query_width=text.num_attention_heads * head_size,
        key_width=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_size,
        norms=norms,
        wide_norms="gemma" in text.model_type,
        softcapped=bool(getattr(text, "attn_logit_softcapping", None)),
        vocabulary=text.vocab_size,
        windows=tuple(window if "sliding" in kind else None for kind in kinds),
        adapted_inputs=adapted_inputs,
        tied=output is not None and output.weight is embedding,
    )
