"""What a recipe's `training` takes: the fields of the installed TRL's SFTConfig, checked without importing TRL.

Apart from recipe.py because it reads other packages' source. Importing SFTConfig takes torch and many seconds, and a
misspelt key should be known at once; so the source is parsed instead, and the tests hold it against the real class.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model

from train.errors import UserError
from train.local_paths import LocalPath

_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
"""SFTConfig and its bases, base first: the order in which dataclasses collects fields."""

_BUILT_IN: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "list": list}

OWNED: dict[str, str] = {
    "max_length": "write `data.max_length`",
    "truncation_mode": "`data.overlong` says what becomes of rows that are too long",
    "packing": "write `data.packing`",
    "packing_strategy": "`data.packing` turns packing on or off; it is best-fit over all rows and cuts none",
    "padding_free": "it follows from `data.packing`",
    "eval_packing": "`data.packing` holds for validation too",
    "assistant_only_loss": "`chat.train_on` says which tokens are trained",
    "completion_only_loss": "`chat.train_on` says which tokens are trained",
    "chat_template_path": "write `chat.template`",
    "eos_token": "the end token follows from the template, `chat.template`",
    "pad_token": "it is the tokenizer's own",
    "dataset_text_field": "`data.sources.0.format` says how rows are read",
    "dataset_kwargs": "rows are prepared here and not by TRL: see the section `data`",
    "dataset_num_proc": "rows are prepared here and not by TRL: leave it out",
    "shuffle_dataset": "rows are drawn in an order set by `seed` (or `training.train_sampling_strategy`): leave it out",
    "model_init_kwargs": "the section `model` says how weights are loaded, `quantization` in which form",
    "trust_remote_code": "write `model.trust_remote_code`",
    "output_dir": "write `output_dir` at the top level",
    "seed": "write `seed` at the top level",
    "data_seed": "`seed` at the top level orders the data too",
    "report_to": "write `tracking.wandb` or `tracking.tensorboard`",
    "run_name": "write `tracking.wandb.name`",
    "project": "write `tracking.wandb.project`",
    "trackio_space_id": "the trackers are `tracking.wandb` and `tracking.tensorboard`",
    "trackio_bucket_id": "the trackers are `tracking.wandb` and `tracking.tensorboard`",
    "trackio_static_space_id": "the trackers are `tracking.wandb` and `tracking.tensorboard`",
    "hub_token": "a recipe holds no secrets: set HF_TOKEN in the environment",
    "resume_from_checkpoint": "give `--resume DIR` on the command line",
    "do_train": "train/sft.py always trains: leave it out",
    "do_eval": "write `training.eval_strategy`",
    "do_predict": "it is not used by this trainer: leave it out",
    "disable_tqdm": "the progress bars are not TRL's, and keep quiet where output is no terminal: leave it out",
    "include_num_input_tokens_seen": "`num_tokens` in metrics.jsonl counts them: leave it out",
    "local_rank": "the launcher sets it: leave it out",
    "label_names": "the rows' labels are made here and have one name: leave it out",
    "parallelism_config": "it belongs into the accelerate configuration that the run is launched with",
}
"""Fields of SFTConfig that another key of the recipe, or the command line, decides; and which."""

_POSITIVE: dict[str, Any] = {"gt": 0}
_NOT_NEGATIVE: dict[str, Any] = {"ge": 0}
_AT_LEAST_ONE: dict[str, Any] = {"ge": 1}
_RANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "learning_rate",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "eval_delay",
            "dataloader_num_workers",
            "neftune_noise_alpha",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "adam_epsilon"), _POSITIVE),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "torch_empty_cache_steps",
            "save_total_limit",
            "dataloader_prefetch_factor",
            "ddp_timeout",
        ),
        _AT_LEAST_ONE,
    ),
    "max_steps": {"ge": -1},
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "label_smoothing_factor": {"ge": 0, "le": 1},
}
"""What SFTConfig's annotations leave unsaid about the fields that are set most."""


CONFIG_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
"""Fields that take the path of a JSON file in place of a section."""


@dataclass(frozen=True)
class TrainingField:
    """One field of SFTConfig: its type (Any where its annotation isn't understood), literal default and help text."""

    type: Any
    default: Any
    help: str


