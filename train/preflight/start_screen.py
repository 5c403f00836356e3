"""TODO: train.preflight.page.start_screen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from train.data.diagnostics import describe_dropped, describe_unread, find_data_warnings, find_dropped_rows
from train.data.prepare import Prepared, SplitStats
from train.formatting import format_count, visible, wrap
from train.preflight.page import _NAME
from train.recipe import Recipe
from train.recipe.schedule import compute_schedule, schedule_warnings

if TYPE_CHECKING:  # --check does without both, and importing them takes seconds
    from transformers import PreTrainedModel
    from trl import SFTConfig


def start_screen(
    recipe: Recipe,
    template: str,
    data: Prepared,
    model: "PreTrainedModel",
    arguments: "SFTConfig",
    system_gain: str | None = None,
    *,
    model_notes: Sequence[str] = (),
    width: int = 80,
) -> str:
    """Return model, data, batches and what is trained as plain text in lines of `width` columns.

    `template`, `system_gain`: their descriptions.
    """
    from train.model.attention.selection import attention_for
    from train.model.float8 import float8_warnings

    trained, total = _parameters(model)
    kind = "full fine-tuning" if recipe.adapter is None else f"LoRA r={recipe.adapter.r}"
    if recipe.quantization is not None:
        kind += f" on 4-bit {recipe.quantization.bnb_4bit_quant_type}"
    account = data.train.stats
    processes = arguments.world_size * max(arguments.n_gpu, 1)  # of one process without DDP all GPUs take a batch each
    steps = compute_schedule(recipe.training, len(data.train.dataset), account.tokens_per_sequence, processes)
    warned = [
        *find_data_warnings(data),
        *float8_warnings(recipe),
        *schedule_warnings(recipe.training, steps, len(data.train.dataset)),
    ]
    lines = [
        ("model", f"{recipe.model.name_or_path}, {recipe.model.dtype}"),
        *(("", sentence) for sentence in model_notes),
        ("attention", str(attention_for(recipe, model.config))),
        ("training", f"{kind}: {trained:,} of {total:,} parameters ({trained / total:.2%})"),
        *(_describe_float8(recipe, data, model, arguments) if recipe.model.float8 else []),
        ("template", template),
        *_describe("data", data.train.stats, recipe),
        *(_describe("validation", data.validation.stats, recipe) if data.validation else []),
        *(("dropped", describe_dropped(one)) for one in find_dropped_rows(data, recipe.data)),
        *(("" if number else "not read", value) for number, value in enumerate(describe_unread(data.unread))),
        *(("warning", warning) for warning in warned),
        *([("system gain", system_gain)] if system_gain else []),
        (
            "steps",
            f"{format_count(steps.steps, 'step')} of {format_count(steps.sequences_per_step, 'sequence')}, about "
            f"{steps.tokens_per_step:,.0f} tokens; {format_count(arguments.world_size, 'process')}",
        ),
        *([("", _describe_waiting(data, model, arguments))] if arguments.world_size > 1 else []),
        ("output", recipe.output_dir),
    ]
    return "\n".join(f"{name:<{_NAME}}{wrap(visible(value), width, _NAME)}" for name, value in lines)


def _describe_float8(
    recipe: Recipe, data: Prepared, model: "PreTrainedModel", arguments: "SFTConfig"
) -> list[tuple[str, str]]:
    """Which layers compute so, and the loss with and without. Raises UserError where rounding doesn't explain it."""
    from train.model.float8 import TOKENS, layers_of, loss_difference

    rows = data.train.dataset
    longest = int(np.minimum(rows.lengths[:1_000], TOKENS).argmax())
    difference = loss_difference(model, rows.row(longest)[0].tolist(), arguments.device, bf16=bool(arguments.bf16))
    return [("float8", f"{recipe.model.float8}: {layers_of(model)}"), ("", str(difference))]


def _describe_waiting(data: Prepared, model: "PreTrainedModel", arguments: "SFTConfig") -> str:
    from train.loop.sampler import BalancedSampler

    plain, dealt = BalancedSampler(data.train.dataset, arguments, model.config).epoch_imbalance()
    return (
        f"ranks wait for each other {dealt - 1:.1%} of the time, as long documents are balanced between them "
        f"({plain - 1:.1%} in random order)"
    )


def _describe(name: str, account: SplitStats, recipe: Recipe) -> list[tuple[str, str]]:
    share = account.trained_tokens / max(account.tokens, 1)
    lines = [
        (
            name,
            f"{format_count(account.rows, 'row')}, {format_count(account.tokens, 'token')}, {share:.1%} of them trained",
        )
    ]
    if recipe.data.packing:
        filling = account.tokens / max(account.sequences * recipe.data.max_length, 1)
        sequences = format_count(account.sequences, "sequence")
        lines.append(("", f"packed into {sequences} of {recipe.data.max_length:,}, {filling:.1%} full"))
    if account.overlong_tokens:
        lost = f"{format_count(account.overlong_tokens, 'token')} lost from rows over {recipe.data.max_length:,} tokens"
        lines.append(("", lost))
    return lines


def _parameters(model: "PreTrainedModel") -> tuple[int, int]:
    """Parameters trained and in all; quantized ones count for what they stand for, ZeRO-3's with their whole size."""
    trained = total = 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.__class__.__name__ == "Params4bit":
            size = parameter.quant_state.shape.numel() if parameter.quant_state else size
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total
