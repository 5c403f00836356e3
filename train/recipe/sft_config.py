"""What a recipe's `training` takes: the fields of the installed TRL's SFTConfig, checked without importing TRL.

Apart from recipe.py because it reads other packages' source. Importing SFTConfig takes torch and many seconds, and a
misspelt key should be known at once; so the source is parsed instead, and the tests hold it against the real class.
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
