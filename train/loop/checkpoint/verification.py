"""Whether a save holds all that it should: its safetensors headers, compared with the model in memory.

A save can succeed and be worthless: ZeRO-3 leaves empty tensors behind where nothing gathered the weights (DeepSpeed
#3841, peft#2450, trl#4416), and some loaders fill what is missing with random numbers.
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
    """Raise UserError where the weights in `folder` are not those of `model`: lost, empty or of another shape.

    `model` may be partitioned (ZeRO-3, FSDP2): nothing is gathered, only headers are read. Of weights that the model
    ties one is enough. For a PeftModel every trained parameter must be in the adapter's file.
    """
    adapter = isinstance(model, PeftModel)
    saved = _read_headers(folder, ADAPTER_SAFE_WEIGHTS_NAME if adapter else SAFE_WEIGHTS_NAME)
    faults = []
    for names, shape in expected_weights(model):
        found = next((name for name in names if name in saved), None)
        if found is None:
            faults.append(f"{names[0]} is missing")
        elif saved[found] != shape:
            faults.append(f"{found} is {_written(saved[found])} in the file and {_written(shape)} in the model")
    if faults:
        more = f" and {len(faults) - 3:,} more" if len(faults) > 3 else ""
        raise UserError(
            f"output_dir: the weights in {folder} were not saved whole: {'; '.join(faults[:3])}{more}. Don't use them. "
            "Under DeepSpeed or FSDP launch with one of accelerate_configs as it is; the training state in complete "
            "checkpoints is saved apart from these weights, so a run can go on from there."
        )


def expected_weights(model: PreTrainedModel | PeftModel) -> list[tuple[list[str], tuple[int, ...]]]:
    """For each weight that a save must hold, of a PeftModel its adapter's, the names that it may have and its shape.

    Raises UserError for a parameter that is trained and that peft doesn't write.
    """
    return _of_adapter(model) if isinstance(model, PeftModel) else _of_model(model)


def _written(shape: tuple[int, ...]) -> str:
    return "empty" if 0 in shape else " x ".join(map(str, shape)) or "a single number"


def _read_headers(folder: Path, name: str) -> Shapes:
    """Names and shapes in the file `name` or in the shards of its index. Raises UserError where they can't be read."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    single = folder / name
    if name == SAFE_WEIGHTS_NAME and index.is_file():
        if single.is_file():
            raise UserError(
                f"output_dir: {single} lies beside {index.name}, from another save, and would be loaded in its place. "
                "Take it away."
            )
        files = [folder / shard for shard in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    else:
        files = [single]
    shapes: Shapes = {}
    for path in files:
        try:
            with safe_open(path, "pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as fault:
            raise UserError(f"output_dir: {path} should hold the weights and can't be read: {fault}") from fault
    return shapes


def whole_state(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Return the model's state dict as tensors without data and of their whole shapes; tied weights share a tensor."""
    of_parameter: dict[int, torch.Tensor] = {}
    whole = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself looks empty
        whole[name] = of_parameter.setdefault(id(parameter), torch.empty(shape, dtype=parameter.dtype, device="meta"))
    kept = model.state_dict(keep_vars=True)
    buffers = {name: torch.empty_like(value, device="meta") for name, value in kept.items() if name not in whole}
    return {name: value for name, value in whole.items() if name in kept} | buffers


def _of_model(model: PreTrainedModel) -> list[tuple[list[str], tuple[int, ...]]]:
    """For each weight the names it may have in the files, and its shape."""
    ignored = set(model._keys_to_ignore_on_save or ())
    whole = {name: value for name, value in whole_state(model).items() if name not in ignored}
    names_of: dict[int, list[str]] = {}
    for name, value in whole.items():
        names_of.setdefault(id(value), []).append(name)
    first = {names[0]: whole[names[0]] for names in names_of.values()}
    tied = {names[0]: names[1:] for names in names_of.values()}
    # transformers may write other names and shapes than those in memory: experts one by one, say
    written = revert_weight_conversion(model, dict(first))
    return [([name, *tied.get(name, ())], tuple(value.shape)) for name, value in written.items()]


def _of_adapter(model: PeftModel) -> list[tuple[list[str], tuple[int, ...]]]:
    """As `_of_model`. Raises UserError for a parameter that is trained and that peft doesn't write."""
    whole = whole_state(model)
    written = get_peft_model_state_dict(model, state_dict=dict(whole), save_embedding_layers=False)
    kept = {id(value) for value in written.values()}
    lost = [name for name, value in model.named_parameters() if value.requires_grad and id(whole[name]) not in kept]
    if lost:
        raise UserError(f"adapter: {lost[0]} and {len(lost) - 1} more are trained, but peft doesn't save them.")
    return [([name], tuple(value.shape)) for name, value in written.items()]
