"""Validation of a recipe: all errors in one report, each with its line, key, allowed values and a suggestion."""

import json
import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from train.recipe import lr_schedules, optimizer_arguments
from train.recipe.conflicts import check_files, check_sections, resolve_duration, training_conflicts
from train.recipe.preference import resolve_system_gain
from train.recipe.sft_config import OWNED, training_model, with_defaults
from train.recipe.yaml_document import (
    Document,
    KeyPath,
    closest_match,
    compose,
    describe_value,
    did_you_mean,
    dotted_key,
    value_at,
)
from train.storage.local_paths import LocalPath, expand_path

Root = TypeVar("Root", bound=BaseModel)


def validate_recipe(document: Document, root: type[Root]) -> Root:
    """Return the recipe as `root`, the model of all sections. Raises UserError with all errors of `document`."""
    _expand_paths(document, root)
    resolve_duration(document)
    resolve_system_gain(document)
    training = document.section("training")
    recipe = _validate(document, root, root)
    if _validate(document, training_model(), root, ("training",)) is not None:
        _check_lr_scheduler(document)
        for key, message in optimizer_arguments.optimizer_conflicts(with_defaults(training)):
            document.add_error(("training", key), message)
    has_validation = document.section("data").get("validation") is not None
    loss = document.section("preference").get("loss")
    for conflict in training_conflicts(training, has_validation=has_validation, preference=loss):
        document.add_error(("training", conflict.key), conflict.message)
    check_sections(document)
    check_files(document)
    document.raise_errors()
    assert recipe is not None  # else there were errors
    return recipe


def validate_settings(document: Document, root: type[Root]) -> Root:
    """Return the configuration of another command as `root`. Raises UserError with all errors of `document`."""
    _expand_paths(document, root)
    settings = _validate(document, root, root)
    document.raise_errors()
    assert settings is not None  # else there were errors
    return settings


def _validate(document: Document, model: type[Root], root: type[BaseModel], prefix: KeyPath = ()) -> Root | None:
    """Return the values at `prefix` as `model`; None after adding errors to `document`."""
    try:
        return model.model_validate(document.section(str(prefix[0])) if prefix else document.tree)
    except ValidationError as error:
        _add_errors(document, error, prefix, root)
        return None


def _expand_paths(document: Document, root: type[BaseModel]) -> None:
    """Expand `~` and variables in all keys whose type is marked as a path, so that the resolved recipe has none."""
    for path in list(_path_keys(root, document.tree)):
        section, text = value_at(document.tree, path[:-1]), value_at(document.tree, path)
        if path[0] == "training" and text.startswith("{"):
            continue  # JSON text, which transformers parses
        try:
            section[path[-1]] = expand_path(text)
        except ValueError as error:
            document.add_error(path, f"{error}.")


def _path_keys(model: type[BaseModel], values: dict[str, Any], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the paths of keys in `values`, a section of type `model`, that are marked as paths and hold text."""
    for name, field in model.model_fields.items():
        value, key_path = values.get(name), (*prefix, name)
        if isinstance(value, str):
            parts = _parts(field.annotation, tuple(field.metadata))
            if any(isinstance(mark, LocalPath) for _, metadata in parts for mark in metadata):
                yield key_path
            continue
        if isinstance(value, list) and _is_list_of_paths(field.annotation):
            yield from ((*key_path, index) for index, item in enumerate(value) if isinstance(item, str))
            continue
        sections = [(training_model(), False)] if key_path == ("training",) else _models(field.annotation)
        for section, in_list in sections:
            if in_list and isinstance(value, list):
                items = [((*key_path, index), item) for index, item in enumerate(value)]
            else:
                items = [] if in_list else [(key_path, value)]
            for item_path, item in items:
                if isinstance(item, dict):
                    yield from _path_keys(section, item, item_path)


def _is_list_of_paths(annotation: Any) -> bool:
    items = (get_args(kind)[0] for kind, _ in _parts(annotation) if get_origin(kind) is tuple)
    return any(isinstance(mark, LocalPath) for item in items for _, metadata in _parts(item) for mark in metadata)


def _add_errors(document: Document, error: ValidationError, prefix: KeyPath, root: type[BaseModel]) -> None:
    """Add pydantic's errors to `document`, one per key, with the allowed values and a suggestion."""
    kinds: dict[KeyPath, str] = {}
    for details in error.errors(include_url=False, include_context=False):
        path = (*prefix, *(part for part in details["loc"] if part not in ("<list>", "<single>", "<hub>")))
        # Below a field of TRL, `loc` holds only names of union branches.
        kinds.setdefault(path[:2] if prefix else path, details["type"])
    for path, kind in kinds.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in kinds):
            continue  # pydantic also reports a list as empty when its items are invalid
        if kind == "extra_forbidden":
            document.add_error(path, _unknown_key_error(path, root))
        elif kind == "missing":
            document.add_error(path, f"missing. {' '.join((_field_at(path, root)[2] or '').split())}")
        else:
            value = value_at(document.tree, path)
            annotation, bounds, _ = _field_at(path, root)
            suggestion = did_you_mean(_suggest_value(value, annotation, bounds))
            allowed = _describe_type(annotation, bounds)
            document.add_error(path, f"found {describe_value(value)}. Allowed: {allowed}.{suggestion}")


