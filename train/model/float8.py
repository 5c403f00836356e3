"""Linear layers that multiply in float8: which of a model's do, on what machine, and how far that takes its loss.

The products are torchao's, chosen as accelerate chooses them. Weights, gradients, optimizer states and what is saved
stay as they are; only the factors of a product are rounded, each time anew, to 8 bits with a scale.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from train.errors import UserError
from train.model.attention.selection import machine
from train.ranks import is_first_rank
from train.recipe import Recipe

MULTIPLE = 16
"""Float8 kernels take sizes that are multiples of it (torch._scaled_mm)."""
_CAPABILITY = (8, 9)
"""The first with float8 tensor cores: Ada (8.9), Hopper (9.0), Blackwell (10.0 and later)."""
_NEEDS = "the recipe computes in float8, which takes a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell)"
_SHARE = 2**-4
"""How far the loss may be off, as a share of it (of 1 nat where it is smaller). e4m3 has 3 bits of mantissa, so each
factor of a product is off by at most 2**-4 of itself (root mean square 2.6 %). Such errors are independent and mostly
cancel in a sum: the loss, a mean of what long sums made, must be off by less than a single factor may be. In emulation
SmolLM2-135M's was off by 0.5 to 1.0 % over 400 tokens; where scales or kernels are wrong, it is off by nats."""
_STANDARD_ERRORS = 3
"""A few tokens can't tell more exactly: single ones are off by 0.3 nats (SmolLM2-135M), up as well as down."""
TOKENS = 512
"""Most tokens of the row that is measured: enough for a mean, and their logits fit beside any model."""


def check_float8(recipe: Recipe) -> None:
    """Raise UserError where `model.float8` lacks a package, or this machine's GPU is one without float8.

    A machine without any GPU passes: the one that trains may be another. `check_float8_start` asks there.
    """
    if recipe.model.float8 is None:
        return
    try:
        import torchao.float8  # noqa: F401
    except ImportError as fault:
        raise UserError(
            "model.float8: it needs the package torchao, which is not installed or doesn't fit this torch. Install it "
            "with `pip install torchao`, or write null."
        ) from fault
    if machine().capability is not None:
        _check_gpu()


def check_float8_start(recipe: Recipe) -> None:
    """Raise UserError where a run in float8 is about to start on a machine, or in a way, that can't."""
    if recipe.model.float8 is None:
        return
    check_float8(recipe)
    training = recipe.training
    checkpointing = training.get("gradient_checkpointing", training.get("activation_checkpointing"))
    if is_deepspeed_zero3_enabled() and checkpointing is False:
        raise UserError(
            "model.float8: under ZeRO-3 its layers would hold all weights, gathered from all ranks, from the forward "
            "to the backward pass. Write `training.gradient_checkpointing: true`, which holds those of one layer."
        )
    _check_gpu()


def _check_gpu() -> None:
    name = torch.cuda.get_device_name() if machine().capability else ""
    if fault := gpu_error(machine().capability, name):
        raise UserError(fault)


def gpu_error(capability: tuple[int, int] | None, name: str = "") -> str | None:
    """What is wrong with a GPU of such a compute capability, None being no GPU at all; None if nothing is."""
    if capability is not None and capability >= _CAPABILITY:
        return None
    here = f"this one, {name}, has {capability[0]}.{capability[1]}" if capability else "this machine has none"
    return f"model.float8: {_NEEDS}; {here}. Write null, or train on another machine."


def float8_warnings(recipe: Recipe) -> list[str]:
    """What a person should know of a recipe in float8, though nothing keeps it from being trained."""
    found: list[str] = []
    if recipe.model.float8 is None:
        return found
    if machine().capability is None:
        found.append(f"model.float8: {_NEEDS}, and this machine has no GPU: the one that trains must have one")
    if not recipe.training.get("torch_compile"):
        found.append(
            "model.float8: without `training.torch_compile: true` the rounding to float8 is not fused into the kernels "
            "before it, and takes more time than the products save"
        )
    return found


