"""Checks of the model, optimizer and schedule of a recipe, and a memory of those that passed.

They build the model without its weights and an optimizer on a tiny one, which imports seconds of torch, transformers
and peft. `--check` keeps the result of checks that passed in the cache, beside the tokens, by the contents of the
model's files, the settings and the versions of the packages: a second `--check` imports none of it. A run that trains
makes every check again.
"""

import importlib.metadata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from train.data.cache import cache_key, find, get_or_build
from train.data.tokens.source import cache_folder
from train.errors import UserError, noted_elsewhere
from train.model.unloaded_weights import read_weight_names
from train.preflight.missing_files import find_missing_packages
from train.recipe import QuantizationSection, Recipe
from train.storage.checksum import hash_files

_VERSION = 3
"""Raise it when a check of the model, the optimizer, the schedule or the side files changes."""
_PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "tokenizers", "bitsandbytes", "torchao",
    "deepspeed", "kernels", "flash-attn", "flash-attn-3", "flash-attn-4",
)  # fmt: skip
_LARGEST_DIGESTED = 2**28
"""Bytes: of larger files, which hold weights, the names of the weights count and not the contents."""


@dataclass(frozen=True)
class ModelFacts:
    """Results of the checks of a model.

    - `notes`: sentences for the report;
    - `embeddings`: entries of the input embedding;
    - `dtype`: type of the weights once they are loaded;
    - `quantization`: the section as it reads for weights saved in 4 bits; None = as in the recipe;
    - `side_files`: names of the files that a finished run leaves, if all of them can be written; else empty.
    """

    notes: list[str]
    embeddings: int
    dtype: str
    quantization: dict[str, Any] | None
    side_files: list[str]

    def described(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the `quantization` that its weights were saved with."""
        if self.quantization is None:
            return recipe
        section = QuantizationSection.model_construct(**self.quantization)
        return recipe.model_copy(update={"quantization": section})


def examine_model(recipe: Recipe, *, elsewhere: bool = False) -> ModelFacts:
    """Check model, optimizer and schedule; the side files need a tokenizer. Raises UserError if one doesn't fit.

    `elsewhere`: the run will be on another machine; what this one lacks is a note.
    """
    from train.loop.optimizer_test import check_optimizer
    from train.model.load import check_model, load_config
    from train.model.quantized_weights import with_saved_quantization

    model = check_model(recipe, elsewhere=elsewhere)
    notes, lacks = list(model.notes), find_missing_packages(recipe)
    for error in lacks:
        with noted_elsewhere(notes, elsewhere=elsewhere):
            raise error
    if not lacks:
        check_optimizer(recipe)
    described = with_saved_quantization(recipe, load_config(recipe.model))
    saved = described.quantization if described is not recipe else None
    return ModelFacts(notes, model.embeddings, model.dtype, saved.model_dump() if saved else None, [])


def passed_checks(recipe: Recipe, key: str | None) -> ModelFacts | None:
    """Return the results of earlier checks of the same model, settings and packages; None if there are none."""
    entry = find(cache_folder(recipe), key) if key else None
    return ModelFacts(**entry.facts) if entry else None


def remember_passed(recipe: Recipe, key: str | None, facts: ModelFacts) -> None:
    """Keep the results of checks that all passed. A cache that can't be written is left as it is."""
    if key:
        with suppress(UserError):
            get_or_build(cache_folder(recipe), key, lambda _: asdict(facts))


def checks_key(recipe: Recipe, *, elsewhere: bool = False) -> str | None:
    """Return the cache key of the checks; None for a model on the hub, with its own code, or in float8."""
    folder = Path(recipe.model.name_or_path)
    if not folder.is_dir() or recipe.model.trust_remote_code or recipe.model.float8:  # float8 imports torchao anyway
        return None
    try:
        files = {path.name: hash_files([path]) for path in _small_files(folder)}
        names = read_weight_names(folder)
    except (OSError, UserError, SafetensorError):  # the checks report it
        return None
    return cache_key(
        {
            "checks of a model": _VERSION,
            "folder": str(folder.resolve()),
            "files": files,
            "weights": cache_key({"names": names}),
            "sections": recipe.model_dump(
                mode="json", include={"model", "chat", "adapter", "quantization", "training"}
            ),
            "max_length": recipe.data.max_length,
            **({"reward model": True} if recipe.trains_reward_model else {}),
            "template": _template_digest(recipe),
            "packages": {name: _version(name) for name in _PACKAGES},
            "gpu": "elsewhere" if elsewhere else _gpu(),
        }
    )


def _small_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size <= _LARGEST_DIGESTED and path.suffix != ".safetensors":
            yield path


def _template_digest(recipe: Recipe) -> str | None:
    template = Path(recipe.chat.template or "")
    return hash_files([template]) if template.is_file() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    import torch

    return str(torch.cuda.get_device_capability()) if torch.cuda.is_available() else "none"
