"""Linear layers that multiply in float8: hardware checks, conversion, and a test of its effect on the loss.

The layers are torchao's, selected as accelerate does. Weights, gradients, optimizer states and saved files don't
change: only the factors of a product are rounded to 8 bits with a scale, in each product again.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from train.errors import MachineError, UserError
from train.model.attention.selection import machine
from train.model.text_part import output_layer
from train.ranks import is_first_rank
from train.recipe import Recipe

MULTIPLE = 16
"""Float8 kernels need sizes that are multiples of it (torch._scaled_mm)."""
_CAPABILITY = (8, 9)
"""First compute capability with float8 tensor cores: Ada (8.9), Hopper (9.0), Blackwell (10.0 and later)."""
_NEEDS = "the recipe computes in float8, which takes a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell)"
_SHARE = 2**-4
"""Allowed error of the loss, as a share of it (of 1 nat if it is smaller). e4m3 has 3 bits of mantissa, so each factor
of a product is off by at most 2**-4 of itself (root mean square 2.6 %). Such errors are independent and mostly cancel
in a sum, so the loss, a mean over long sums, must be off by less than a single factor. In emulation SmolLM2-135M's was
off by 0.5 to 1.0 % over 400 tokens; with wrong scales or kernels the error is several nats."""
_STANDARD_ERRORS = 3
"""Allowed besides, as the mean over a few tokens is uncertain: single ones are off by 0.3 nats (SmolLM2-135M)."""
TOKENS = 512
"""Maximum tokens of the measured row: enough for a mean, and few enough for their logits to fit beside any model."""


def check_float8(recipe: Recipe) -> None:
    """Raise UserError if torchao is missing for `model.float8`, or if this machine's GPU has no float8.

    A machine without a GPU passes, as training may run on another; `check_float8_start` checks that one.
    """
    if recipe.model.float8 is None:
        return
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "model.float8: it needs the package torchao, which is not installed or doesn't fit this torch",
            "Install it with `pip install torchao`, or write null.",
        ) from error
    if machine().capability is not None:
        _check_gpu()


def check_float8_start(recipe: Recipe) -> None:
    """Raise UserError if a run in float8 is about to start on a machine that can't run it."""
    if recipe.model.float8 is None:
        return
    check_float8(recipe)
    _check_gpu()


def _check_gpu() -> None:
    name = torch.cuda.get_device_name() if machine().capability else ""
    if reason := gpu_objection(machine().capability, name):
        raise MachineError(reason, "Write null, or train on another machine.")


def gpu_objection(capability: tuple[int, int] | None, name: str = "") -> str | None:
    """Return why a GPU of this compute capability (None = no GPU) has no float8; None if it has."""
    if capability is not None and capability >= _CAPABILITY:
        return None
    here = f"this one, {name}, has {capability[0]}.{capability[1]}" if capability else "this machine has none"
    return f"model.float8: {_NEEDS}; {here}"


def float8_warnings(recipe: Recipe) -> list[str]:
    """Return warnings for a recipe in float8 that can be trained."""
    warnings: list[str] = []
    if recipe.model.float8 is None:
        return warnings
    if machine().capability is None:
        warnings.append(f"model.float8: {_NEEDS}, and this machine has no GPU: the one that trains must have one")
    if not recipe.training.get("torch_compile"):
        warnings.append(
            "model.float8: without `training.torch_compile: true` the rounding to float8 is not fused into the kernels "
            "before it, and takes more time than the products save"
        )
    return warnings


def convert(model: PreTrainedModel, recipe_name: str, *, emulate: bool = False) -> None:
    """Convert the model's linear layers to float8, by one of torchao's recipes. Parameters and names don't change.

    The first and the last linear layer, the output layer, and sizes that kernels don't support are not converted.
    `emulate`: the same numbers without float8 kernels, slowly, on any machine.
    Raises UserError if no layer can be converted.
    """
    from accelerate.utils.ao import convert_model_to_fp8_ao, filter_linear_layers, find_first_last_linear_layers
    from torchao.float8 import Float8LinearConfig

    # The tokens of a sequence are the inner size of the weights' gradient, and rarely a multiple of 16.
    config = replace(Float8LinearConfig.from_recipe_name(recipe_name), pad_inner_dim=True, emulate=emulate)
    ends = {*find_first_last_linear_layers(model)}
    output = output_layer(model)
    excluded = [*ends, *(name for name, module in model.named_modules() if module is output)]

    def is_converted(module: torch.nn.Module, name: str) -> bool:
        return filter_linear_layers(module, name, layers_to_filter=excluded)

    convert_model_to_fp8_ao(model, config=config, module_filter_func=is_converted)
    if not find_linear_layers(model).converted:
        raise UserError(
            f"model.float8: none of the model's {len(find_linear_layers(model).others)} linear layers can compute in "
            "float8: "
            f"their sizes must be multiples of {MULTIPLE}, and the first layer and the last stay as they are. "
            "Write null."
        )


