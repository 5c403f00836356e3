"""Named groups of lm-evaluation-harness's tasks: the benchmarks of the papers."""

from collections.abc import Iterable

from train.errors import UserError

SYSGEN = {
    "MMLU": "mmlu",
    "MMLU-Pro": "mmlu_pro",
    "ARC-c": "arc_challenge",
    "GPQA": "gpqa_main_zeroshot",
    "HellaSwag": "hellaswag",
    "IFEval": "ifeval",
    "MathQA": "mathqa",
    "BBH": "bbh",
}
"""SYSGEN's unseen benchmarks -> the harness's tasks.

The paper names neither its tasks (GPQA's and BBH's come in several variants) nor its few-shot counts: these are the
harness's own names, with the counts that it defines for them."""

JANUS = {"Winogender": "winogender_all", "CrowS-Pairs": "crows_pairs_english", "BBQ": "bbq"}
"""Safety and bias sets of JANUS (arXiv:2405.17977) -> the harness's tasks, each over all of its categories.

The paper's fourth set, RealToxicityPrompts, is in UNAVAILABLE."""

GROUPS = {"sysgen": SYSGEN, "janus": JANUS}

UNAVAILABLE = {
    "realtoxicityprompts": "Perspective API has to score its answers: a remote service that ends on 31 December 2026. "
    "The task would count every answer without a score as not toxic.",
}
"""Tasks of the harness that are never run -> the reason.

realtoxicityprompts/metric.py of lm-eval 0.4.13 appends 0 for a failed request, and 0 is the best score. The end of
Perspective API: arXiv:2604.25580."""


def task_names(given: Iterable[str]) -> list[str]:
    """Return the harness's names of the given tasks, each once; the name of a group stands for its tasks.

    Raises UserError for a task in UNAVAILABLE.
    """
    names = dict.fromkeys(name for item in given for name in GROUPS.get(item, {item: item}).values())
    for name in names:
        if name in UNAVAILABLE:
            raise UserError(
                f"--tasks {name}: not available: {UNAVAILABLE[name]} A task of your own that scores the answers needs "
                "another name and --include-path."
            )
    return list(names)


def left_out(given: Iterable[str]) -> dict[str, str]:
    """Return the sets of the given groups that are not measured, each with the reason."""
    return UNAVAILABLE if "janus" in given else {}
