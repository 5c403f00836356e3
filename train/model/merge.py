"""Merge a LoRA adapter into its base, one weights file at a time: memory holds a shard, not the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from train.errors import UserError
from train.model.text_part import auto_model_class

Change = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
"""Function from a weight of the base to the merged one, rounded once to the given dtype."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def merge_adapter(base: Path, adapter: Path, output: Path, dtype: str | None = None) -> int:
    """Write `base` with `adapter` merged into it to the folder `output`; return the number of changed weights.

    - The updates are peft's own (rank-stabilised, weight-decomposed, patterns of ranks and alphas), added in float32
      and rounded once to the base's dtype, or to `dtype`.
    - Files, names and index are the base's. Tied input and output embeddings are untied if the adapter changed one of
      them, as in peft.
    - Tokenizer and generation settings are the adapter's, if it has them.

    Raises UserError for an adapter that can't be merged shard by shard.
    """
    config = _read_config(base)
    model = _with_adapter(config, adapter)
    changes, tied = _changes(model), _tied(model.get_base_model())
    files = find_weight_files(base)
    names = {name for path in files for name in _names(path)}
    untied = bool(tied & changes.keys())
    copies = {stored: absent for stored in tied & names for absent in tied - names} if untied else {}
    missing = sorted(changes.keys() - names - set(copies.values()))
    if missing:
        raise UserError(
            f"{base}: its files hold no weight {missing[0]}: its name or layout there differs from the model's, so "
            "this adapter can't be merged file by file. Merge it in memory with peft's merge_and_unload."
        )
    output.mkdir(parents=True)
    total = 0
    weight_map: dict[str, str] = {}
    for path in files:
        weights, metadata = _merged_file(path, changes, copies, getattr(torch, dtype) if dtype else None)
        save_file(weights, output / path.name, metadata=metadata)
        weight_map |= dict.fromkeys(weights, path.name)
        total += sum(value.numel() * value.element_size() for value in weights.values())
    if (base / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = json.loads((base / SAFE_WEIGHTS_INDEX_NAME).read_bytes())
        index = {
            "metadata": {**index.get("metadata", {}), "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (output / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _copy_other_files(base, adapter, output)
    if untied:
        _set_in_config(output / "config.json", tie_word_embeddings=False)
    if dtype is not None:
        _set_in_config(output / "config.json", dtype=dtype)
    return len(changes)


def find_tied_embeddings(base: Path) -> frozenset[str]:
    """Return the names of the input and output embeddings' weights if the model in `base` ties them; else none."""
    config = _read_config(base)
    with torch.device("meta"):
        return frozenset(_tied(auto_model_class(config).from_config(config)))


def _read_config(base: Path) -> Any:
    if (base / "adapter_config.json").is_file():
        raise UserError(
            f"{base}: a base must hold no adapter, and it has adapter_config.json: transformers would apply "
            "that adapter as it loads the model. Move adapter_config.json and adapter_model.safetensors to a folder of "
            f"their own, and merge that with --base {base}."
        )
    config = AutoConfig.from_pretrained(base)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{base}: its weights are quantized, and a merged weight can't be written back exactly. Name the model "
            "that it was quantized from with --base."
        )
    return config


def _with_adapter(config: Any, adapter: Path) -> PeftModel:
    """Load the adapter on a base without weights. Raises UserError for adapters of other kinds."""
    settings = PeftConfig.from_pretrained(adapter)
    if settings.peft_type != PeftType.LORA:
        raise UserError(f"{adapter}: a {settings.peft_type.value} adapter. Only LoRA can be merged.")
    for key in (
        "ensure_weight_tying",
        "lora_bias",
        "layer_replication",
        "target_parameters",
        "alora_invocation_tokens",
    ):
        if getattr(settings, key, None):
            raise UserError(
                f"{adapter}: its {key} can't be merged file by file. Merge it in memory with peft's merge_and_unload."
            )
    if settings.task_type == TaskType.SEQ_CLS:
        raise UserError(
            f"{adapter}: an adapter of a reward model, whose head its base lacks. Merge it in memory with peft's "
            "merge_and_unload."
        )
    start = settings.init_lora_weights
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise UserError(
            f"{adapter}: its init_lora_weights ({start}) changed the base's weights as training began, so it can't be "
            "merged file by file. Merge it in memory with peft's merge_and_unload."
        )
    with torch.device("meta"):
        bare = auto_model_class(config).from_config(config, dtype=torch.float32)
    _replace_weights(bare)
    try:
        return PeftModel.from_pretrained(bare, adapter, torch_device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"{adapter}: the adapter doesn't fit its base, or can't be read: {first_line}") from error


def _replace_weights(model: PreTrainedModel) -> None:
    """Replace the weights by views of a single zero, with their shapes.

    peft moves an adapter to the device of its base, and silently adds nothing if that is the meta device.
    """
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())  # peft may load something into these
    placeholders: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            zeros = torch.zeros(weight.shape) if module in embeddings else torch.zeros(()).expand(weight.shape)
            setattr(module, name, placeholders.setdefault(id(weight), torch.nn.Parameter(zeros, requires_grad=False)))


def _changes(model: PeftModel) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            if type(module) not in (Linear, Embedding):
                raise UserError(f"{name}: LoRA on a {type(module).__name__} can't be merged file by file.")
            changes[f"{name}.weight"] = _merge_into(name, module)
        elif isinstance(module, ModulesToSaveWrapper):
            for part, value in module.modules_to_save[module.active_adapter].named_parameters():
                changes[f"{name}.{part}"] = _replace_by(value)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise UserError(f"{name}: single trained tokens can't be merged file by file.")
    return changes


def _merge_into(name: str, layer: Linear | Embedding) -> Change:
    def change(original: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        base = layer.get_base_layer()
        empty = base.weight
        base.weight = torch.nn.Parameter(original.float(), requires_grad=False)
        try:
            layer.merge(safe_merge=True)  # into a copy; raises ValueError for values that aren't finite
            return base.weight.data.to(dtype)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        finally:
            base.weight = empty

    return change


def _replace_by(value: torch.Tensor) -> Change:
    return lambda _, dtype: value.detach().to(dtype)


def _tied(base: PreTrainedModel) -> set[str]:
    if not base.config.get_text_config().tie_word_embeddings:
        return set()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return {f"{name}.weight" for name, module in base.named_modules() if any(module is end for end in ends)}


def find_weight_files(base: Path) -> list[Path]:
    """Return the safetensors files that a model in `base` is loaded from. Raises UserError if there are none."""
    index = base / SAFE_WEIGHTS_INDEX_NAME
    if (base / SAFE_WEIGHTS_NAME).is_file():
        return [base / SAFE_WEIGHTS_NAME]
    if index.is_file():
        return [base / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    raise UserError(
        f"{base}: holds no {SAFE_WEIGHTS_NAME} and no {index.name}. Name a base in safetensors with --base."
    )


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error


def _merged_file(
    path: Path, changes: dict[str, Change], copies: dict[str, str], dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the merged weights of a file, and its metadata. `copies`: a tied weight, and the one that is untied."""
    merged = {}
    with safe_open(path, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            original = tensors.get_tensor(name)
            rounded_to = dtype if dtype is not None and original.is_floating_point() else original.dtype
            for target in (name, *([copies[name]] if name in copies else ())):
                change = changes.get(target)
                value = change(original, rounded_to) if change else original.to(rounded_to, copy=True)
                merged[target] = value.contiguous()
        return merged, tensors.metadata() or {"format": "pt"}


def _copy_other_files(base: Path, adapter: Path, output: Path) -> None:
    """Copy configuration and code of the base, and tokenizer and generation settings of the adapter, else the base."""
    with_tokenizer = adapter if (adapter / "tokenizer_config.json").is_file() else base
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name not in (*TOKENIZER_FILES, "README.md"):
            shutil.copyfile(path, output / path.name)
    for name in TOKENIZER_FILES:
        if (with_tokenizer / name).is_file():
            shutil.copyfile(with_tokenizer / name, output / name)
    if (adapter / "generation_config.json").is_file():
        shutil.copyfile(adapter / "generation_config.json", output / "generation_config.json")


def _set_in_config(path: Path, **values: Any) -> None:
    config = json.loads(path.read_bytes())
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section.pop("torch_dtype", None) if "dtype" in values else None
            section.update(values)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
