"""Verification of saved weights: the safetensors headers on disk, compared with the model in memory.

A save can succeed and be useless: ZeRO-3 writes empty tensors if nothing gathered the weights (DeepSpeed#3841,
peft#2450, trl#4416), and some loaders fill missing weights with random numbers.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from train.errors import UserError

Shapes = dict[str, tuple[int, ...]]


def check_saved(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Raise UserError if weights of `model` are missing in `folder`, or are empty or of another shape there.

    `model` may be partitioned (ZeRO-3, FSDP2): nothing is gathered, only headers are read. One of several tied weights
    suffices. For a PeftModel every trained parameter must be in the adapter's file.
    """
    adapter = isinstance(model, PeftModel)
    saved = _read_headers(folder, ADAPTER_SAFE_WEIGHTS_NAME if adapter else SAFE_WEIGHTS_NAME)
    errors = []
    for names, shape in expected_weights(model):
        saved_name = next((name for name in names if name in saved), None)
        if saved_name is None:
            errors.append(f"{names[0]} is missing")
        elif saved[saved_name] != shape:
            in_file, in_model = _format_shape(saved[saved_name]), _format_shape(shape)
            errors.append(f"{saved_name} is {in_file} in the file and {in_model} in the model")
    if errors:
        more = f" and {len(errors) - 3:,} more" if len(errors) > 3 else ""
        raise UserError(
            f"output_dir: the weights saved in {folder} are incomplete: {'; '.join(errors[:3])}{more}. Don't use them. "
            "Under DeepSpeed or FSDP launch with an unchanged file of accelerate_configs. The training state in "
            "complete checkpoints is stored separately, so the run can resume from there."
        )


def expected_weights(model: PreTrainedModel | PeftModel) -> list[tuple[list[str], tuple[int, ...]]]:
    """Return for each weight that a save must hold the names that it may have and its shape.

    For a PeftModel: the weights of its adapter. Raises UserError for a trained parameter that peft doesn't write.
    """
    return _of_adapter(model) if isinstance(model, PeftModel) else _of_model(model)


def _format_shape(shape: tuple[int, ...]) -> str:
    return "empty" if 0 in shape else " x ".join(map(str, shape)) or "a single number"


def _read_headers(folder: Path, name: str) -> Shapes:
    """Return names and shapes in the file `name`, or in the shards of its index.

    Raises UserError if they can't be read.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    single = folder / name
    if name == SAFE_WEIGHTS_NAME and index.is_file():
        if single.is_file():
            raise UserError(
                f"output_dir: {single}, from another save, would be loaded in place of {index.name}. Remove it."
            )
        files = [folder / shard for shard in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    else:
        files = [single]
    shapes: Shapes = {}
    for path in files:
        try:
            with safe_open(path, "pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"output_dir: {path} should hold the weights and can't be read: {error}") from error
    return shapes


def full_state_dict(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Return the model's state dict as tensors without data, in their full shapes; tied weights share a tensor."""
    by_parameter: dict[int, torch.Tensor] = {}
    full = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself looks empty
        full[name] = by_parameter.setdefault(id(parameter), torch.empty(shape, dtype=parameter.dtype, device="meta"))
    saved = model.state_dict(keep_vars=True)
    buffers = {name: torch.empty_like(value, device="meta") for name, value in saved.items() if name not in full}
    return {name: value for name, value in full.items() if name in saved} | buffers


def _of_model(model: PreTrainedModel) -> list[tuple[list[str], tuple[int, ...]]]:
    """Return the names and the shape of each weight."""
    ignored = set(model._keys_to_ignore_on_save or ())
    full = {name: value for name, value in full_state_dict(model).items() if name not in ignored}
    names_of: dict[int, list[str]] = {}
    for name, value in full.items():
        names_of.setdefault(id(value), []).append(name)
    first = {names[0]: full[names[0]] for names in names_of.values()}
    tied = {names[0]: names[1:] for names in names_of.values()}
    # transformers may write other names and shapes than those in memory: each expert separately, say
    written = revert_weight_conversion(model, dict(first))
    return [([name, *tied.get(name, ())], tuple(value.shape)) for name, value in written.items()]


def _of_adapter(model: PeftModel) -> list[tuple[list[str], tuple[int, ...]]]:
    """Return name and shape of each weight. Raises UserError for a trained parameter that peft doesn't write."""
    full = full_state_dict(model)
    written = get_peft_model_state_dict(model, state_dict=dict(full), save_embedding_layers=False)
    kept = {id(value) for value in written.values()}
    missing = [name for name, value in model.named_parameters() if value.requires_grad and id(full[name]) not in kept]
    if missing:
        raise UserError(f"adapter: {missing[0]} and {len(missing) - 1} more are trained, but peft doesn't save them.")
    return [([name], tuple(value.shape)) for name, value in written.items()]