def _check_lr_scheduler(document: Document) -> None:
    """Add an error for each invalid argument of the learning rate scheduler."""
    settings = with_defaults(document.section("training"))
    scheduler, arguments = settings["lr_scheduler_type"], lr_schedules.scheduler_kwargs(settings)
    path: KeyPath = ("training", lr_schedules.KWARGS)
    if not isinstance(arguments, dict):
        document.add_error(path, f"found {describe_value(arguments)}. Write a section such as {{num_cycles: 0.5}}.")
        return
    model, key = lr_schedules.arguments_model(scheduler), f"`training.lr_scheduler_type: {scheduler}`"
    try:
        model.model_validate(arguments)
    except ValidationError as error:
        for name in dict.fromkeys(str(details["loc"][0]) for details in error.errors(include_url=False)):
            if field := model.model_fields.get(name):
                allowed = _describe_type(field.annotation, field.metadata)
                document.add_error((*path, name), f"found {describe_value(arguments[name])}. Allowed: {allowed}.")
            else:
                allowed = ", ".join(model.model_fields) or "none, remove the section"
                suggestion = did_you_mean(closest_match(name, list(model.model_fields), 0.6))
                document.add_error((*path, name), f"{key} has no argument '{name}'. Allowed: {allowed}.{suggestion}")
        return
    for message in lr_schedules.kwargs_conflicts(settings):
        document.add_error(path, message)


