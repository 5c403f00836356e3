"""Sections on what each evaluation measures besides the loss: system gain, and answers that the model generates.

Neither changes a weight, unless `training.metric_for_best_model` is one of its metrics.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from train.recipe.section import PathText, Section

PressureSetting = Literal["reference", "aligned", "conflict", "injected", "extraction", "permitted"]

GAIN_METRICS = ("system_gain", "system_accuracy", "system_gain_over_none", "system_accuracy_over_none")
SAMPLE_METRICS = {
    "rules": "rules_followed",
    "hierarchy": "hierarchy_held",
    "turns": "turns_held",
    "ifeval": "ifeval_followed",
}
"""Key of `evaluation` -> the metric that it measures."""
SECTIONS = ("system_gain.", "evaluation.")
"""Beginnings of the dotted keys of these sections."""


def is_gain_metric(metric: Any) -> bool:
    """Return whether a `metric_for_best_model` is one of system gain's."""
    return isinstance(metric, str) and metric.removeprefix("eval_").startswith("system_")


def measured_by(metric: Any) -> str | None:
    """Return the key of `evaluation` that measures a `metric_for_best_model`; None for other metrics."""
    name = str(metric).removeprefix("eval_")
    return next((kind for kind, measured in SAMPLE_METRICS.items() if measured == name), None)


def is_only_reported(key: str, metric: Any) -> bool:
    """Return whether a dotted key of the recipe decides only what is measured, and not which model is the best.

    `metric`: the `metric_for_best_model`.
    """
    kind = measured_by(metric)
    selects: tuple[str, ...] = (f"evaluation.{kind}", "evaluation.max_new_tokens") if kind else ()
    if is_gain_metric(metric):
        selects = ("system_gain.",)
    return key.startswith(SECTIONS) and not key.startswith(selects)


class SystemGainSection(Section):
    """System gain, how much the model follows system messages, measured at each evaluation
    (train/system_gain/metric.py)."""

    rows: int = Field(default=128, ge=0)
    """Maximum number of validation rows, sampled by `seed`; 0 = off."""
    others: int = Field(default=2, ge=1)
    """Maximum number of other system messages under which each answer is scored; once more without one."""


class RuleSamples(Section):
    """Rows whose system message states a rule that a program checks."""

    path: PathText
    """Rows of {messages, rule, held_out} as jsonl, as `evaluate.py rules` reads them."""
    rows: int = Field(default=32, ge=1)
    """Maximum number of rows, at even distances in the file."""


class HierarchySamples(Section):
    """Built-in conversations in which a user, a document or a tool asks for the same as the system message or for the
    opposite, as `evaluate.py hierarchy` asks them."""

    rows: int = Field(default=8, ge=1)
    """Maximum number of rows of each setting."""
    settings: Annotated[tuple[PressureSetting, ...], Field(strict=False, min_length=1)] = (
        "conflict",
        "injected",
        "extraction",
        "permitted",
    )
    """Settings to ask (train/pressure/tactics.py); the default ones are those that models get wrong."""


class TurnsSamples(Section):
    """Built-in conversations of several user turns under one rule, as `evaluate.py turns` asks them: the model's own
    answers stand before each turn."""

    conversations: int = Field(default=8, ge=1)
    """Number of conversations."""
    turns: int = Field(default=4, ge=1)
    """User turns of a conversation."""
    push_back_at: int | None = Field(default=2, ge=1)
    """Turn in which the user asks to drop the rule, from 1; null = no turn does."""


class IFEvalSamples(Section):
    """Rows of IFEval or S-IFEval, judged by the checkers of lm-evaluation-harness (the package janus-sft[evaluate])."""

    path: PathText
    """Rows of {key, prompt, instruction_id_list, kwargs, messages} as jsonl, as `evaluate.py ifeval` reads them."""
    rows: int = Field(default=32, ge=1)
    """Maximum number of rows, at even distances in the file."""


class PromptSamples(Section):
    """Prompts of your own, whose answers are recorded without a verdict."""

    path: PathText
    """Rows of {messages} as jsonl. A final answer is left out of the prompt."""
    rows: int = Field(default=8, ge=1)
    """Maximum number of rows, at even distances in the file."""


class EvaluationSection(Section):
    """Answers that the model generates at each evaluation, written to output_dir/samples.jsonl, with the share that
    follows the system message as a metric."""

    rules: RuleSamples | None = None
    """Rules that a program checks: eval_rules_followed; null = none."""
    hierarchy: HierarchySamples | None = None
    """Built-in conversations under pressure: eval_hierarchy_held; null = none."""
    turns: TurnsSamples | None = None
    """Built-in conversations of several turns: eval_turns_held, the share of turns; null = none."""
    ifeval: IFEvalSamples | None = None
    """Checkable constraints: eval_ifeval_followed, the share of answers that follow all of theirs; null = none."""
    prompts: PromptSamples | None = None
    """Prompts of your own, without a metric; null = none."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Maximum tokens of an answer. Answers are greedy."""
    batch_size: int = Field(default=16, ge=1)
    """Maximum number of answers that a process generates at a time."""
    shown: int = Field(default=1, ge=0)
    """Answers of each kind that are printed at each evaluation, always of the same rows."""
