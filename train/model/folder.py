"""Checks of the files in a model folder, before anything heavy is imported.

They read only names, JSON and the headers of safetensors files.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from train.errors import UserError
from train.recipe import ModelSection
from train.storage.local_paths import hub_unreachable_reason, looks_like_hub_id, suggest_similar

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt", "spiece*", "bpe*")
"""Patterns of tokenizer files; every kind of tokenizer has a file that matches one."""
_LFS = b"version https://git-lfs"


def check_model_folder(model: ModelSection, *, weights: bool = True) -> None:
    """Raise UserError if `model` names a folder that can't be trained, with its content and what to do.

    A hub id passes, as it may not be downloaded yet. `weights`: False for a plan, which needs only config.json and a
    tokenizer.
    """
    folder = Path(model.name_or_path)
    error = None
    if folder.is_file():
        error = _file_error(folder)
    elif folder.is_dir() and (weights or not _is_config_alone(folder)):
        error = _folder_error(folder, model)
    if error:
        raise UserError(f"model.name_or_path: {folder} {error}")


def is_adapter_alone(folder: Path) -> bool:
    """Return whether `folder` holds an adapter without its base; there may be a config.json."""
    return (folder / "adapter_config.json").is_file() and not _has_weights(folder)


def adapter_base(folder: Path) -> str | None:
    """Return the base model that the adapter in `folder` names; None if it names none."""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _is_config_alone(folder: Path) -> bool:
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
    names = [path.name for path in folder.iterdir()]
    return "config.json" in names and not any(name.endswith(suffixes) for name in names)


def _file_error(file: Path) -> str:
    if file.suffix == ".gguf":
        return _gguf([file.name])
    return f"is a file. Name the folder that it is in: {file.parent.resolve()}."


def _folder_error(folder: Path, model: ModelSection) -> str | None:
    if (folder / "adapter_config.json").is_file() or any((folder / name).is_file() for name in _ADAPTER):
        return _adapter_error(folder)
    if not (folder / "config.json").is_file():
        return _no_model(folder)
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        return f"has a config.json that can't be read: {error}. Download that file again."
    if not isinstance(config, dict):
        return "has a config.json that is not a JSON object. Download that file again."
    if problem := _undeclared_quantization(folder, config):
        return problem
    if "transformers_weights" not in config and (problem := _weights_error(folder, model)):
        return problem
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER):
        return (
            "holds no tokenizer. Copy the tokenizer's files (tokenizer.json, tokenizer_config.json, ...) of the model "
            "that these weights come from into it."
        )
    return None


def _adapter_error(folder: Path) -> str:
    base = adapter_base(folder)
    on = f" (trained on {base})" if base else ""
    merge = f"python scripts/merge_adapter.py {folder} --output {folder.name}-merged"
    if _has_weights(folder):
        return (
            f"holds a complete model and an adapter{on} in one folder, and training would start from the model without "
            "the adapter. Move adapter_config.json and the adapter's weights to a folder of their own; to train on "
            f"from the adapter, merge that folder with `python scripts/merge_adapter.py ADAPTER --base {folder} "
            "--output MERGED` and name MERGED here."
        )
    if not (folder / "adapter_config.json").is_file():
        return "holds an adapter's weights without adapter_config.json. Get that file too, then merge the adapter."
    if not any((folder / name).is_file() for name in _ADAPTER):
        return f"holds an adapter's adapter_config.json{on} without its weights ({_ADAPTER[0]}). Get them too."
    return (
        f"holds an adapter{on}, not a complete model. Merge it first with `{merge}` and name {folder.name}-merged "
        "here. To continue an unfinished LoRA run, keep its own model.name_or_path and give --resume."
    )


def _no_model(folder: Path) -> str:
    """Return what a folder without config.json holds instead."""
    names = {path.name for path in folder.iterdir()}
    if not names:
        return "is empty. Name a folder with config.json, weights and tokenizer."
    if "model_index.json" in names:
        return "holds a diffusion pipeline (diffusers), not a language model."
    if names & {"modules.json", "config_sentence_transformers.json"}:
        return "holds an embedding model (sentence-transformers), not one that writes text."
    if special := _foreign_weights(folder, names):
        return f"{special} It also has no config.json." if not special.startswith("holds GGUF") else special
    if (folder / "snapshots").is_dir():
        inside = sorted(f"snapshots/{path.name}" for path in (folder / "snapshots").iterdir())
        return f"is a folder of the hub's cache. Name the snapshot in it, or the hub id: {', '.join(inside[:3])}."
    inside = _models_inside(folder)
    if inside:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        return f"holds no model itself, but folders with models: {', '.join(inside[:3])}{more}. Name one of them."
    if _has_weights(folder):
        return "holds weights without config.json. Get the model's config.json too."
    if any(any(folder.glob(pattern)) for pattern in _TOKENIZER):
        return "holds a tokenizer alone: no config.json and no weights. Name the folder of the model."
    return f"holds no model: no config.json and no weights, only {_listed(names)}."


def _models_inside(folder: Path) -> list[str]:
    inside = [path.parent for pattern in ("*/config.json", "*/adapter_config.json") for path in folder.glob(pattern)]
    times = {path: path.stat().st_mtime_ns for path in inside}
    return [str(path) for path in sorted(times, key=lambda path: (-times[path], path.name))]


def _undeclared_quantization(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the error for quantized weights that transformers wouldn't recognize, and would initialize at random."""
    text = config.get("text_config")
    declared = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    original = "Name the model that it was quantized from"
    if isinstance(config.get("quantization"), dict) and "quant_method" not in (declared or {}):
        return f"holds weights quantized by MLX, which run only on Apple hardware. {original}."
    if declared:
        return None
    for name, method in ("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"):
        if (folder / name).is_file():
            return (
                f"holds weights quantized by {method} in an old format: there is a {name}, and config.json has no "
                f"`quantization_config`. {original}, or get a newer version of this one."
            )
    return None


