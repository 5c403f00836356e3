"""Settings that `benchmark.py train` measures: a recipe with changes, or TRL's SFTTrainer with its defaults.

A name says all of a setting: `full`, `lora`, `trl` or `trl-lora`, then changes to the recipe, such as
`full+checkpointing=none+compile=on`. Every setting trains one micro-batch per step, of one sequence and with full
checkpointing unless its name says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from train.errors import UserError
from train.recipe import Recipe, load_recipe

RECIPES = {
    method: Path(__file__).parents[2] / "recipes" / "janus-7b" / "sft" / f"{method}.yaml" for method in ("full", "lora")
}
PROBES = ("machine", "matmul", "bandwidth")
KERNELS = (
    *("attention flash_attention_3", "attention kernels-community/flash-attn3", "attention flash_attention_4"),
    *("attention torch_varlen", "attention flash_attention_2", "attention kernels-community/flash-attn2"),
    "attention sdpa",
)
PROFILE = "profile"
ORDER = (
    *PROBES,
    *KERNELS,
    "full",
    "trl",
    *("full+checkpointing=none", "full+checkpointing=none+compile=on", "full+checkpointing=none+kernels=on"),
    *("full+checkpointing=selective", "full+checkpointing=selective+compile=on", "full+compile=on"),
    "full+dtype=float32",
    PROFILE,
    *("lora", "trl-lora", "lora+checkpointing=none", "lora+checkpointing=none+compile=on"),
    *("full+batch=2", "full+checkpointing=none+batch=2", "full+checkpointing=selective+batch=2"),
    *("full+kernels=on", "full+checkpointing=selective+kernels=on"),
    *("full+dtype=float32+checkpointing=selective", "full+dtype=float32+checkpointing=none"),
    *("full+dtype=float32+compile=on", "trl+dtype=float32", "full+batch=4"),
    *("lora+checkpointing=none+batch=2", "lora+checkpointing=none+kernels=on", "lora+batch=4"),
    "full+checkpointing=none+compile=on+float8=rowwise",
    "attention flex_attention",
)
"""All measurements, the most valuable first, as time may run out."""

_OVERRIDES = {
    "attention": "model.attention={}",
    "batch": "training.per_device_train_batch_size={}",
    "compile": "training.torch_compile={}",
    "dtype": "model.dtype={}",
    "float8": "model.float8={}",
    "kernels": "model.use_kernels={}",
    "optim": "training.optim={}",
}
_CHECKPOINTING = {  # the kwargs of the recipe are removed: TRL refuses `selective` without checkpointing
    "full": ("training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs=null"),
    "selective": ("training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={selective: true}"),
    "none": ("training.gradient_checkpointing=false", "training.gradient_checkpointing_kwargs=null"),
}
_VALUES = {"checkpointing": tuple(_CHECKPOINTING), "dtype": ("bfloat16", "float32")}
"""Factors of which not all values of the recipe's key are measured: float16 weights can't be trained in full."""
_BASE = {"batch": "1", "checkpointing": "full"}
"""Settings without a change, whatever the recipe has."""
FACTORS = ("checkpointing", *_OVERRIDES)
_WORDS = {"on": "true", "off": "false"}


@dataclass(frozen=True)
class Setting:
    """A recipe (`method`) with changes (factor and value), trained by janus-sft or by TRL with its defaults."""

    name: str
    method: str
    changes: dict[str, str]
    trl: bool

    @property
    def overrides(self) -> list[str]:
        """The changes as overrides of the recipe, micro-batch and checkpointing included."""
        overrides: list[str] = []
        for factor, value in (_BASE | self.changes).items():
            if factor == "checkpointing":
                overrides += _CHECKPOINTING[value]
            else:
                overrides.append(_OVERRIDES[factor].format(_WORDS.get(value, value)))
        return overrides

    @property
    def group(self) -> str:
        """Method and weights; settings of a group solve the same task.

        Full fine-tuning in 16 bits needs float32 copies of the weights, which ZeRO spreads over several GPUs.
        """
        dtype = self.changes.get("dtype", "bfloat16")
        where = "" if self.method == "lora" else " on several GPUs (ZeRO)" if dtype == "bfloat16" else " on one GPU"
        return f"{self.method}{where}, {dtype} weights"

    @property
    def baseline(self) -> str:
        """Name of the setting in which TRL trains the same weights with the same method."""
        name = "trl" if self.method == "full" else "trl-lora"
        return name if "dtype" not in self.changes else f"{name}+dtype={self.changes['dtype']}"

    def load_recipe(self, overrides: Sequence[str]) -> Recipe:
        """Load the recipe with the changes and `overrides`. Raises UserError."""
        return load_recipe(RECIPES[self.method], [*self.overrides, *overrides])


def parse_setting(name: str) -> Setting | None:
    """Return the setting with this name; None if it is the name of none."""
    base, *changes = name.split("+")
    values = dict(change.split("=", 1) for change in changes if "=" in change)
    method = {"trl": "full", "trl-lora": "lora"}.get(base, base)
    allowed = ("dtype", "batch") if base.startswith("trl") else FACTORS
    if method not in RECIPES or len(values) < len(changes) or not values.keys() <= set(allowed):
        return None
    if not all(value in _VALUES.get(factor, (value,)) for factor, value in values.items()):
        return None
    return Setting(name, method, values, trl=base.startswith("trl"))


def select_names(patterns: str | None) -> list[str]:
    """Return the names of ORDER that match a pattern (`full*,*compile=on`); a complete name matches any setting.

    `machine` is always part of it. Raises UserError for a pattern that matches none.
    """
    if patterns is None:
        return list(ORDER)
    names = ["machine"]
    for pattern in patterns.split(","):
        matches = [name for name in ORDER if fnmatchcase(name, pattern)]
        setting = None if matches else parse_setting(pattern)
        if setting:
            setting.load_recipe([])  # refuses values that a recipe doesn't take
        elif not matches:
            raise UserError(
                f"--only: no measurement is called {pattern!r}. --list shows them; any combination can be named, such "
                f"as full+checkpointing=none+compile=on (changes: {', '.join(FACTORS)})."
            )
        names += matches or [pattern]
    before_profile = ORDER.index(PROFILE) - 0.5
    return sorted(dict.fromkeys(names), key=lambda name: ORDER.index(name) if name in ORDER else before_profile)
