"""Fields of the installed TRL's SFTConfig, the keys of section `training`, read from source without importing TRL.

Importing SFTConfig imports torch and takes many seconds, and a misspelt key should be reported at once. The tests
compare the parsed fields with the real class.
"""

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model

from train.errors import UserError
from train.storage.local_paths import LocalPath

_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
"""SFTConfig and its bases, base first: the order in which dataclasses collects the fields."""

_BUILT_IN: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "list": list}

TOKEN_LOSSES = ("nll", "dft", "chunked_nll")
"""Values of `loss_type` that need only the probability of each label, which we compute; chunked_nll is TRL's older name
of nll."""

OWNED: dict[str, str] = {
    "max_length": "write `data.max_length`",
    "truncation_mode": "write `data.overlong`",
    "packing": "write `data.packing`",
    "packing_strategy": "`data.packing` turns packing on or off; it is best-fit over all rows and truncates none",
    "padding_free": "it follows from `data.packing` and the attention kernel",
    "eval_packing": "`data.packing` applies to validation too",
    "assistant_only_loss": "`chat.train_on` says which tokens are trained",
    "completion_only_loss": "`chat.train_on` says which tokens are trained",
    "chat_template_path": "write `chat.template`",
    "eos_token": "the end token follows from the template, `chat.template`",
    "pad_token": "the tokenizer's own is used: remove it",
    "dataset_text_field": "write `data.sources.0.format`",
    "dataset_kwargs": "rows are not prepared by TRL: see section `data`",
    "dataset_num_proc": "rows are not prepared by TRL (`data.processes` sets processes): remove it",
    "shuffle_dataset": "`seed` and `training.train_sampling_strategy` set the order of rows: remove it",
    "model_init_kwargs": "write the sections `model` and `quantization`",
    "trust_remote_code": "write `model.trust_remote_code`",
    "output_dir": "write `output_dir` at the top level",
    "seed": "write `seed` at the top level",
    "data_seed": "`seed` at the top level sets the order of the data too",
    "report_to": "write `tracking.wandb` or `tracking.tensorboard`",
    "run_name": "write `tracking.wandb.name`",
    "project": "write `tracking.wandb.project`",
    "trackio_space_id": "the trackers are `tracking.wandb` and `tracking.tensorboard`",
    "trackio_bucket_id": "the trackers are `tracking.wandb` and `tracking.tensorboard`",
    "trackio_static_space_id": "the trackers are `tracking.wandb` and `tracking.tensorboard`",
    "hub_token": "a recipe holds no secrets: set HF_TOKEN in the environment",
    "resume_from_checkpoint": "give `--resume DIR` on the command line",
    "do_train": "train/sft.py always trains: remove it",
    "do_eval": "write `training.eval_strategy`",
    "do_predict": "it is not used by this trainer: remove it",
    "disable_tqdm": "the progress bars are not TRL's, and are shown only in a terminal: remove it",
    "include_num_input_tokens_seen": "`num_tokens` in metrics.jsonl counts them: remove it",
    "local_rank": "the launcher sets it: remove it",
    "label_names": "labels are always called `labels`: remove it",
    "parallelism_config": "write `model.sequence_parallel` to divide sequences between GPUs",
}
"""Fields of SFTConfig that are set by another key of the recipe or the command line, with what to do instead."""

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
"""Bounds of common fields, which SFTConfig's annotations don't express."""


CONFIG_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
"""Fields that take a section or the path of a JSON file."""


@dataclass(frozen=True)
class TrainingField:
    """A field of SFTConfig: type (Any where the annotation can't be resolved), literal default and help text."""

    type: Any
    default: Any
    help: str


@cache
def training_fields() -> dict[str, TrainingField]:
    """Return all fields of the installed SFTConfig by name, OWNED ones included, in the order of the dataclass.

    Raises UserError where TRL or transformers is not installed or its source has another layout.
    """
    fields: dict[str, TrainingField] = {}
    for package, file, class_name in _CLASSES:
        source = _source(package, file)
        definition = _class_in(source, class_name)
        if definition is None:
            raise UserError(
                f"{source} has no {class_name}. Install the version of {package} that constraints.txt names."
            )
        for statement in definition.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields[statement.target.id] = _as_field(statement, source)
    return fields


def with_defaults(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each field of SFTConfig: of `training`, else TRL's default (None where TRL computes it)."""
    return {name: field.default for name, field in training_fields().items()} | dict(training)


@cache
def training_model() -> type[BaseModel]:
    """Return the strict model of section `training`: all `training_fields` except OWNED ones."""
    columns: dict[str, Any] = {}
    for name, field in training_fields().items():
        if name not in OWNED:
            bounds = _RANGES.get(name, {})
            kind = Annotated[field.type, LocalPath()] if name in CONFIG_FILES else field.type
            columns[name] = (kind, Field(default=field.default, description=field.help, **bounds))
    config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    return create_model("TrainingSection", __config__=config, **columns)


def _source(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
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
    """Return the definition of class `name` in `path`, or in the sibling module that `path` imports it from."""
    for statement in _parsed(path).body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement
        if isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module:
            sibling = path.with_name(statement.module + ".py")
            if any(alias.name == name for alias in statement.names) and sibling.is_file():
                return _class_in(sibling, name)
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
    if "const" in metadata and bool not in get_args(kind):  # the value of the bare flag on TRL's command line
        kind = Union[kind, Literal[metadata["const"]]]  # noqa: UP007 (built at run time)
    default = _literal(settings["default"]) if "default" in settings else None
    return TrainingField(kind, default, metadata.get("help", "").replace("%%", "%"))


def _literal(expression: ast.expr) -> Any:
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return None


def _as_type(annotation: ast.expr, source: Path, choices: list[str] | None = None) -> Any:
    """Return the type of `annotation`; Any if unknown. `choices` narrow `str`; an enum becomes its values."""
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