def _weights_error(folder: Path, model: ModelSection) -> str | None:
    if (folder / WEIGHTS).is_file():
        return _damage([folder / WEIGHTS])
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    index = INDEX if (folder / INDEX).is_file() else _PICKLES[1] if pickles and model.allow_pickle else None
    if index and (folder / index).is_file():
        shards = read_json(folder / index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            return f"has a {index} that names no weights. Download that file again."
        files = sorted({str(name) for name in shards.values()})
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            return (
                f"lacks {len(missing)} of the {len(files)} files of weights that {index} names: "
                f"{_listed(set(missing))}. Get them too."
            )
        return _damage([folder / name for name in files]) if index == INDEX else None
    if pickles:
        return None if model.allow_pickle else _pickled()
    names = {path.name for path in folder.iterdir()}
    if special := _foreign_weights(folder, names):
        return special
    if any(name.endswith((".bin", ".pt", ".pth")) and "optimizer" not in name for name in names - {"rng_state.pth"}):
        loose = {name for name in names if name.endswith((".bin", ".pt", ".pth"))}
        return f"{_pickled()} (Of {_listed(loose)} only pytorch_model.bin would be read.)"
    others = {name for name in names if name.endswith(".safetensors")}
    instead = f" It has {_listed(others)}, which no loader looks for." if others else ""
    return f"holds a config.json and no weights: neither {WEIGHTS} nor {INDEX}.{instead} Get the weights too."


def _pickled() -> str:
    return (
        "holds its weights in pickle files, which can run code when they are opened. Use a safetensors version; if you "
        "trust them, write `model.allow_pickle: true`."
    )


def _foreign_weights(folder: Path, names: set[str]) -> str | None:
    """Return the error for weights in a layout that transformers doesn't load; None for others."""
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        return _gguf(ggufs)
    if names & {"params.json"} or any(name.startswith("consolidated.") for name in names):
        return (
            "holds weights in Mistral's or Meta's own layout (params.json, consolidated.*). Name the version in "
            "transformers' layout (config.json, model.safetensors), or convert it."
        )
    if names & {"zero_to_fp32.py", "latest"} or any(folder.glob("global_step*")):
        return (
            "holds DeepSpeed's training state without the model's weights in one piece. Continue from it with --resume "
            f"{folder}, or make weights of it with `python {folder}/zero_to_fp32.py {folder} OUT --safe_serialization` "
            "and name OUT with the model's config.json and tokenizer."
        )
    if any(folder.glob("*fsdp*/")) or any(folder.glob("*.distcp")):
        return (
            "holds FSDP's training state without the model's weights in one piece. Continue from it with --resume "
            f"{folder}, or make weights of it with `accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUT` and "
            "name OUT with the model's config.json and tokenizer."
        )
    for name, framework in ("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"), ("model.onnx", "ONNX"):
        if name in names:
            return f"holds weights for {framework} alone ({name}). Name a version in safetensors."
    if {"trainer_state.json"} <= names:
        return (
            f"holds the state of a training run without the model's weights. Continue from it with --resume {folder}."
        )
    return None


def _gguf(names: list[str]) -> str:
    return (
        f"holds GGUF weights ({names[0]}), which are quantized for llama.cpp. Name the model that they were made from; "
        "where there is none, write them as safetensors as scripts/export_smollm2.py does."
    )


def _damage(files: list[Path]) -> str | None:
    """Return the error for the first safetensors file that is damaged or incomplete; None if all are complete."""
    for file in files:
        with file.open("rb") as start:
            if start.read(len(_LFS)) == _LFS:
                return f"holds Git LFS pointers in place of weights ({file.name}). Get them with `git lfs pull`."
        try:
            with safe_open(file, "numpy") as tensors:
                empty = next((name for name, shape in _shapes(tensors) if 0 in shape and name.endswith("weight")), None)
        except (OSError, SafetensorError) as error:
            return (
                f"holds {file.name}, which can't be loaded: no complete safetensors file ({error}). Download it again."
            )
        if empty:
            return (
                f"holds {file.name}, whose {empty} is empty: it was saved under ZeRO-3 or FSDP without gathering the "
                "weights. Save the model again."
            )
    return None


def _shapes(tensors: Any) -> Iterator[tuple[str, list[int]]]:
    for name in tensors.keys():  # noqa: SIM118
        yield name, tensors.get_slice(name).get_shape()


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, *_PICKLES))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if it can't be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _listed(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def check_model_exists(model: ModelSection, recipe_file: str | None = None) -> None:
    """Raise UserError if `model.name_or_path` is neither a folder nor a possible hub id."""
    name = model.name_or_path
    path = Path(name)
    if path.is_dir():
        return
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    if path.exists():
        raise UserError(f"model.name_or_path: {path} {_file_error(path)}")
    if not looks_like_hub_id(name):
        hint = _from_recipe(path, recipe_file) or suggest_similar(path)
        raise UserError(
            f"model.name_or_path: there is no folder {path}{where}.{hint} Write a model folder or a hub id."
        )
    if reason := hub_unreachable_reason(name, "model"):
        hint = _from_recipe(path, recipe_file) or suggest_similar(path)
        raise UserError(
            f"model.name_or_path: {name} can't be loaded: there is no folder of that name{where}; {reason}.{hint}"
        )


def _from_recipe(path: Path, recipe_file: str | None) -> str:
    """Return a hint if `path` exists relative to the recipe's folder, from which paths don't start."""
    beside = Path(recipe_file).parent / path if recipe_file else path
    if path.exists() or not beside.exists():
        return ""
    return f" Paths start from the working folder, not from the recipe's: did you mean {beside}?"