@cache
def training_fields() -> dict[str, TrainingField]:
    """All fields of the installed SFTConfig by name, those that we own among them, in the order of its dataclass.

    Raises UserError where TRL or transformers is not installed or its source is not where it was.
    """
    fields: dict[str, TrainingField] = {}
    for package, file, class_name in _CLASSES:
        source = _source(package, file)
        definition = _class_in(source, class_name)
        if definition is None:
            raise UserError(f"{source} holds no {class_name}. Install the {package} that constraints.txt names.")
        for statement in definition.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields[statement.target.id] = _as_field(statement, source)
    return fields


def with_defaults(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return all fields of SFTConfig: as `training` has them, else TRL's defaults (None where it works one out)."""
    return {name: known.default for name, known in training_fields().items()} | dict(training)


@cache
def training_model() -> type[BaseModel]:
    """Strict model of the section `training`: what `training_fields` has and the recipe does not own."""
    columns: dict[str, Any] = {}
    for name, field in training_fields().items():
        if name not in OWNED:
            bounds = _RANGES.get(name, {})
            kind = Annotated[field.type, LocalPath()] if name in CONFIG_FILES else field.type
            columns[name] = (kind, Field(default=field.default, description=field.help, **bounds))
    config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    return create_model("TrainingSection", __config__=config, **columns)


def _source(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is not installed. Install it with `pip install {package}`.")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UserError(f"{path} does not exist. Install the version of {package} that constraints.txt names.")
    return path


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _class_in(path: Path, name: str) -> ast.ClassDef | None:
    """The class `name` as defined in `path`, or in the module beside it that `path` imports it from."""
    for statement in _parsed(path).body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement
        if isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module:
            beside = path.with_name(statement.module + ".py")
            if any(alias.name == name for alias in statement.names) and beside.is_file():
                return _class_in(beside, name)
    return None


def _as_field(statement: ast.AnnAssign, source: Path) -> TrainingField:
    settings: dict[str, ast.expr] = {}
    if isinstance(statement.value, ast.Call):
        settings = {keyword.arg: keyword.value for keyword in statement.value.keywords if keyword.arg}
    metadata: dict[str, Any] = {}
    if isinstance(declared := settings.get("metadata"), ast.Dict):
        for key, value in zip(declared.keys, declared.values, strict=True):
            if isinstance(key, ast.Constant) and (literal := _literal(value)) is not None:
                metadata[str(key.value)] = literal
    kind = _as_type(statement.annotation, source, metadata.get("choices"))
    if "const" in metadata and bool not in get_args(kind):  # what the bare flag stands for on TRL's command line
        kind = Union[kind, Literal[metadata["const"]]]  # noqa: UP007 (built at run time)
    default = _literal(settings["default"]) if "default" in settings else None
    return TrainingField(kind, default, metadata.get("help", "").replace("%%", "%"))


def _literal(expression: ast.expr) -> Any:
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return None


def _as_type(annotation: ast.expr, source: Path, choices: list[str] | None = None) -> Any:
    """The type that `annotation` writes. `choices` narrow `str`, an enum narrows it to its values; Any if unknown."""
    match annotation:
        case ast.Constant(value=None):
            return None
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            parts = [_as_type(part, source, choices) for part in (left, right)]
            if Any in parts:
                return Any
            if any(isinstance(part, ast.Name) and _enum_values(part.id, source) for part in (left, right)):
                parts = [part for part in parts if part is not str]
            return Union[tuple(parts)]  # noqa: UP007 (built at run time)
        case ast.Name(id="str") if choices:
            return Literal[tuple(choices)]
        case ast.Name(id=name) if name in _BUILT_IN:
            return _BUILT_IN[name]
        case ast.Name(id=name) if values := _enum_values(name, source):
            return Literal[values]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=value):
            return Literal[ast.literal_eval(value)]
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_as_type(item, source)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[ast.Name(id="str"), value])):
            return dict[str, _as_type(value, source)]  # type: ignore[misc]
    return Any


def _enum_values(name: str, source: Path) -> tuple[str, ...]:
    definition = None if name in _BUILT_IN else _class_in(source, name)
    bases = [base.id for base in definition.bases if isinstance(base, ast.Name)] if definition else []
    if definition is None or not any(base.endswith("Enum") for base in bases):
        return ()
    values = [_literal(statement.value) for statement in definition.body if isinstance(statement, ast.Assign)]
    return tuple(value for value in values if isinstance(value, str))


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
