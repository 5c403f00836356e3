"""Conflicts between keys of a recipe: values that are valid each by itself and can't be used together."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from train.formatting import format_count
from train.recipe.lr_schedules import FOLLOWS_EVALUATION
from train.recipe.measurements import GAIN_METRICS, SAMPLE_METRICS, TurnsSamples, is_gain_metric, measured_by
from train.recipe.preference import PREFERENCE_METRICS, REWARD_METRICS, check_preference
from train.recipe.sft_config import CONFIG_FILES, TOKEN_LOSSES, with_defaults
from train.recipe.yaml_document import Document, closest_match, describe_value, did_you_mean, suggest_files

_METRICS = ("loss", "entropy", "mean_token_accuracy", *GAIN_METRICS, *SAMPLE_METRICS.values())
"""Metrics of an evaluation, TRL's and then our own; times and counts left out."""
_GENERATED = (*SAMPLE_METRICS, "prompts")
"""Keys of `evaluation` that name what is generated."""
_TEMPLATES = Path(__file__).parents[1] / "data" / "templates"


class Conflict(NamedTuple):
    """A key of `training` that conflicts with other keys, and what to write instead."""

    key: str
    message: str


def training_conflicts(
    training: Mapping[str, Any], *, has_validation: bool, preference: str | None = None
) -> Iterator[Conflict]:
    """Yield the conflicts inside `training` that are certain. Values of the wrong type are not reported here.

    `preference`: the loss of preference training; None = there is none.
    """
    evaluates = training.get("eval_strategy") in ("steps", "epoch")
    for first, second in ("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval"):
        if training.get(first) is True and training.get(second) is True:
            yield Conflict(second, f"`training.{first}` and `training.{second}` are both true. Keep one of them.")
    if _is_positive(training.get("max_steps")) and "num_train_epochs" in training:
        yield Conflict("max_steps", "given together with `training.num_train_epochs`. Keep one of them.")
    if training.get("max_steps") == 0 and training["max_steps"] is not False:
        yield Conflict("max_steps", "found 0, which trains nothing. Write a number >= 1, or -1 to count epochs.")
    for name, needs_rows in ("eval_strategy", evaluates), ("eval_on_start", training.get("eval_on_start") is True):
        if needs_rows and not has_validation:
            remedy = "Add `data.validation` (a share such as 0.01, or sources), or remove this key."
            yield Conflict(name, f"there is nothing to evaluate on. {remedy}")
    for suffix in "", "_kwargs":
        old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
        both = training.get(old) is not None and training.get(new) is not None
        if both and training[old] != training[new]:
            yield Conflict(old, f"another name of `training.{new}`, which has another value. Keep one of them.")
    if training.get("dataloader_prefetch_factor") is not None and not training.get("dataloader_num_workers"):
        yield Conflict("dataloader_prefetch_factor", "needs `training.dataloader_num_workers` above 0.")
    if training.get("liger_kernel_config") and not training.get("use_liger_kernel"):
        yield Conflict("liger_kernel_config", "has no effect without `training.use_liger_kernel: true`. Add it.")
    metric = training.get("metric_for_best_model")
    metrics = (*_METRICS, *(PREFERENCE_METRICS if preference else ()))
    if preference == "reward":
        metrics = ("loss", *REWARD_METRICS)
    if isinstance(metric, str) and metric.removeprefix("eval_") not in metrics:
        allowed = ", ".join(f"eval_{name}" for name in metrics)
        yield Conflict("metric_for_best_model", f"found {metric!r}. Allowed: {allowed}.")
    yield from _wrong_direction(training)
    config = training.get("accelerator_config")
    if isinstance(config, dict) and config.get("split_batches"):
        reason = "training.per_device_train_batch_size is the batch of one process"
        yield Conflict("accelerator_config", f"split_batches is true, but {reason}. Remove split_batches.")
    if isinstance(config, dict) and config.get("dispatch_batches"):
        reason = "each process reads its own batches"
        yield Conflict("accelerator_config", f"dispatch_batches is true, but {reason}. Remove dispatch_batches.")
    for name in "logging_steps", "save_steps", "eval_steps", "warmup_steps":
        steps = training.get(name)
        if isinstance(steps, float) and steps > 1 and not steps.is_integer():
            yield Conflict(name, f"found {steps}. Write an integer number of steps, or a share of the run below 1.")
    yield from _saving_conflicts(training) if evaluates else _evaluation_required(training)


