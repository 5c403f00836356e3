"""A plan as lines of plain text, for the page of `--check`."""

from textwrap import wrap

from train.preflight.plan.candidates import MAX_NODES, FewestNodes
from train.preflight.plan.cluster import GIB, RESERVE
from train.preflight.plan.memory import Memory
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


def describe_plan(plan: RunPlan) -> list[str]:
    """Return the plan as lines of plain text."""
    cluster = plan.cluster
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus}"
    gpu = "taken for H100" if cluster.assumed else cluster.gpu
    lines = [
        f"{nodes} GPU{'s' if cluster.gpus > 1 else ''} of {cluster.memory / GIB:.0f} GB ({gpu}); {plan.method}, "
        f"{plan.trained_parameters:,} of {plan.parameters:,} parameters, {plan.optimizer}",
        f"GiB on each GPU, {plan.tokens_per_gpu:,} tokens at a time, "
        f"gradient checkpointing {'on' if plan.checkpointing else 'off'}:",
        *_table([candidate.memory for candidate in plan.candidates], [candidate.fits for candidate in plan.candidates]),
    ]
    for candidate in plan.candidates:
        memory = candidate.memory
        if candidate.fits and candidate.caution:
            lines.append(f"{memory.strategy} fits, {candidate.caution}")
        if memory.host:
            lines.append(f"{memory.strategy} takes {memory.host * cluster.gpus / GIB:,.0f} GiB of each host")
    lines.append(
        f"total: the first five and the largest of layer and head, or the first four and step; {RESERVE:.0%} of a GPU "
        "is left free"
    )
    if plan.chosen:
        lines += [
            f"recommended, as it fits with the least communication: {plan.chosen}",
            *_command(plan.launch or ""),
        ]
    else:
        lines.append(
            "none fits: take a smaller training.per_device_train_batch_size or data.max_length, an adapter or more GPUs"
        )
    lines += _describe_fewest_nodes(plan)
    attention = plan.attention_flops / max(plan.flops, 1)
    lines += [
        f"{plan.steps:,} steps of {plan.sequences_per_step:,} sequences, {plan.tokens:,} tokens, {plan.flops:.3g} "
        f"FLOPs, {attention:.1%} of them attention",
        f"{_format_hours(plan.hours)} ({plan.gpu_hours:,.1f} GPU-hours) at {cluster.mfu:.0%} of {cluster.gpu}'s "
        f"{cluster.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16",
    ]
    return [*lines, f"counted: {plan.convention}", *plan.notes]


def _describe_fewest_nodes(plan: RunPlan) -> list[str]:
    """Return the fewest nodes, and those with 8-bit Adam where the recipe's optimizer needs more than one."""
    own, *others = plan.fewest_nodes
    plural = "s" if plan.cluster.gpus > 1 else ""

    def fit(fewest: FewestNodes) -> str:
        return f"--nodes {fewest.nodes} ({fewest.strategy})" if fewest.nodes else f"none up to {MAX_NODES}"

    lines = [f"fewest nodes of {plan.cluster.gpus} such GPU{plural} that it fits without offload: {fit(own)}"]
    for other in others if own.nodes != 1 else ():
        here = "these nodes" if plan.cluster.nodes > 1 else "this node"
        fits = f"fits {here} ({other.here})" if other.here else f"does not fit {here} either"
        if own.here:
            fits = "is not needed here"
        lines.append(f"8-bit Adam (training.optim={other.optimizer}) {fits}; its fewest nodes: {fit(other)}")
    return lines


def _table(memories: list[Memory], fits: list[bool]) -> list[str]:
    """Return GiB by part, a column for each strategy; in 48 columns, which fit a narrow terminal."""
    names = [memory.strategy.replace("ZeRO-3 offload", "offload") for memory in memories]
    rows: list[tuple[str, list[str]]] = [("", names)]
    for label, part in _PARTS.items():
        rows.append((label, [f"{getattr(memory, part) / GIB:,.1f}" for memory in memories]))
    rows.append(("fits", ["yes" if fit else "no" for fit in fits]))
    return [f"{label:<8}" + "".join(f"{cell:>8}" for cell in cells) for label, cells in rows]


def _command(launch: str) -> list[str]:
    """Return a command in lines that a shell reads as one."""
    lines = wrap(launch, _COMMAND_WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"  {'  ' if number else ''}{line}" for number, line in enumerate(" \\\n".join(lines).split("\n"))]


def _format_hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