def _parts(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the members of a union, each with `metadata` and that of its `Annotated`, flattened."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *own = get_args(annotation)
        flat = [bound for entry in own for bound in (entry, *getattr(entry, "metadata", ()))]
        yield from _parts(inner, (*metadata, *flat))
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _parts(member, metadata)
    else:
        yield annotation, metadata


def _models(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """Yield the section models that a key takes, each with True where it takes a list of them."""
    for kind, _ in _parts(annotation):
        if get_origin(kind) is tuple:
            yield from ((model, True) for model, _ in _models(get_args(kind)[0]))
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind, False


RENAMED = {
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "warmup_ratio": "training.warmup_steps",
    "evaluation_strategy": "training.eval_strategy",
    "group_by_length": "training.train_sampling_strategy",
    "optimizer": "training.optim",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.sources",
    "datasets": "data.sources",
    "val_set_size": "data.validation",
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "chat_template": "chat.template",
    "peft": "adapter",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "wandb_project": "tracking.wandb.project",
}
"""Names of our keys in other trainers and in older versions of our dependencies."""


def _field_at(path: KeyPath, root: type[BaseModel]) -> tuple[Any, Sequence[Any], str | None]:
    """Return the type, bounds and description of the key at `path`."""
    annotation: Any = root
    bounds: Sequence[Any] = ()
    description: str | None = None
    for step in path:
        if isinstance(step, int):
            annotation = next(get_args(kind)[0] for kind, _ in _parts(annotation) if get_origin(kind) is tuple)
            bounds = ()
            continue
        model = next(model for model, _ in _models(annotation))
        field = model.model_fields[step]
        annotation = training_model() if field is root.model_fields.get("training") else field.annotation
        bounds, description = field.metadata, field.description
    return annotation, bounds, description


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a recipe; list items as the first one, `0`."""
    for name, field in model.model_fields.items():
        yield prefix + name
        sections = [(training_model(), False)] if prefix + name == "training" else _models(field.annotation)
        for section, in_list in sections:
            yield from _all_keys(section, f"{prefix}{name}.0." if in_list else f"{prefix}{name}.")


def _unknown_key_error(path: KeyPath, root: type[BaseModel]) -> str:
    """Return the error for an unknown key: what owns it, the most similar key, or the allowed ones."""
    key, parent = str(path[-1]), path[:-1]
    if parent == ("training",) and key in OWNED:
        return f"not set here: {OWNED[key]}."
    keys = list(dict.fromkeys(_all_keys(root)))
    prefix = "".join(f"{0 if isinstance(step, int) else step}." for step in parent)
    siblings = [name.removeprefix(prefix) for name in keys if name.startswith(prefix)]
    siblings = [name for name in siblings if "." not in name]
    lowered = {name.lower(): name for name in siblings}
    leaves = {name.rpartition(".")[2]: name for name in reversed(keys)}  # the first key of a name wins
    plain = key.lower().replace("-", "_")
    suggestion = renamed if (renamed := RENAMED.get(plain)) in keys else None
    if not suggestion and (sibling := closest_match(plain, list(lowered), 0.8)):
        suggestion = dotted_key((*parent, lowered[sibling]))
    suggestion = suggestion or leaves.get(plain)
    if not suggestion and (sibling := closest_match(plain, list(lowered), 0.6)):
        suggestion = dotted_key((*parent, lowered[sibling]))
    suggestion = suggestion or leaves.get(closest_match(plain, list(leaves), 0.75) or "")
    if suggestion:
        return f"unknown key.{did_you_mean(suggestion)}"
    if key in OWNED and "training" in root.model_fields:
        return f"unknown key: {OWNED[key]}."
    if parent == ("training",):
        return "unknown key. Allowed: the fields of TRL's SFTConfig."
    return f"unknown key. Allowed: {', '.join(siblings)}."


def _describe_type(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """Return a description of the allowed values, such as `an integer >= 1; or null`."""
    descriptions = []
    for kind, metadata in _parts(annotation, tuple(bounds)):
        origin = get_origin(kind)
        if origin is Literal:
            choices = get_args(kind)
            text = ", ".join(json.dumps(choice) if isinstance(choice, bool) else str(choice) for choice in choices)
        elif origin in (list, tuple):
            non_empty = any(getattr(bound, "min_length", 0) for bound in metadata)
            text = f"a list {'of at least one ' if non_empty else ''}({_describe_type(get_args(kind)[0])})"
        elif kind in (int, float):
            text = f"{'an integer' if kind is int else 'a number'} {' and '.join(_limits(metadata))}".strip()
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            keys = list(kind.model_fields)
            text = "a section" if len(keys) > 20 else f"a section with the keys {', '.join(keys)}"
        else:
            examples = [repr(example) for bound in metadata for example in getattr(bound, "examples", None) or ()]
            text = f"text such as {' or '.join(examples)}" if examples else "text"
            names = {str: text, bool: "true or false", type(None): "null", dict: "a section"}
            text = names.get(origin or kind, "a value")
        descriptions.append(text)
    return "; or ".join(dict.fromkeys(descriptions))


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    for bound in metadata:
        for name, symbol in ("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="):
            if getattr(bound, name, None) is not None:
                yield f"{symbol} {getattr(bound, name)}"


def _suggest_value(value: Any, annotation: Any, bounds: Sequence[Any]) -> str | None:
    """Return what the user probably meant by a value of the wrong type; no path for a number."""
    parts = list(_parts(annotation, tuple(bounds)))
    kinds = [kind for kind, _ in parts]
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if value is False and "no" in choices:
        return "no"
    if isinstance(value, int | float) and str in kinds and not isinstance(value, bool):
        is_path = any(isinstance(mark, LocalPath) for _, metadata in parts for mark in metadata)
        return None if is_path else f'"{value}"'
    if not isinstance(value, str):
        return None
    if bool in kinds and value.lower() in ("yes", "on", "no", "off", "true", "false"):
        return "true" if value.lower() in ("yes", "on", "true") else "false"
    if int in kinds or float in kinds:
        node = compose(re.sub(r"(?<=\d)[_,](?=\d)", "", value)) if re.fullmatch(r"[-+.\deE_,]{1,30}", value) else None
        if node is not None and node.tag.endswith((":int", ":float")):
            return str(node.value)
    if choices:
        longer = [choice for choice in choices if value and choice.startswith(value.lower())]
        return longer[0] if longer else closest_match(value.lower(), choices, 0.5)
    return f"[{value}]" if any(get_origin(kind) in (list, tuple) for kind in kinds) else None