@dataclass(frozen=True)
class LinearLayers:
    """Names of a model's linear layers without those of adapters: converted to float8, and others."""

    converted: list[str]
    others: list[str]

    def __str__(self) -> str:
        """Return the line of the start screen."""
        total = len(self.converted) + len(self.others)
        names = ", ".join(self.others[:3]) + (f" and {len(self.others) - 3:,} more" if len(self.others) > 3 else "")
        return f"{len(self.converted):,} of {total:,} linear layers; not converted: {names or 'none'}"


def find_linear_layers(model: torch.nn.Module) -> LinearLayers:
    """Return the linear layers of `model`, by whether they compute in float8."""
    converted: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "lora_" in name or "original_module" in name:
            continue
        short = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save", "")
        (converted if _is_float8(module) else others).append(short)
    return LinearLayers(converted, others)


def _is_float8(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Float8Linear"  # the class isn't part of torchao's public API


@contextmanager
def without_float8(model: torch.nn.Module) -> Iterator[None]:
    """Make the float8 layers of `model` plain linear layers inside the block."""
    float8 = [module for module in model.modules() if _is_float8(module)]
    kinds = [type(module) for module in float8]
    for module in float8:
        module.__class__ = torch.nn.Linear  # hooks, parameters and names stay
    try:
        yield
    finally:
        for module, kind in zip(float8, kinds, strict=True):
            module.__class__ = kind


@dataclass(frozen=True)
class LossDifference:
    """Mean losses of a row's tokens in nats, with the same weights."""

    float8: float
    plain: float
    standard_error: float
    """Standard error of the mean difference over the tokens."""
    tokens: int

    def __str__(self) -> str:
        """Return the line of the start screen."""
        return f"the loss of a row ({self.tokens:,} tokens) is {self.float8:.4f}, {self.plain:.4f} without it"

    def error(self) -> str | None:
        """Return an error if rounding doesn't explain the difference; None if it does, or if `plain` isn't finite."""
        if not torch.tensor(self.plain).isfinite():
            return None
        losses = f"the loss of a row ({self.tokens:,} tokens) is {self.float8:.4f} with it, {self.plain:.4f} without it"
        if not torch.tensor(self.float8).isfinite():
            return losses
        allowed = _SHARE * max(self.plain, 1.0) + _STANDARD_ERRORS * self.standard_error
        if abs(self.float8 - self.plain) <= allowed:
            return None
        return f"{losses}: rounding to 8 bits explains {allowed:.2g} ({_SHARE:.2%} of the loss, and 3 standard errors)"


def measure_loss_difference(
    model: torch.nn.Module, row: Sequence[int], device: torch.device, *, bf16: bool
) -> LossDifference:
    """Measure the loss of `row` with and without float8, before training.

    - `row`: token ids, of which the first TOKENS count; the same on all processes, which must all call this;
    - `device`: where to compute; the weights may still be in host memory, or partitioned by ZeRO-3;
    - `bf16`: under autocast, as in training.

    Raises UserError, on every process, if rounding doesn't explain the difference.
    """
    from accelerate.utils import broadcast_object_list

    measured: list[Any] = [None]
    split = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if split or is_first_rank():  # with FSDP the first rank alone has the weights
        measured = [_measure(model, row[:TOKENS], device, bf16=bf16)]
    broadcast_object_list(measured)  # the error must be raised on all processes
    difference: LossDifference = measured[0]
    if error := difference.error():
        raise UserError(f"model.float8: {error}. Write another of torchao's recipes, `rowwise_with_gw_hp`, or null.")
    return difference


def _measure(model: torch.nn.Module, row: Sequence[int], device: torch.device, *, bf16: bool) -> LossDifference:
    ids = torch.tensor([row], device=device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # no cache: it would hold a second copy of all weights
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
        with torch.no_grad(), autocast, _gathered_on(model, device):
            float8 = _token_losses(model, ids)
            with without_float8(model):
                plain = _token_losses(model, ids)
    finally:
        for module, mode in modes:
            module.training = mode
    difference = float8 - plain
    return LossDifference(
        float8=float8.mean().item(),
        plain=plain.mean().item(),
        standard_error=(difference.var(unbiased=False) / len(difference)).sqrt().item(),
        tokens=len(difference),
    )


def _token_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().cpu()


@contextmanager
def _gathered_on(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Gather each module's weights on `device` while it computes, inside the block.

    Before training, DeepSpeed and FSDP keep them in host memory, and ZeRO-3 a partition of each on every rank.
    """
    fetched: dict[torch.nn.Module, ExitStack] = {}

    def fetch(module: torch.nn.Module, _: Any) -> None:
        fetched[module] = stack = ExitStack()
        own = [*module.parameters(recurse=False)]
        if any(hasattr(parameter, "ds_id") for parameter in own):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(own))
        for tensor in [*own, *module.buffers(recurse=False)]:
            if tensor.device != device:
                stack.callback(setattr, tensor, "data", tensor.data)
                tensor.data = tensor.data.to(device)

    def put_back(module: torch.nn.Module, *_: Any) -> None:
        fetched.pop(module).close()

    hooks = []
    for module in model.modules():
        hooks += [
            module.register_forward_pre_hook(fetch),
            module.register_forward_hook(put_back, always_call=True),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
