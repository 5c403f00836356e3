"""Check that merged weights are base plus adapter: each weight, from the files of the three folders.

Updates are computed here from the adapter's matrices in float64, without peft:

    LoRA    W + s B A                  s = alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA
    DoRA    m (W + s B A) / |W + s B A|    a norm for each output (arXiv:2402.09353)

and the merged weight must equal that up to half a unit in the last place of its dtype. Logits would not show an error:
after few steps an adapter changes them by less than rounding does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from train.errors import UserError
from train.model.merge import find_weight_files

_CHUNK = 2**22
"""Elements of a weight that are compared at once."""
_FLOAT32 = 2.0**-24
"""Relative error of one operation in float32, in which a merge is computed."""
_PREFIX = "base_model.model."


@dataclass
class MergeCheck:
    """Result of the comparison. `changed`: number of weights that the adapter updates; `names`: of all weights."""

    changed: int = 0
    names: list[str] = field(default_factory=list)
    _expected: float = 0.0
    _actual: float = 0.0

    @property
    def changes_nothing(self) -> bool:
        """Return whether all updates of the adapter are zero, as before training."""
        return self._expected == 0

    @property
    def surviving(self) -> float:
        """Share of the update that is in the merged weights, 0 to 1; the rest was lost to rounding.

        It is the length of the actual change along the update, divided by the update's length.
        """
        return self._actual / self._expected if self._expected else 1.0

    def add(self, expected: torch.Tensor, actual: torch.Tensor) -> None:
        """Add the expected and the actual change of a weight."""
        self._expected += float((expected * expected).sum())
        self._actual += float((expected * actual).sum())


@dataclass(frozen=True)
class _Update:
    """Low-rank update of one weight: `scale * left @ right`, of the weight's shape."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None
    by_column: bool
    """True if an output is a column of the weight instead of a row; `magnitude` has a number for each output."""

    def rows(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the update of some rows, without magnitudes, and a bound of its error in float32."""
        left = self.left[rows]
        exact = self.scale * (left @ self.right)
        bound = abs(self.scale) * (left.abs() @ self.right.abs())
        return exact, bound * (2 * len(self.right) + 4) * _FLOAT32


def check_merge(base: Path, adapter: Path, merged: Path, tied: frozenset[str] = frozenset()) -> MergeCheck:
    """Compare all weights in the safetensors files of `merged` with the sum of `base` and `adapter`.

    `tied`: names of the base's input and output embeddings if it ties them. Raises UserError for a weight that is
    missing or differs.
    """
    settings = PeftConfig.from_pretrained(adapter)
    assert isinstance(settings, LoraConfig)
    with safe_open(adapter / ADAPTER_SAFE_WEIGHTS_NAME, "pt") as file:
        adapted = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    paths = {name: path for path in find_weight_files(base) for name in _names(path)}
    result = MergeCheck()
    used: set[str] = set()
    for path in find_weight_files(merged):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                source = name if name in paths else next(iter(tied & paths.keys()), None) if name in tied else None
                if source is None:
                    raise UserError(f"{path}: {name} is no weight of {base}.")
                with safe_open(paths[source], "pt") as original:
                    _check_weight(
                        name, original.get_tensor(source), file.get_tensor(name), adapted, settings, result, used
                    )
                result.names.append(name)
    missing = sorted(paths.keys() - set(result.names)) or sorted(adapted.keys() - used)
    if missing:
        raise UserError(f"{merged}: {missing[0]} and {len(missing) - 1:,} more are missing.")
    return result


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _check_weight(
    name: str,
    before: torch.Tensor,
    after: torch.Tensor,
    adapted: dict[str, torch.Tensor],
    settings: LoraConfig,
    result: MergeCheck,
    used: set[str],
) -> None:
    module = name.removesuffix(".weight")
    parts = {key: adapted[key] for key in adapted if key.startswith(f"{module}.lora_")}
    saved_base = f"{module}.base_layer.weight"  # peft saves the embedding that an adapted one lies over
    before = adapted.get(saved_base, before)
    used |= {*parts, *({name, saved_base} & adapted.keys())}
    if before.shape != after.shape:
        raise UserError(f"{name}: the merged weight is {list(after.shape)}, the base's {list(before.shape)}.")
    if not parts:
        replacement = adapted.get(name, before)
        if not torch.equal(replacement.to(after.dtype), after):
            owner = "the adapter's" if name in adapted else "the base's, which the adapter doesn't change"
            raise UserError(f"{name}: the merged weight is not {owner}.")
        if name in adapted:
            result.changed += 1
            for rows in _slices(before):
                result.add(*(value[rows].double() - before[rows].double() for value in (replacement, after)))
        return
    result.changed += 1
    update = _update(module, parts, settings, before)
    norms = _norms(before, update) if update.magnitude is not None else None
    worst = 0.0
    for rows in _slices(before):
        plain = before[rows].double()
        delta, error = update.rows(rows)
        expected = plain + delta
        if update.magnitude is not None and norms is not None:
            factor = update.magnitude / norms
            factor = factor[None, :] if update.by_column else factor[rows, None]
            expected = factor * expected
            error = factor.abs() * error + expected.abs() * 64 * _FLOAT32  # the norm's, too
        error = error + expected.abs() * 2 * _FLOAT32
        off = (after[rows].double() - expected).abs()
        worst = max(worst, float((off / (error + _half_unit(expected, after.dtype))).max().nan_to_num(math.inf)))
        change = expected - plain
        result.add(torch.where(change.abs() > error, change, 0), after[rows].double() - plain)
    if worst > 1:
        raise UserError(
            f"{name}: the merged weight is not base plus update: its error is {worst:,.1f} times that of rounding to "
            f"{str(after.dtype).removeprefix('torch.')}."
        )


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(weight[0].numel(), 1))
    return (slice(start, start + step) for start in range(0, len(weight), step))


def _update(module: str, parts: dict[str, torch.Tensor], settings: LoraConfig, weight: torch.Tensor) -> _Update:
    value = {key.removeprefix(f"{module}.").removesuffix(".weight"): tensor.double() for key, tensor in parts.items()}
    embedding = "lora_embedding_A" in value
    a, b = (value[f"lora_embedding_{side}" if embedding else f"lora_{side}"] for side in "AB")
    alphas = settings.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), settings.lora_alpha)
    scale = alpha / (math.sqrt(len(a)) if settings.use_rslora else len(a))
    straight, turned = (len(b), a.shape[1]), (a.shape[1], len(b))
    if tuple(weight.shape) not in (straight, turned):
        raise UserError(f"{module}: its update is {list(straight)} and its weight {list(weight.shape)}.")
    by_column = embedding or tuple(weight.shape) != straight or (straight == turned and settings.fan_in_fan_out)
    left, right = (a.T, b.T) if by_column else (b, a)
    return _Update(left, right, scale, value.get("lora_magnitude_vector"), by_column)


def _norms(weight: torch.Tensor, update: _Update) -> torch.Tensor:
    squares = []
    for rows in _slices(weight):
        squares.append((weight[rows].double() + update.rows(rows)[0]) ** 2)
        squares[-1] = squares[-1].sum(0 if update.by_column else 1)
    return (torch.stack(squares).sum(0) if update.by_column else torch.cat(squares)).sqrt()


def _half_unit(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return half a unit in the last place of numbers of this magnitude."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp(min=limits.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(value, limits.eps / 4), exponent)
