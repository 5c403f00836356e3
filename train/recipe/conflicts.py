"""TODO: train.recipe.schema.conflicts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from train.recipe.sft_config import CONFIG_FILES, training_fields
from train.recipe.yaml_document import (
    Document,
    closest,
    described,
    did_you_mean,
    near_files,
)

_MEASURED = (
    *("loss", "entropy", "mean_token_accuracy"),
    *("system_gain", "system_accuracy", "system_gain_over_none", "system_accuracy_over_none"),
)
"""What TRL, and then we, measure in an evaluation, but for times and counts."""


class Clash(NamedTuple):
    """A key of `training` that can't stand beside the others, and what to write instead."""

    key: str
    message: str


def clashes(training: Mapping[str, Any], *, has_validation: bool) -> Iterator[Clash]:
    """What in `training` contradicts itself, as far as that is certain. Wrong types are told elsewhere, not here."""
    evaluates = training.get("eval_strategy") in ("steps", "epoch")
    for kept, other in ("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval"):
        if training.get(kept) is True and training.get(other) is True:
            yield Clash(other, f"`training.{kept}` and `training.{other}` are both true. Keep one of them.")
    if _is_above_zero(training.get("max_steps")) and "num_train_epochs" in training:
        yield Clash("max_steps", "given together with `training.num_train_epochs`. Keep the one that ends the run.")
    if training.get("max_steps") == 0 and training["max_steps"] is not False:
        yield Clash("max_steps", "found 0, so no step would be made. Write a number above 0, or -1 to count epochs.")
    for name, asked in ("eval_strategy", evaluates), ("eval_on_start", training.get("eval_on_start") is True):
        if asked and not has_validation:
            remedy = "Add `data.validation` (a share such as 0.01, or sources), or take this key out."
            yield Clash(name, f"there is nothing to evaluate on. {remedy}")
    for suffix in "", "_kwargs":
        old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
        both = training.get(old) is not None and training.get(new) is not None
        if both and training[old] != training[new]:
            yield Clash(old, f"another name of `training.{new}`, which has another value. Keep one of them.")
    if training.get("dataloader_prefetch_factor") is not None and not training.get("dataloader_num_workers"):
        yield Clash("dataloader_prefetch_factor", "needs `training.dataloader_num_workers` above 0.")
    metric = training.get("metric_for_best_model")
    if isinstance(metric, str) and metric.removeprefix("eval_") not in _MEASURED:
        measured = ", ".join(f"eval_{name}" for name in _MEASURED)
        yield Clash("metric_for_best_model", f"found {metric!r}. Allowed: {measured}.")
    yield from _worst_as_best(training)
    config = training.get("accelerator_config")
    if isinstance(config, dict) and config.get("split_batches"):
        why = "a batch is of one process here, as training.per_device_train_batch_size says"
        yield Clash("accelerator_config", f"split_batches is true, but {why}. Take split_batches out.")
    for name in "logging_steps", "save_steps", "eval_steps", "warmup_steps":
        steps = training.get(name)
        if isinstance(steps, float) and steps > 1 and not steps.is_integer():
            yield Clash(name, f"found {steps}. Write a whole number of steps, or a share of the run below 1.")
    yield from _saving_clashes(training) if evaluates else _needs_evaluation(training)


def chosen_by_gain(metric: Any) -> bool:
    """Whether a `metric_for_best_model` is one of system gain's."""
    return isinstance(metric, str) and metric.removeprefix("eval_").startswith("system_")


def _worst_as_best(training: Mapping[str, Any]) -> Iterator[Clash]:
    """`greater_is_better` against its metric: the run would keep its worst checkpoint as the best, without a word.

    Of the entropy neither is better by itself.
    """
    greater = training.get("greater_is_better")
    metric = training.get("metric_for_best_model", "loss" if training.get("load_best_model_at_end") is True else None)
    if not isinstance(greater, bool) or not isinstance(metric, str):
        return
    should_be = chosen_by_gain(metric) or metric.endswith("mean_token_accuracy")
    if greater != should_be and (should_be or metric.endswith("loss")):
        wanted, kept = ("greater", "smallest") if should_be else ("smaller", "greatest")
        yield Clash(
            "greater_is_better",
            f"found {str(greater).lower()}, but of {metric} the {wanted} is better: the checkpoint with the {kept} "
            "would be kept as the best. Take this key out: the metric's name tells.",
        )


def _needs_evaluation(training: Mapping[str, Any]) -> Iterator[Clash]:
    remedy = "Add `training.eval_strategy: steps` (or epoch)."
    for name, value in ("load_best_model_at_end", True), ("save_strategy", "best"):
        if training.get(name) == value:
            yield Clash(name, f"which model is best is known only by evaluating. {remedy}")
    if (schedule := training.get("lr_scheduler_type")) in ("reduce_lr_on_plateau", "greedy"):
        yield Clash("lr_scheduler_type", f"{schedule} follows the evaluation loss. {remedy}")


