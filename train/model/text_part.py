"""The parameters of a model that text trains; of a multimodal model, towers for images or sound are idle.

A parameter is idle if no gradient path leads from the logits of a text to it. A forward pass with fake tensors, which
have shapes and no memory, records the graph of any architecture in about a second.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from train.model.classifier import find_score_head, is_classifier
from train.recipe import ModelSection

_TOKENS = 64


def auto_model_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that loads the complete model of `config`, towers included.

    AutoModelForCausalLM doesn't know some multimodal models, and loads, and would save, the text part of others.
    """
    if is_classifier(config):
        return AutoModelForSequenceClassification
    saved_as = config.architectures or ()
    classes = [
        (auto, mapping[type(config)].__name__)
        for auto, mapping in (
            (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
            (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
        )
        if type(config) in mapping
    ]
    exact = next((auto for auto, name in classes if name in saved_as), None)
    return exact or (classes[0][0] if classes else AutoModelForCausalLM)


def output_layer(model: PreTrainedModel) -> Any:
    """Return the layer after the decoder: that of a language model, or the score head of a reward model."""
    return model.get_output_embeddings() or find_score_head(model)


def build_meta_model(config: PreTrainedConfig, model: ModelSection) -> PreTrainedModel:
    """Return the model of `config` without weights, on PyTorch's meta device."""
    config = copy.deepcopy(config)  # transformers modifies the config of a model that it builds
    dtype = getattr(torch, model.dtype, None) or config.get_text_config().dtype or torch.float32
    if getattr(config, "quantization_config", None):
        del config.quantization_config
    with torch.device("meta"):
        return auto_model_class(config).from_config(
            config, dtype=dtype, attn_implementation="eager", trust_remote_code=model.trust_remote_code
        )


def find_idle_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters of `model`, which has no weights, that text never trains.

    A text-only model has none. If fake tensors can't run the model, the parameters outside the decoder and the
    embeddings are idle.
    """
    config = model.config
    if config.get_text_config() is config and not config.sub_configs:
        return frozenset()
    try:
        reached = _reached(model)
    except Exception:  # whatever an architecture does that fake tensors don't support
        ends = (model.get_decoder(), model.get_input_embeddings(), output_layer(model))
        reached = {id(weight) for part in ends if part is not None for weight in part.parameters()}
    return frozenset(name for name, weight in model.named_parameters() if id(weight) not in reached)


def find_idle_modules(model: torch.nn.Module, idle: frozenset[str]) -> list[str]:
    """Return the names of the largest modules whose parameters are all in `idle`."""
    if not idle:
        return []

    def walk(module: torch.nn.Module, prefix: str) -> Iterator[str]:
        names = {f"{prefix}{name}" for name, _ in module.named_parameters()}
        if names and names <= idle and prefix:
            yield prefix.removesuffix(".")
        elif names & idle:
            for name, child in module.named_children():
                yield from walk(child, f"{prefix}{name}.")

    return list(walk(model, ""))


def freeze(model: torch.nn.Module, idle: frozenset[str]) -> None:
    """Freeze the parameters in `idle`: DistributedDataParallel would wait for their gradients."""
    for name, weight in model.named_parameters():
        if name in idle:
            weight.requires_grad_(False)


def describe_idle(model: PreTrainedModel, idle: frozenset[str]) -> str | None:
    """Return a sentence on the parameters that are not trained; None if there are none."""
    if not idle:
        return None
    count = sum(weight.numel() for name, weight in model.named_parameters() if name in idle)
    names = [name.removeprefix("model.") for name in find_idle_modules(model, idle)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{count:,} parameters are not trained, since no text reaches them: {', '.join(names[:3])}{more}"


def _reached(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters that the logits of a text depend on."""
    copied = copy.deepcopy(model).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        copied.to_empty(device="cpu")
        logits = copied(input_ids=torch.zeros((1, _TOKENS), dtype=torch.long), use_cache=False).logits
    graph, seen, reached = [logits.grad_fn], set(), set()
    while graph:
        node = graph.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        graph.extend(before for before, _ in node.next_functions)
    names = {name for name, weight in copied.named_parameters() if id(weight) in reached}
    return {id(weight) for name, weight in model.named_parameters() if name in names}
