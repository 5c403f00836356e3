"""A plan as lines of plain text, for the page of `--check`."""

import shlex
from collections.abc import Callable, Sequence

from train.preflight.plan.candidates import EIGHT_BIT_ADAM, MAX_NODES, Candidate, FewestGpus
from train.preflight.plan.cluster import GIB, RESERVE
from train.preflight.plan.plan import RunPlan

_COMMAND_WIDTH = 42
_PARTS = {
    "weights": "parameters",
    "grads": "gradients",
    "optim.": "optimizer",
    "comm.": "communication",
    "activ.": "activations",
    "layer": "layer",
    "head": "head",
    "step": "step",
    "total": "total",
}
"""Rows of the table, and their fields of `Memory`."""
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def describe_plan(plan: RunPlan) -> list[str]:
    """Return the plan as lines of plain text."""
    cluster, best = plan.cluster, plan.best
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus}"
    gpu = "taken for H100" if cluster.assumed else cluster.gpu
    lines = [
        f"{nodes} GPU{'s' if cluster.gpus > 1 else ''} of {cluster.memory / GIB:.0f} GB ({gpu}); {plan.method}, "
        f"{plan.trained_parameters:,} of {plan.parameters:,} parameters, {plan.optimizer}",
        f"best settings of each strategy, sequences of {plan.tokens_per_sequence:,} tokens; GiB on each GPU:",
        *_table(plan.candidates),
        "the recipe as written:",
        *_totals(plan.written),
        "ckpt: gradient checkpointing; batch: sequences at a time x accumulation steps; total: the first five and the "
        f"largest of layer and head, or the first four and step; {RESERVE:.0%} of a GPU is left free; hours: by a "
        f"model that no GPU has confirmed{f', as of {cluster.gpu}: --gpus names none' if cluster.assumed else ''}",
    ]
    lines += [
        f"{candidate.memory.strategy} refuses the recipe as written: {candidate.refusal}"
        for candidate in plan.written
        if candidate.refusal
    ]
    lines += [
        f"{candidate.memory.strategy} takes {candidate.memory.host * cluster.gpus / GIB:,.0f} GiB of each host"
        for candidate in plan.candidates
        if candidate.memory.host
    ]
    lines += _describe_best(plan, best) if best else _describe_misfit(plan)
    lines += _describe_fewest(plan)
    attention = plan.attention_flops / max(plan.flops, 1)
    per_gpu, rest = divmod(plan.sequences_per_step, cluster.processes)
    each_gpu = (
        f" (the recipe's {per_gpu:,} on each of {cluster.processes:,} GPUs)"
        if cluster.processes > 1 and not rest
        else ""
    )
    return [
        *lines,
        f"{plan.steps:,} step{'s' if plan.steps > 1 else ''} of {plan.sequences_per_step:,} sequences{each_gpu}, "
        f"{plan.tokens:,} tokens, {plan.flops:.3g} FLOPs, {attention:.1%} of them attention",
        f"counted: {plan.convention}",
        *plan.notes,
    ]


def describe_settings(candidate: Candidate) -> str:
    """Return the settings of a candidate in a few words."""
    settings = candidate.settings
    checkpointing = "no" if settings.checkpointing == "none" else settings.checkpointing
    return (
        f"{settings.strategy.name}, {checkpointing} checkpointing, {settings.batch} x {settings.accumulation} sequences"
    )


def _describe_best(plan: RunPlan, best: Candidate) -> list[str]:
    cluster, seconds = plan.cluster, best.seconds
    mfu = plan.flops / max((plan.hours - plan.reference_hours) * 3_600 * cluster.processes * cluster.peak_flops, 1e-9)
    parts = {"communication": seconds.communication, "memory traffic": seconds.traffic, "the host": seconds.host}
    offload = best.settings.strategy.offload
    gpu_hours = f"{plan.gpu_hours:,.1f}" if plan.gpu_hours >= 1 else f"{plan.gpu_hours:.2g}"
    return [
        f"{'nothing fits without offload; with it' if offload else 'fastest that fits without offload'}: "
        f"{describe_settings(best)}; {_gib(best)} of {best.usable_memory / GIB:,.1f} GiB",
        *(_command(plan.launch) if plan.launch else ()),
        f"{_format_hours(plan.hours)} ({gpu_hours} GPU-hours), {mfu:.0%} MFU: "
        f"{seconds.compute:,.3g} s of computing a step"
        + "".join(f", {value:,.2g} s of {name}" for name, value in parts.items() if value)
        + f"; computing at {cluster.mfu:.0%} of {cluster.gpu}'s {cluster.peak_flops / 1e12:,.0f} TFLOP/s with full "
        "checkpointing (--mfu)"
        + (f"; {_format_hours(plan.reference_hours)} for the reference before step 1" if plan.reference_hours else ""),
    ]