def key_of_other_loss(training: Mapping[str, Any]) -> str | None:
    """Return the key that makes the loss another one than `TOKEN_LOSSES`, which TRL computes; None if none does."""
    if training.get("label_smoothing_factor"):
        return "training.label_smoothing_factor"
    return None if training.get("loss_type", "nll") in TOKEN_LOSSES else "training.loss_type"


def _wrong_direction(training: Mapping[str, Any]) -> Iterator[Conflict]:
    """Yield a conflict where `greater_is_better` would keep the worst checkpoint as the best.

    Entropy has no better direction.
    """
    greater = training.get("greater_is_better")
    metric = training.get("metric_for_best_model", "loss" if training.get("load_best_model_at_end") is True else None)
    if not isinstance(greater, bool) or not isinstance(metric, str):
        return
    should_be = metric.removeprefix("eval_") in (*PREFERENCE_METRICS, *REWARD_METRICS, "mean_token_accuracy")
    should_be = should_be or is_gain_metric(metric) or bool(measured_by(metric))
    if greater != should_be and (should_be or metric.endswith("loss")):
        better, selected = ("greater", "smallest") if should_be else ("smaller", "greatest")
        yield Conflict(
            "greater_is_better",
            f"found {str(greater).lower()}, but a {better} {metric} is better: the checkpoint with the {selected} "
            "would be kept as the best. Remove this key: the direction follows from the metric.",
        )


def _evaluation_required(training: Mapping[str, Any]) -> Iterator[Conflict]:
    remedy = "Add `training.eval_strategy: steps` (or epoch)."
    for name, value in ("load_best_model_at_end", True), ("save_strategy", "best"):
        if training.get(name) == value:
            yield Conflict(name, f"the best model can't be selected without evaluation. {remedy}")
    if (scheduler := training.get("lr_scheduler_type")) in FOLLOWS_EVALUATION:
        yield Conflict("lr_scheduler_type", f"{scheduler} follows the evaluation loss. {remedy}")