def convert(model: PreTrainedModel, recipe_name: str, *, emulate: bool = False) -> None:
    """Have the model's linear layers multiply in float8, by one of torchao's recipes. Parameters and names stay.

    Left as they are: the first linear layer and the last, the output layer, and sizes that kernels don't take.
    `emulate`: the same numbers without float8 kernels, slowly, on any machine.
    Raises UserError where no layer would be left to compute so.
    """
    from accelerate.utils.ao import convert_model_to_fp8_ao, filter_linear_layers, find_first_last_linear_layers
    from torchao.float8 import Float8LinearConfig

    # The tokens of a sequence are the inner size of the weights' gradient, and rarely a multiple of 16.
    config = replace(Float8LinearConfig.from_recipe_name(recipe_name), pad_inner_dim=True, emulate=emulate)
    ends = {*find_first_last_linear_layers(model)}
    output = model.get_output_embeddings()
    kept = [*ends, *(name for name, module in model.named_modules() if module is output)]

    def chosen(module: torch.nn.Module, name: str) -> bool:
        return filter_linear_layers(module, name, layers_to_filter=kept)

    convert_model_to_fp8_ao(model, config=config, module_filter_func=chosen)
    if not find_linear_layers(model).converted:
        raise UserError(
            f"model.float8: none of the model's {len(find_linear_layers(model).others)} linear layers can compute in float8: "
            f"their sizes must be multiples of {MULTIPLE}, and the first layer and the last stay as they are. "
            "Write null."
        )


@dataclass(frozen=True)
class LinearLayers:
    """The names of a model's linear layers, but for an adapter's own: those in float8, and the others."""

    converted: list[str]
    others: list[str]

    def __str__(self) -> str:
        """As the start screen shows it."""
        total = len(self.converted) + len(self.others)
        named = ", ".join(self.others[:3]) + (f" and {len(self.others) - 3:,} more" if len(self.others) > 3 else "")
        return f"{len(self.converted):,} of {total:,} linear layers; as they are: {named or 'none'}"


def find_linear_layers(model: torch.nn.Module) -> LinearLayers:
    """Which linear layers of `model` compute in float8, and which don't."""
    converted: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "lora_" in name or "original_module" in name:
            continue
        short = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save", "")
        (converted if _is_float8(module) else others).append(short)
    return LinearLayers(converted, others)


def _is_float8(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Float8Linear"  # torchao calls the class itself none of its API


@contextmanager
def without_float8(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the float8 layers of `model` multiply their weights as plain linear layers do."""
    float8 = [module for module in model.modules() if _is_float8(module)]
    kinds = [type(module) for module in float8]
    for module in float8:
        module.__class__ = torch.nn.Linear  # hooks, parameters and places stay
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
    """Of the mean of their differences over the tokens."""
    tokens: int

    def __str__(self) -> str:
        """As the start screen shows it."""
        return f"the loss of a row ({self.tokens:,} tokens) is {self.float8:.4f}, {self.plain:.4f} without it"

    def fault(self) -> str | None:
        """What is wrong, in words; None if nothing is, or if the loss isn't finite without float8 either."""
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
    """What float8 makes of the loss of `row` (token ids, of which the first TOKENS count), before training.

    `device`: where to compute; the weights may be in host memory still, or split by ZeRO-3. `bf16`: under autocast, as
    training is. All processes must call this with the same row.
    Raises UserError, on every process, where rounding doesn't explain the difference.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    split = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if split or is_first_rank():  # with FSDP the first rank alone has the weights
        found = [_measure(model, row[:TOKENS], device, bf16=bf16)]
    broadcast_object_list(found)  # all end alike
    difference: LossDifference = found[0]
    if fault := difference.fault():
        raise UserError(f"model.float8: {fault}. Write another of torchao's recipes, `rowwise_with_gw_hp`, or null.")
    return difference


def _measure(model: torch.nn.Module, row: Sequence[int], device: torch.device, *, bf16: bool) -> LossDifference:
    ids = torch.tensor([row], device=device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # no cache: it would hold a second copy of all weights
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
        with torch.no_grad(), autocast, _at_hand(model, device):
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
def _at_hand(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a module's own weights are whole and on `device` while it computes.

    Before training begins, DeepSpeed and FSDP leave them in host memory, and ZeRO-3 a piece of each on every rank.
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
