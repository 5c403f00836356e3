"""Models and contenders of `benchmark.py train`.

A contender is `trl`, or the name of a recipe (`full`, `lora`) with changes to it: `full+checkpointing=none+liger=on`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args

from train.errors import UserError
from train.recipe import AttentionName, Recipe, load_recipe

RECIPES = {
    method: Path(__file__).parents[2] / "recipes" / "janus-7b" / "sft" / f"{method}.yaml" for method in ("full", "lora")
}

_MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "sliding_window": None,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    # https://huggingface.co/mistral-community/Mistral-7B-v0.2/blob/main/config.json
    "mistral-7b-v0.2": {
        **_MISTRAL,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
    },
    "tiny": {  # to try the benchmark itself on a CPU
        **_MISTRAL,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}

_CHECKPOINTING = {  # the kwargs of the recipe are removed: TRL refuses `selective` without checkpointing
    "full": ("training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs=null"),
    "selective": ("training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={selective: true}"),
    "none": ("training.gradient_checkpointing=false", "training.gradient_checkpointing_kwargs=null"),
}
_OVERRIDES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "attention": {kernel: (f"model.attention={kernel}",) for kernel in get_args(AttentionName)},
    "checkpointing": _CHECKPOINTING,
    "liger": {"off": ("training.use_liger_kernel=false",), "on": ("training.use_liger_kernel=true",)},
    "compile": {"off": ("training.torch_compile=false",), "on": ("training.torch_compile=true",)},
    "optim": {name: (f"training.optim={name}",) for name in ("adamw_torch_fused", "adamw_bnb_8bit")},
}
FACTORS = tuple(_OVERRIDES)
"""Settings that contenders vary, in their order in names."""
KERNELS = tuple(kernel for kernel in _OVERRIDES["attention"] if kernel != "auto")
_DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers' with torch 2.8 or newer


def load_model_config(name: str) -> dict[str, Any]:
    """Return the config with a name of CONFIGS, or in a model's config.json. Raises UserError if it can't be read."""
    if name in CONFIGS:
        return dict(CONFIGS[name])
    try:
        config = json.loads(Path(name).read_bytes())
        if "model_type" not in config:
            raise ValueError("it has no model_type")
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"--config: {name} is no config: {reason}. Name a model's config.json, or one of {', '.join(CONFIGS)}."
        ) from error
    return {key: value for key, value in config.items() if not key.startswith("_")}


@dataclass(frozen=True)
class Workload:
    """The steps that all contenders train: Janus-like rows, packed at `max_length`, `batch` sequences per step."""

    config: dict[str, Any]
    rows: int
    max_length: int
    batch: int
    warmup: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Contender:
    """A recipe (`method`) with `changes` (factor and value), or TRL with weights of `dtype`."""

    name: str
    method: str
    changes: tuple[tuple[str, str], ...] = ()
    dtype: str | None = None

    def load_recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """Load the recipe with the contender's changes and `overrides`."""
        changes = [override for factor, value in self.changes for override in _OVERRIDES[factor][value]]
        return load_recipe(RECIPES[self.method], [*changes, *overrides])

    def settings(self) -> dict[str, str | None]:
        """Return the value of each factor, None where TRL decides. Equal settings mean equal measurements."""
        recipe = {} if self.dtype else _recipe_settings(self.method)
        factors = {factor: recipe.get(factor) for factor in FACTORS}
        return {"method": self.method, "dtype": self.dtype, **factors, **dict(self.changes)}


TRL = (
    Contender("trl", "full", dtype="bfloat16"),
    Contender("trl-lora", "lora", dtype="bfloat16"),
    Contender("trl-float32", "full", dtype="float32"),
)
"""TRL with its defaults and the recipe's adapter. float32 is TRL's default for weights; the recipes' is bfloat16."""


def factors_of(recipe: Recipe) -> dict[str, str]:
    """Return the value of each factor in a recipe."""
    training = recipe.training
    selective = bool((training.get("gradient_checkpointing_kwargs") or {}).get("selective"))
    checkpointing = training.get("gradient_checkpointing", True)  # TRL's default
    return {
        "attention": recipe.model.attention,
        "checkpointing": ("selective" if selective else "full") if checkpointing else "none",
        "liger": "on" if training.get("use_liger_kernel") else "off",
        "compile": "on" if training.get("torch_compile") else "off",
        "optim": training.get("optim") or _DEFAULT_OPTIMIZER,
    }


@cache
def _recipe_settings(method: str) -> Mapping[str, str]:
    return factors_of(load_recipe(RECIPES[method]))


def _vary(method: str, changes: Mapping[str, str]) -> Contender:
    """Return a recipe's contender with the changes that the recipe doesn't have already."""
    base = _recipe_settings(method)
    kept = tuple((factor, changes[factor]) for factor in FACTORS if changes.get(factor, base[factor]) != base[factor])
    return Contender("+".join([method, *(f"{factor}={value}" for factor, value in kept)]), method, kept)


def all_contenders() -> list[Contender]:
    """Return TRL and all combinations of changes."""
    combinations = product(RECIPES, *(_OVERRIDES[factor] for factor in FACTORS))
    varied = [_vary(method, dict(zip(FACTORS, values, strict=True))) for method, *values in combinations]
    return [*TRL, *dict.fromkeys(varied)]


def default_contenders(automatic: str | None) -> list[Contender]:
    """Return TRL, the recipes, and variants with one change, or with a few that belong together.

    `automatic`: the kernel that `attention: auto` selects on this machine, which is not measured twice. The slowest and
    least informative contenders come last, as time may run out.
    """
    trl, trl_lora, trl_float32 = TRL
    first = [trl, _vary("full", {}), trl_lora, _vary("lora", {})]
    last: list[Contender] = []
    for method in RECIPES:
        for factor in ("optim", "checkpointing", "liger"):
            first += [_vary(method, {factor: value}) for value in _OVERRIDES[factor]]
        for checkpointing in _CHECKPOINTING:
            first += [_vary(method, {"checkpointing": checkpointing, "liger": value}) for value in ("on", "off")]
        for liger in ("off", "on"):
            last += [_vary(method, {"compile": value, "liger": liger}) for value in ("on", "off")]
    kernels = [_vary("full", {"attention": kernel}) for kernel in KERNELS if kernel != automatic]
    first += [contender for contender in kernels if ("attention", "eager") not in contender.changes]
    return list(dict.fromkeys([*first, *last, *kernels, trl_float32]))


def match_contenders(patterns: Sequence[str] | None, listed: Sequence[Contender]) -> list[Contender]:
    """Return those of `listed` whose names match a pattern (`full*`, `*liger=on`); complete names match any contender.

    Raises UserError for a pattern that matches none.
    """
    if patterns is None:
        return list(listed)
    by_name = {contender.name: contender for contender in all_contenders()}
    matches: list[Contender] = []
    for pattern in patterns:
        matching = [contender for contender in listed if fnmatchcase(contender.name, pattern)]
        if not matching and pattern in by_name:
            matching = [by_name[pattern]]
        if not matching:
            raise UserError(
                f"--only: no contender is called {pattern!r}. --list shows them; any combination can be named, its "
                f"changes in the order {', '.join(FACTORS)}, such as full+checkpointing=none+liger=on."
            )
        matches += matching
    return list(dict.fromkeys([*(contender for contender in listed if contender in matches), *matches]))