def _saving_conflicts(training: Mapping[str, Any]) -> Iterator[Conflict]:
    """Yield what keeps transformers from selecting the best checkpoint: each must have been evaluated."""
    key, settings = "load_best_model_at_end", with_defaults(training)
    loads_best = training.get(key) is True
    eval_strategy, save_strategy = settings["eval_strategy"], settings["save_strategy"]
    if save_strategy == "best":
        if not loads_best and training.get("metric_for_best_model") is None:
            yield Conflict("save_strategy", "best needs a metric. Add `training.metric_for_best_model: eval_loss`.")
    elif loads_best and eval_strategy != save_strategy:
        values = f"`training.eval_strategy` is {eval_strategy}, `training.save_strategy` {save_strategy}"
        yield Conflict(key, f"needs a checkpoint for each evaluation, but {values}. Give both the same value.")
    elif loads_best and eval_strategy == "steps":
        save_steps, eval_steps = settings["save_steps"], settings["eval_steps"] or settings["logging_steps"]
        if not (_is_positive(save_steps) and _is_positive(eval_steps)):
            return
        mixed = (save_steps < 1) != (eval_steps < 1)  # below 1 they are shares of the run
        if mixed or round(save_steps * 1_000_000) % round(eval_steps * 1_000_000):
            values = f"`training.save_steps` ({save_steps}) is not a multiple of `training.eval_steps` ({eval_steps})"
            yield Conflict(key, f"each checkpoint must have been evaluated, but {values}. Make it a multiple.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def resolve_duration(document: Document) -> None:
    """Drop the duration of the file where an override gives the other one.

    `training.max_steps=5` on a recipe with `num_train_epochs` means five steps, not a conflict; and the reverse.
    """
    training = document.section("training")
    names = ("max_steps", "num_train_epochs")
    locations = {name: document.locations.get(("training", name)) for name in names if name in training}
    overridden = [name for name, location in locations.items() if location and location.is_override]
    if len(locations) == 2 and len(overridden) == 1 and training[overridden[0]] != -1:
        del training[names[1 - names.index(overridden[0])]]


def check_sections(document: Document) -> None:
    """Add an error to `document` for each conflict between sections."""
    if document.tree.get("quantization") is not None and document.tree.get("adapter") is None:
        remedy = "Add `adapter: {r: 16}` to train LoRA on top of them, or remove `quantization`"
        document.add_error(("quantization",), f"4-bit weights can't be trained. {remedy}.")
    if document.section("model").get("float8") is not None:
        _check_float8(document)
    if document.section("model").get("sequence_parallel") not in (None, 1):
        _check_sequence_parallel(document)
    if document.section("model").get("use_kernels") is True:
        _check_use_kernels(document)
    _check_evaluation(document)
    check_preference(document)
    targets = document.section("adapter").get("target_modules")
    for index, name in enumerate(targets if isinstance(targets, list) else ()):
        if isinstance(name, str) and name.split(".")[-1] == "lm_head":
            reason = (
                "TRL's fused loss reads the weights of the output layer, so an adapter on it would never be trained"
            )
            document.add_error(("adapter", "target_modules", index), f"{reason}. Remove lm_head.")


def _check_evaluation(document: Document) -> None:
    samples, training = document.section("evaluation"), document.section("training")
    if samples and document.section("data").get("validation") is None:
        remedy = "Add `data.validation` (a share such as 0.01, or sources), or remove this section"
        document.add_error(("evaluation",), f"the model is evaluated on validation rows, and has none. {remedy}.")
    elif document.tree.get("evaluation") == samples and all(samples.get(kind) is None for kind in _GENERATED):
        remedy = f"Add {', '.join(_GENERATED[:-1])} or {_GENERATED[-1]}, or write null"
        document.add_error(("evaluation",), f"names nothing to generate. {remedy}.")
    _check_turns(document, samples.get("turns"))
    metric = training.get("metric_for_best_model")
    kind = measured_by(metric)
    if kind and samples.get(kind) is None:
        message = f"{metric} is measured by `evaluation.{kind}`, which is missing. Add it, or write eval_loss."
        document.add_error(("training", "metric_for_best_model"), message)


def _check_turns(document: Document, values: Any) -> None:
    try:
        settings = TurnsSamples.model_validate(values)
    except ValidationError:
        return  # reported with the values of a wrong type, or no section
    if settings.push_back_at and settings.push_back_at > settings.turns:
        last = f"turn {settings.push_back_at} is after the last of {format_count(settings.turns, 'turn')}"
        message = f"{last}. Write a number up to {settings.turns}, or null."
        document.add_error(("evaluation", "turns", "push_back_at"), message)


def _check_float8(document: Document) -> None:
    key, training = ("model", "float8"), document.section("training")
    if document.tree.get("quantization") is not None:
        document.add_error(key, "4-bit weights have their own kernels. Write null, or remove `quantization`.")
    if document.section("adapter").get("use_dora"):
        reason = "DoRA multiplies by the weights outside of the layer, where float8 is not used"
        document.add_error(key, f"{reason}. Write null, or `adapter.use_dora: false`.")
    # 3 bits of mantissa defeat the loss scaling of float16 and the exactness of float32; torchao tests bfloat16.
    weights = document.section("model").get("dtype", "bfloat16")
    if training.get("fp16") or (training.get("bf16") is False and weights in ("float16", "float32")):
        document.add_error(key, "float8 needs bfloat16 around it. Write `training.bf16: true`, or null here.")


def _check_sequence_parallel(document: Document) -> None:
    """Add an error for what needs all tokens of a sequence, or all logits."""
    key = ("model", "sequence_parallel")
    training = document.section("training")
    if training.get("average_tokens_across_devices") is False:
        reason = "the loss of a sequence is divided by its tokens on all processes"
        document.add_error(key, f"{reason}. Remove training.average_tokens_across_devices, or write 1 here.")
    if training.get("neftune_noise_alpha"):
        reason = "the noise of training.neftune_noise_alpha depends on the length of the sequence"
        document.add_error(key, f"{reason}, which no process sees. Remove it, or write 1 here.")
    if loss := key_of_other_loss(training):
        document.add_error(key, f"{loss} needs the logits of all tokens. Remove it, or write 1 here.")


def _check_use_kernels(document: Document) -> None:
    key, training = ("model", "use_kernels"), document.section("training")
    if training.get("use_liger_kernel"):
        document.add_error(key, "`training.use_liger_kernel` replaces the same layers. Keep one of them.")
    if training.get("torch_compile"):
        # hub_kernels.py of transformers 5.23 on RMSNorm: "Not torch.compile friendly"
        reason = "`training.torch_compile` can't trace these kernels, and fuses the layers itself"
        document.add_error(key, f"{reason}. Keep one of them.")


def check_files(document: Document) -> None:
    """Add an error to `document` for each template, file of gains and configuration file that is missing or invalid."""
    template = document.section("chat").get("template")
    names = sorted(path.stem for path in _TEMPLATES.glob("*.jinja"))
    if isinstance(template, str) and template and template not in names:
        allowed = f"{', '.join(names)}, the path of a .jinja file, or null for the tokenizer's own"
        if not template.endswith(".jinja"):
            # Another name may belong to one of the tokenizer's own templates: `use_template` checks that.
            match = closest_match(template, names, 0.7)
            if match or not template.isidentifier():
                message = f"found {describe_value(template)}. Allowed: {allowed}.{did_you_mean(match)}"
                document.add_error(("chat", "template"), message)
        elif not Path(template).is_file():
            document.add_error(("chat", "template"), _no_file(template, f" Allowed: {allowed}."))
    for section in ("sources", "validation"):
        sources = document.section("data").get(section)
        for number, source in enumerate(sources if isinstance(sources, list) else ()):
            gains = source.get("min_gain") if isinstance(source, dict) else None
            if isinstance(gains, str) and gains and not Path(gains).is_file():
                document.add_error(("data", section, number, "min_gain"), _no_file(gains))
    for kind in "rules", "ifeval", "prompts":
        settings = document.section("evaluation").get(kind)
        file = settings.get("path") if isinstance(settings, dict) else None
        if isinstance(file, str) and file and not Path(file).is_file():
            document.add_error(("evaluation", kind, "path"), _no_file(file))
    for key in CONFIG_FILES:
        file = document.section("training").get(key)
        if not isinstance(file, str) or file.startswith("{") or not (file.endswith(".json") or "/" in file):
            continue  # a section, JSON text, or another value that transformers reads
        if not Path(file).is_file():
            document.add_error(("training", key), _no_file(file))
        elif error := _json_error(Path(file)):
            document.add_error(("training", key), f"{file} {error}")


def _no_file(file: str, advice: str = "") -> str:
    if Path(file).is_dir():
        return f"{file} is a folder. Name a file in it."
    folder = "" if Path(file).is_absolute() else f" in {Path.cwd()}"
    return f"there is no file {file}{folder}.{advice}{suggest_files(file)}"


def _json_error(file: Path) -> str | None:
    try:
        settings = json.loads(file.read_bytes())
    except OSError as error:
        return f"can't be read: {error.strerror}."
    except ValueError as error:
        return f"is not valid JSON: {error}."
    return None if isinstance(settings, dict) else "must hold a JSON object: {...}."
