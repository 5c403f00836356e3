"""Weights of a model, written as transformers and peft write them, without other files.

Their own `save_pretrained` writes configuration, generation settings and a model card first: if one of these can't be
written, the weights are lost.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from train.errors import UserError
from train.loop.checkpoint.verification import expected_weights, full_state_dict
from train.storage.atomic_write import fsync

_NAME = SAFE_WEIGHTS_NAME.replace(".", "{suffix}.")
_SHARD = "50GB"
"""Largest file; transformers' default."""


def save_weights(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    state: Mapping[str, torch.Tensor] | None,
    *,
    sync: bool = True,
) -> None:
    """Write the weights of `model` to `folder`, of a PeftModel those of its adapter.

    `state`: its gathered state dict; None = take it from the model. `sync`: sync them to the disk, which a checkpoint
    does in the background. Files of an earlier save with other shards are deleted. Raises OSError, or the errors of
    safetensors and PyTorch on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    if isinstance(model, PeftModel):
        weights = get_peft_model_state_dict(model, state_dict=state)
        _write(_unshare(weights), folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata, sync=sync)
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        state, more = quantizer.get_state_dict_and_metadata(model)
        metadata |= more
    weights = _unshare(_convert(model, model.state_dict() if state is None else state))
    shards = split_torch_state_dict_into_shards(weights, filename_pattern=_NAME, max_shard_size=_SHARD)
    for pattern in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, _NAME.format(suffix="-?????-of-?????")):
        for path in folder.glob(pattern):  # loaders take the wrong one if both forms exist
            path.unlink()
    for name, tensors in shards.filename_to_tensors.items():
        _write({tensor: weights[tensor] for tensor in tensors}, folder / name, metadata, sync=sync)
    if shards.is_sharded:
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        content = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if sync:
            fsync(index)


def _write(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str], *, sync: bool) -> None:
    """Write a complete file, synced to the disk if `sync` says so, or leave none."""
    try:
        save_file(weights, path, metadata=metadata)
        if sync:
            fsync(path)
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def check_savable(model: PreTrainedModel | PeftModel) -> None:
    """Raise UserError, before training, for a model whose weights can't be written: checks names and ties, no data."""
    try:
        if not isinstance(model, PeftModel):
            _convert(model, full_state_dict(model))
        expected_weights(model)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:500]
        raise UserError(
            f"model.name_or_path: the weights of {model.name_or_path} can be loaded but not saved, so a run would have "
            f"no result: {reason}. Use another version of the model or of transformers."
        ) from error


def _convert(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict under the names of saved files, without ignored and tied weights."""
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = {name: value for name, value in state.items() if name not in ignored}
    return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model)))


def _unshare(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors that share no memory: safetensors refuses those that do, or would drop a name."""
    seen: set[tuple[torch.device, int, int]] = set()
    unshared = {}
    for name, value in weights.items():
        memory = value.device, value.data_ptr(), value.numel()
        unshared[name] = value.clone(memory_format=torch.contiguous_format) if memory in seen else value.contiguous()
        seen.add(memory)
    return unshared
