"""What `benchmark.py train` can measure: models by their shape, and contenders by what they change in a recipe.

A contender is `trl`, or the name of a recipe (`full`, `lora`) with changes to it: `full+checkpointing=none+liger=on`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args

from train.errors import UserError
from train.recipe import ModelSection, Recipe, load_recipe

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

_CHECKPOINTING = {  # the kwargs are taken back where the recipe has some: TRL refuses selective without checkpointing
    "full": ("training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs=null"),
    "selective": ("training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={selective: true}"),
    "none": ("training.gradient_checkpointing=false", "training.gradient_checkpointing_kwargs=null"),
}
_OVERRIDES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "attention": {
        kernel: (f"model.attention={kernel}",) for kernel in get_args(ModelSection.model_fields["attention"].annotation)
    },
    "checkpointing": _CHECKPOINTING,
    "liger": {"off": ("training.use_liger_kernel=false",), "on": ("training.use_liger_kernel=true",)},
    "compile": {"off": ("training.torch_compile=false",), "on": ("training.torch_compile=true",)},
    "optim": {name: (f"training.optim={name}",) for name in ("adamw_torch_fused", "adamw_bnb_8bit")},
}
FACTORS = tuple(_OVERRIDES)
"""What is varied, in the order in which names have it."""
KERNELS = tuple(kernel for kernel in _OVERRIDES["attention"] if kernel != "auto")
_DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers' with torch 2.8 or newer


def model_config(name: str) -> dict[str, Any]:
    """A config by one of the names of CONFIGS, or in a file as models have them. Raises UserError."""
    if name in CONFIGS:
        return dict(CONFIGS[name])
    try:
        found = json.loads(Path(name).read_bytes())
        if "model_type" not in found:
            raise ValueError("it has no model_type")
    except (OSError, ValueError, TypeError) as fault:
        said = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
        raise UserError(
            f"--config: {name} is no config: {said}. Name a model's config.json, or one of {', '.join(CONFIGS)}."
        ) from fault
    return {key: value for key, value in found.items() if not key.startswith("_")}


@dataclass(frozen=True)
class Contender:
    """What is measured. `method`: the recipe. `changes`: factor and value, of `ours` alone. `dtype`: of `trl` alone."""

    name: str
    method: str
    changes: tuple[tuple[str, str], ...] = ()
    dtype: str | None = None

    def overrides(self) -> list[str]:
        """The changes as overrides of the recipe."""
        return [override for factor, value in self.changes for override in _OVERRIDES[factor][value]]

    def settings(self) -> dict[str, str | None]:
        """The value of each factor, None where TRL decides: two contenders of the same settings are the same."""
        recipe = {} if self.dtype else _shipped(self.method)
        return {
            "method": self.method,
            "dtype": self.dtype,
            **{factor: recipe.get(factor) for factor in FACTORS},
            **dict(self.changes),
        }


TRL = (
    Contender("trl", "full", dtype="bfloat16"),
    Contender("trl-lora", "lora", dtype="bfloat16"),
    Contender("trl-float32", "full", dtype="float32"),
)
"""TRL with its defaults. float32 is what TRL loads of a model that is named to it; the others start from the same
weights as ours, and the adapter is the recipe's."""


def settings_of(recipe: Recipe) -> dict[str, str]:
    """What a recipe says of each factor."""
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
def _shipped(method: str) -> Mapping[str, str]:
    """What the recipe as it is says of each factor."""
    return settings_of(load_recipe(RECIPES[method]))


def _ours(method: str, changes: Mapping[str, str]) -> Contender:
    """A recipe with those of the changes that it doesn't have already."""
    base = _shipped(method)
    kept = tuple((factor, changes[factor]) for factor in FACTORS if changes.get(factor, base[factor]) != base[factor])
    return Contender("+".join([method, *(f"{factor}={value}" for factor, value in kept)]), method, kept)


def every() -> list[Contender]:
    """TRL, and all combinations."""
    combinations = product(RECIPES, *(_OVERRIDES[factor] for factor in FACTORS))
    ours = [_ours(method, dict(zip(FACTORS, values, strict=True))) for method, *values in combinations]
    return [*TRL, *dict.fromkeys(ours)]


def usual(automatic: str | None) -> list[Contender]:
    """What is measured where nothing else is asked for: one change at a time, and a few that belong together.

    `automatic`: the kernel that `attention: auto` stands for here, which is not measured a second time. What takes
    longest or says least comes last, so that it is what is left where time runs out.
    """
    trl, trl_lora, trl_float32 = TRL
    found = [trl, _ours("full", {}), trl_lora, _ours("lora", {})]
    last: list[Contender] = []
    for method in RECIPES:
        for factor in ("optim", "checkpointing", "liger"):
            found += [_ours(method, {factor: value}) for value in _OVERRIDES[factor]]
        for checkpointing in _CHECKPOINTING:
            found += [_ours(method, {"checkpointing": checkpointing, "liger": value}) for value in ("on", "off")]
        for liger in ("off", "on"):
            last += [_ours(method, {"compile": value, "liger": liger}) for value in ("on", "off")]
    kernels = [_ours("full", {"attention": kernel}) for kernel in KERNELS if kernel != automatic]
    found += [one for one in kernels if dict(one.changes).get("attention") != "eager"]
    return list(dict.fromkeys([*found, *last, *kernels, trl_float32]))


def chosen(patterns: Sequence[str] | None, listed: Sequence[Contender]) -> list[Contender]:
    """Those of `listed` whose names fit a pattern (`full*`, `*liger=on`), and any contender by its whole name.

    Raises UserError for a pattern that fits none.
    """
    if patterns is None:
        return list(listed)
    by_name = {one.name: one for one in every()}
    found: list[Contender] = []
    for pattern in patterns:
        fitting = [one for one in listed if fnmatchcase(one.name, pattern)]
        if not fitting and pattern in by_name:
            fitting = [by_name[pattern]]
        if not fitting:
            raise UserError(
                f"--only: no contender is called {pattern!r}. --list shows them; any combination can be named, its "
                f"changes in the order {', '.join(FACTORS)}, such as full+checkpointing=none+liger=on."
            )
        found += fitting
    map_ordered = [one for one in listed if one in found]
    return list(dict.fromkeys([*map_ordered, *found]))


@dataclass(frozen=True)
class Lengths:
    """What a measurement is taken over: Janus-like rows, packed at `max_length`, `batch` sequences a step."""

    config: dict[str, Any]
    rows: int
    max_length: int
    batch: int
    warmup: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Task:
    """What scripts/benchmarks/training_contenders.py is to do. `contender`: None = say what this machine is and can run.

    `started`: time.monotonic() as it was asked for.
    """

    contender: str | None
    lengths: Lengths
    folder: Path
    started: float = 0.0

    def to_json(self) -> str:
        """The argument that the process is started with."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The reverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "lengths": Lengths(**fields["lengths"]), "folder": Path(fields["folder"])})


def by_name(name: str) -> Contender:
    """The contender of a whole name."""
    return next(one for one in every() if one.name == name)
