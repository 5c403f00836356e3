"""The start screen: model, data, batches and schedule of a run on one screen, before its first step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from train.data.diagnostics import (
    describe_dropped,
    describe_loss_weights,
    describe_unread,
    find_data_warnings,
    find_dropped_rows,
)
from train.data.prepared_data import PreparedData, SplitStats
from train.formatting import format_count, visible, wrap
from train.recipe import Recipe
from train.recipe.schedule import compute_schedule, data_parallel, schedule_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTConfig

_NAME = 12
"""Columns of the names at the left."""


def start_screen(
    recipe: Recipe,
    template: str,
    data: PreparedData,
    model: "PreTrainedModel",
    arguments: "SFTConfig",
    system_gain: str | None = None,
    samples: str | None = None,
    *,
    model_notes: Sequence[str] = (),
    width: int = 80,
) -> str:
    """Return model, data, batches and trained parameters as plain text in lines of `width` columns.

    `template`, `system_gain`, `samples`: their descriptions. `model_notes`: sentences on the model.
    """
    from train.loop.compilation import compile_warnings
    from train.model.attention.selection import select_attention
    from train.model.float8 import float8_warnings

    trained, total = _count_parameters(model)
    kind = "full fine-tuning" if recipe.adapter is None else f"LoRA r={recipe.adapter.r}"
    if recipe.quantization is not None:
        kind += f" on 4-bit {recipe.quantization.bnb_4bit_quant_type}"
    stats = data.train.stats
    processes = arguments.world_size * max(
        arguments.n_gpu, 1
    )  # one process without DDP feeds a batch to each of its GPUs
    steps = compute_schedule(
        recipe.training,
        len(data.train.dataset),
        stats.tokens_per_sequence,
        processes,
        recipe.model.sequence_parallel,
    )
    warnings = [
        *find_data_warnings(data),
        *float8_warnings(recipe),
        *compile_warnings(arguments),
        *schedule_warnings(recipe.training, steps, len(data.train.dataset)),
    ]
    weights = describe_loss_weights(data, recipe.data)
    groups = data_parallel(arguments.world_size, recipe.model.sequence_parallel)
    lines = [
        ("model", f"{recipe.model.name_or_path}, {recipe.model.dtype}"),
        *(("", sentence) for sentence in model_notes),
        ("attention", str(select_attention(recipe, model.config))),
        ("training", f"{kind}: {trained:,} of {total:,} parameters ({trained / total:.2%})"),
        *(_describe_float8(recipe, data, model, arguments) if recipe.model.float8 else []),
        *([("preference", recipe.preference.describe())] if recipe.preference else []),
        ("template", template),
        *_describe("data", data.train.stats, recipe),
        *(_describe("validation", data.validation.stats, recipe) if data.validation else []),
        *(("" if number else "loss weight", value) for number, value in enumerate(weights)),
        *(("dropped", describe_dropped(dropped)) for dropped in find_dropped_rows(data, recipe.data)),
        *(("" if number else "not read", value) for number, value in enumerate(describe_unread(data.unread))),
        *(("warning", warning) for warning in warnings),
        *([("system gain", system_gain)] if system_gain else []),
        *([("samples", samples)] if samples else []),
        (
            "steps",
            f"{format_count(steps.steps, 'step')} of {format_count(steps.sequences_per_step, 'sequence')}, about "
            f"{steps.tokens_per_step:,.0f} tokens; {format_count(arguments.world_size, 'process')}{steps.sharing}",
        ),
        *([("", _describe_imbalance(data, model, arguments, groups))] if groups > 1 else []),
        ("output", recipe.output_dir),
    ]
    return "\n".join(f"{name:<{_NAME}}{wrap(visible(value), width, _NAME)}" for name, value in lines)


def _describe_float8(
    recipe: Recipe, data: PreparedData, model: "PreTrainedModel", arguments: "SFTConfig"
) -> list[tuple[str, str]]:
    """Return the layers in float8, and the loss with and without. Raises UserError if rounding doesn't explain it."""
    from train.model.float8 import TOKENS, find_linear_layers, measure_loss_difference

    rows = data.train.dataset
    longest = int(np.minimum(rows.lengths[:1_000], TOKENS).argmax())
    difference = measure_loss_difference(
        model, rows.row(longest)[0].tolist(), arguments.device, bf16=bool(arguments.bf16)
    )
    return [("float8", f"{recipe.model.float8}: {find_linear_layers(model)}"), ("", str(difference))]


def _describe_imbalance(data: PreparedData, model: "PreTrainedModel", arguments: "SFTConfig", groups: int) -> str:
    from train.loop.sampler import BalancedSampler

    sampler = BalancedSampler(data.train.dataset, arguments, model.config, ranks=groups)
    random_order, balanced = sampler.epoch_imbalance()
    return (
        f"ranks wait for each other {balanced - 1:.1%} of the time, as long documents are balanced between them "
        f"({random_order - 1:.1%} in random order)"
    )


def _describe(name: str, stats: SplitStats, recipe: Recipe) -> list[tuple[str, str]]:
    share = stats.trained_tokens / max(stats.tokens, 1)
    lines = [
        (
            name,
            f"{format_count(stats.rows, stats.unit)}, {format_count(stats.tokens, 'token')}, {share:.1%} of them "
            "trained",
        )
    ]
    if recipe.data.packing:
        filling = stats.tokens / max(stats.sequences * stats.capacity, 1)
        sequences = format_count(stats.sequences, "sequence")
        lines.append(("", f"packed into {sequences} of {stats.capacity:,}, {filling:.1%} full"))
    if stats.overlong_tokens:
        where = f"in dropped {stats.unit}s" if recipe.data.overlong == "drop" else f"truncated from {stats.unit}s"
        tokens = format_count(stats.overlong_tokens, "token")
        lines.append(("", f"{tokens} {where} over {recipe.data.max_length:,} tokens"))
    return lines


def _count_parameters(model: "PreTrainedModel") -> tuple[int, int]:
    """Return the number of trained and of all parameters; packed and partitioned ones count with their full size."""
    trained = total = 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.__class__.__name__ == "Params4bit":
            size = parameter.quant_state.shape.numel() if parameter.quant_state else size
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total