def _saving_clashes(training: Mapping[str, Any]) -> Iterator[Clash]:
    """What transformers asks of saving where it shall know the best checkpoint."""
    key, loads_best = "load_best_model_at_end", training.get("load_best_model_at_end") is True
    eval_strategy, save_strategy = training["eval_strategy"], training.get("save_strategy", "steps")
    if save_strategy == "best":
        if not loads_best and training.get("metric_for_best_model") is None:
            yield Clash("save_strategy", "best by what? Add `training.metric_for_best_model: eval_loss`.")
    elif loads_best and eval_strategy != save_strategy:
        found = f"`training.eval_strategy` is {eval_strategy}, `training.save_strategy` {save_strategy}"
        yield Clash(key, f"needs a saved model for each evaluation, but {found}. Give both the same value.")
    elif loads_best and eval_strategy == "steps":
        defaults = {name: training_fields()[name].default for name in ("save_steps", "logging_steps")}
        save_steps = training.get("save_steps", defaults["save_steps"])
        eval_steps = training.get("eval_steps") or training.get("logging_steps", defaults["logging_steps"])
        if not (_is_above_zero(save_steps) and _is_above_zero(eval_steps)):
            return
        mixed = (save_steps < 1) != (eval_steps < 1)  # below 1 they are shares of the run
        if mixed or round(save_steps * 1_000_000) % round(eval_steps * 1_000_000):
            found = f"`training.save_steps` ({save_steps}) is no multiple of `training.eval_steps` ({eval_steps})"
            yield Clash(key, f"each saved model must have been evaluated, but {found}. Make it one.")


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _let_override_decide_duration(document: Document) -> None:
    """`training.max_steps=5` on a recipe with epochs means five steps, not a contradiction; and the reverse."""
    training = document.section("training")
    names = ("max_steps", "num_train_epochs")
    given = {name: document.places.get(("training", name)) for name in names if name in training}
    overridden = [name for name, place in given.items() if place and place.words.startswith("override")]
    if len(given) == 2 and len(overridden) == 1 and training[overridden[0]] != -1:
        del training[names[1 - names.index(overridden[0])]]


def _clashes_between_sections(document: Document) -> None:
    if document.tree.get("quantization") is not None and document.tree.get("adapter") is None:
        remedy = "Add `adapter: {r: 16}` (LoRA on top of them), or take `quantization` out"
        document.fault(("quantization",), f"weights in 4 bits can't be trained themselves. {remedy}.")
    if document.section("model").get("float8") is not None:
        _clashes_with_float8(document)
    targets = document.section("adapter").get("target_modules")
    for index, name in enumerate(targets if isinstance(targets, list) else ()):
        if isinstance(name, str) and name.split(".")[-1] == "lm_head":
            why = "TRL's fused loss reads the output layer's own weights, so an adapter on it would never be trained"
            document.fault(("adapter", "target_modules", index), f"{why}. Take lm_head out.")


def _clashes_with_float8(document: Document) -> None:
    key, training = ("model", "float8"), document.section("training")
    if document.tree.get("quantization") is not None:
        document.fault(key, "weights in 4 bits have kernels of their own. Write null, or take `quantization` out.")
    if document.section("adapter").get("use_dora"):
        why = "DoRA multiplies by the weights beside the layer too, where no float8 is"
        document.fault(key, f"{why}. Write null, or `adapter.use_dora: false`.")
    # float16's loss scaling and float32's exactness are both lost on 3 bits of mantissa; torchao tests bfloat16
    weights = document.section("model").get("dtype", "bfloat16")
    if training.get("fp16") or (training.get("bf16") is False and weights in ("float16", "float32")):
        document.fault(key, "it takes the place of bfloat16. Write `training.bf16: true`, or null here.")


def _missing_files(document: Document) -> None:
    template = document.section("chat").get("template")
    named = sorted(path.stem for path in (Path(__file__).parents[1] / "data" / "templates").glob("*.jinja"))
    if isinstance(template, str) and template and template not in named:
        allowed = f"{', '.join(named)}, the path of a .jinja file, or null for the tokenizer's own"
        if not template.endswith(".jinja"):
            # a name that is like none of ours may be that of a template of the tokenizer: `use_template` knows
            meant = closest(template, named, 0.7)
            if meant or not template.isidentifier():
                document.fault(
                    ("chat", "template"), f"found {described(template)}. Allowed: {allowed}.{did_you_mean(meant)}"
                )
        elif not Path(template).is_file():
            where = "" if Path(template).is_absolute() else f" in {Path.cwd()}"
            message = f"there is no file {template}{where}. Allowed: {allowed}.{near_files(template)}"
            document.fault(("chat", "template"), message)
    for key in CONFIG_FILES:
        file = document.section("training").get(key)
        if not isinstance(file, str) or file.startswith("{") or not (file.endswith(".json") or "/" in file):
            continue  # a section, JSON, or what else transformers reads
        if not Path(file).is_file():
            where = "" if Path(file).is_absolute() else f" in {Path.cwd()}"
            document.fault(("training", key), f"there is no file {file}{where}.{near_files(file)}")
        elif error := _json_error(Path(file)):
            document.fault(("training", key), f"{file} {error}")


def _json_error(file: Path) -> str | None:
    try:
        settings = json.loads(file.read_bytes())
    except OSError as error:
        return f"can't be read: {error.strerror}."
    except ValueError as error:
        return f"is no JSON: {error}."
    return None if isinstance(settings, dict) else "must hold a JSON object: {...}."