def _describe_misfit(plan: RunPlan) -> list[str]:
    nearest = min(plan.candidates, key=lambda candidate: (candidate.refusal is not None, candidate.memory.total))
    memory = nearest.memory
    states = memory.parameters + memory.gradients + memory.optimizer + memory.communication
    return [
        f"none fits; the nearest is {describe_settings(nearest)}: {_gib(nearest)} of "
        f"{nearest.usable_memory / GIB:,.1f} GiB, {states / GIB:,.1f} of them weights, gradients, optimizer and "
        "communication. Take more GPUs, an adapter, or a smaller data.max_length"
    ]


def _describe_fewest(plan: RunPlan) -> list[str]:
    """Return the fewest GPUs, and what 8-bit Adam changes."""
    own, *others = plan.fewest_gpus
    lines = [f"fewest such GPUs that it fits without offload: {_format_fewest(own, plan)}"]
    for other in others:
        eight = plan.eight_bit
        fits = f"{describe_settings(eight)}, {_gib(eight)} GiB, {_format_hours(eight.hours)}" if eight else "fits none"
        lines.append(f"8-bit Adam (training.optim={EIGHT_BIT_ADAM}): {fits}; fewest: {_format_fewest(other, plan)}")
        if eight and not (plan.best and not plan.best.settings.strategy.offload):
            lines.append(f"with it: {' '.join(eight.overrides)}")
    return lines


def _format_fewest(fewest: FewestGpus, plan: RunPlan) -> str:
    if fewest.nodes is None:
        return f"none up to --nodes {MAX_NODES}"
    gpus = f"{fewest.gpus}" if fewest.gpus else f"--nodes {fewest.nodes} of {plan.cluster.gpus}"
    return f"{gpus} ({fewest.strategy})"


def _table(candidates: Sequence[Candidate]) -> list[str]:
    """Return settings and GiB by part, a column for each strategy; in 48 columns, which fit a narrow terminal."""

    def row(label: str, cell: Callable[[Candidate], str]) -> str:
        return f"{label:<8}" + "".join(f"{cell(candidate):>8}" for candidate in candidates)

    def part(field: str) -> Callable[[Candidate], str]:
        return lambda candidate: f"{getattr(candidate.memory, field) / GIB:,.1f}"

    return [
        row("", lambda candidate: candidate.memory.strategy.replace("ZeRO-3 offload", "offload")),
        row("dtype", lambda candidate: _DTYPES.get(candidate.settings.dtype, candidate.settings.dtype)),
        row("ckpt", lambda candidate: candidate.settings.checkpointing.replace("selective", "select.")),
        row("batch", lambda candidate: f"{candidate.settings.batch}x{candidate.settings.accumulation}"),
        *(row(label, part(field)) for label, field in _PARTS.items()),
        *_fit_and_hours(candidates),
    ]


def _totals(candidates: Sequence[Candidate]) -> list[str]:
    totals = "".join(f"{_gib(candidate):>8}" for candidate in candidates)
    return [f"{'total':<8}{totals}", *_fit_and_hours(candidates)]


def _fit_and_hours(candidates: Sequence[Candidate]) -> list[str]:
    fits = "".join(f"{'yes' if candidate.fits else 'no':>8}" for candidate in candidates)
    hours = "".join(f"{_shorten(candidate.hours):>8}" for candidate in candidates)
    return [f"{'fits':<8}{fits}", f"{'hours':<8}{hours}"]


def _gib(candidate: Candidate) -> str:
    return f"{candidate.memory.total / GIB:,.1f}"


def _command(launch: str) -> list[str]:
    """Return a command in lines that a shell reads as one: broken between words, never inside quotes."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(launch)):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _COMMAND_WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return [f"  {'  ' if number else ''}{line}" for number, line in enumerate(" \\\n".join(lines).split("\n"))]


def _format_hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:,.1f} minutes" if hours >= 1 / 60 else f"{hours * 3_600:.2g} seconds"


def _shorten(hours: float) -> str:
    """Return a number of at most seven characters, which leaves a space between the columns."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}" if hours >= 0.01 else f"{hours:.2g}"
