"""Everything that is wrong with a recipe, in the words of the person who must mend it."""

import json
import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from train.errors import UserError
from train.recipe import lr_schedules, optimizer_arguments
from train.recipe.conflicts import _clashes_between_sections, _let_override_decide_duration, _missing_files, clashes
from train.recipe.sft_config import OWNED, training_model, with_defaults
from train.recipe.yaml_document import (
    Document,
    KeyPath,
    closest,
    compose,
    described,
    did_you_mean,
    dotted,
    value_at,
)
from train.storage.local_paths import LocalPath, expanded

Root = TypeVar("Root", bound=BaseModel)


def validate(document: Document, root: type[Root]) -> Root:
    """The recipe as `root`, the model of all its sections.

    Raises UserError with all faults, those found before among them.
    """
    _expand_paths(document, root)
    _let_override_decide_duration(document)
    training = document.section("training")
    recipe = _validated(document, root, root)
    if _validated(document, training_model(), root, ("training",)) is not None:
        _schedule_faults(document)
        for key, message in optimizer_arguments.contradictions(with_defaults(training)):
            document.fault(("training", key), message)
    for clash in clashes(training, has_validation=document.section("data").get("validation") is not None):
        document.fault(("training", clash.key), clash.message)
    _clashes_between_sections(document)
    _missing_files(document)
    return _faultless(document, recipe)


def validate_settings(document: Document, root: type[Root]) -> Root:
    """The settings of another command than training as `root`. Raises UserError with all faults."""
    _expand_paths(document, root)
    return _faultless(document, _validated(document, root, root))


def _validated(document: Document, model: type[Root], root: type[BaseModel], prefix: KeyPath = ()) -> Root | None:
    """The values at `prefix` as `model`; None where there are faults, which the document then knows."""
    try:
        return model.model_validate(document.section(str(prefix[0])) if prefix else document.tree)
    except ValidationError as fault:
        _translate(document, fault, prefix, root)
        return None


def _faultless(document: Document, settings: Root | None) -> Root:
    if document.faults or settings is None:
        lines = [f"{place.words}: {message}" for place, message in sorted(document.faults)]
        if len(lines) == 1:
            raise UserError(lines[0])
        raise UserError("\n  ".join([f"{document.name} has {len(lines)} faults:", *lines]))
    return settings


def _expand_paths(document: Document, root: type[BaseModel]) -> None:
    """Expand `~` and variables in every key whose type is marked as a path, so that the resolved recipe has none."""
    for path in list(_path_keys(root, document.tree)):
        section, text = value_at(document.tree, path[:-1]), value_at(document.tree, path)
        if path[0] == "training" and text.startswith("{"):
            continue  # transformers reads it as JSON
        try:
            section[path[-1]] = expanded(text)
        except ValueError as error:
            document.fault(path, f"{error}.")


def _path_keys(model: type[BaseModel], values: dict[str, Any], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """The keys given in `values`, a section that `model` describes, that take a path and hold text."""
    for name, field in model.model_fields.items():
        value, here = values.get(name), (*prefix, name)
        if isinstance(value, str):
            marks = (mark for _, more in _parts(field.annotation) for mark in (*field.metadata, *more))
            if any(isinstance(mark, LocalPath) for mark in marks):
                yield here
            continue
        inside = [(training_model(), False)] if here == ("training",) else _models(field.annotation)
        for section, in_list in inside:
            if in_list and isinstance(value, list):
                items = [((*here, index), item) for index, item in enumerate(value)]
            else:
                items = [] if in_list else [(here, value)]
            for place, item in items:
                if isinstance(item, dict):
                    yield from _path_keys(section, item, place)


def _translate(document: Document, fault: ValidationError, prefix: KeyPath, root: type[BaseModel]) -> None:
    """Each error of pydantic's as a fault in a user's words, one for each key."""
    errors: dict[KeyPath, str] = {}
    for error in fault.errors(include_url=False, include_context=False):
        path = (*prefix, *(part for part in error["loc"] if part not in ("<list>", "<single>")))
        # below a field of TRL's stand only the names of union branches
        errors.setdefault(path[:2] if prefix else path, error["type"])
    for path, kind in errors.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in errors):
            continue  # a list whose items are at fault counts as empty too
        if kind == "extra_forbidden":
            document.fault(path, _unknown(path, root))
        elif kind == "missing":
            document.fault(path, f"missing. {' '.join((_field_at(path, root)[2] or '').split())}")
        else:
            value = value_at(document.tree, path)
            annotation, bounds, _ = _field_at(path, root)
            remedy = did_you_mean(_value_meant(value, annotation))
            document.fault(path, f"found {described(value)}. Allowed: {_allowed(annotation, bounds)}.{remedy}")


def _schedule_faults(document: Document) -> None:
    """Note what is wrong with the arguments of the learning rate's schedule."""
    settings = with_defaults(document.section("training"))
    schedule, arguments = settings["lr_scheduler_type"], lr_schedules.given_arguments(settings)
    path: KeyPath = ("training", lr_schedules.KWARGS)
    if not isinstance(arguments, dict):
        document.fault(path, f"found {described(arguments)}. Write a section such as {{num_cycles: 0.5}}.")
        return
    model, key = lr_schedules.arguments_model(schedule), f"`training.lr_scheduler_type: {schedule}`"
    try:
        model.model_validate(arguments)
    except ValidationError as fault:
        for name in dict.fromkeys(str(error["loc"][0]) for error in fault.errors(include_url=False)):
            if known := model.model_fields.get(name):
                allowed = _allowed(known.annotation, known.metadata)
                document.fault((*path, name), f"found {described(arguments[name])}. Allowed: {allowed}.")
            else:
                allowed = ", ".join(model.model_fields) or "none, leave the section out"
                meant = did_you_mean(closest(name, list(model.model_fields), 0.6))
                document.fault((*path, name), f"{key} has no argument '{name}'. Allowed: {allowed}.{meant}")
        return
    for message in lr_schedules.contradictions(settings):
        document.fault(path, message)


def _parts(annotation: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The plain types in a union, each with what its `Annotated` says of it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        for kind, more in _parts(inner):
            yield kind, (*metadata, *more)
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation, ()


def _models(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """The sections that a key may hold, and whether in a list."""
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
"""What other trainers, or older versions of this one's libraries, call our keys."""


def _field_at(path: KeyPath, root: type[BaseModel]) -> tuple[Any, Sequence[Any], str | None]:
    """Type, bounds and description of the key at `path`."""
    annotation: Any = root
    bounds: Sequence[Any] = ()
    description: str | None = None
    for step in path:
        if isinstance(step, int):
            annotation = next(get_args(kind)[0] for kind, _ in _parts(annotation) if get_origin(kind) is tuple)
            bounds = ()
            continue
        model = next(model for model, _ in _models(annotation))
        found = model.model_fields[step]
        annotation = training_model() if found is root.model_fields.get("training") else found.annotation
        bounds, description = found.metadata, found.description
    return annotation, bounds, description


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a recipe; an item of a list is written as its first, `0`."""
    for name, found in model.model_fields.items():
        yield prefix + name
        inside = [(training_model(), False)] if prefix + name == "training" else _models(found.annotation)
        for section, in_list in inside:
            yield from _known_keys(section, f"{prefix}{name}.0." if in_list else f"{prefix}{name}.")


def _unknown(path: KeyPath, root: type[BaseModel]) -> str:
    """What to say of a key that a recipe doesn't have."""
    key, parent = str(path[-1]), path[:-1]
    if parent == ("training",) and key in OWNED:
        return f"not set here: {OWNED[key]}."
    known = list(dict.fromkeys(_known_keys(root)))
    prefix = "".join(f"{0 if isinstance(step, int) else step}." for step in parent)
    siblings = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
    siblings = [name for name in siblings if "." not in name]
    lowered = {name.lower(): name for name in siblings}
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}  # the first of a name wins
    plain = key.lower().replace("-", "_")
    meant = renamed if (renamed := RENAMED.get(plain)) in known else None
    if not meant and (beside := closest(plain, list(lowered), 0.8)):
        meant = dotted((*parent, lowered[beside]))
    meant = meant or leaves.get(plain)
    if not meant and (beside := closest(plain, list(lowered), 0.6)):
        meant = dotted((*parent, lowered[beside]))
    meant = meant or leaves.get(closest(plain, list(leaves), 0.75) or "")
    if meant:
        return f"unknown key.{did_you_mean(meant)}"
    if key in OWNED and "training" in root.model_fields:
        return f"unknown key: {OWNED[key]}."
    if parent == ("training",):
        return "unknown key. Allowed: the fields of TRL's SFTConfig."
    return f"unknown key. Allowed: {', '.join(siblings)}."


def _allowed(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """The values that a type allows, in words."""
    words = []
    for kind, more in _parts(annotation):
        origin = get_origin(kind)
        if origin is Literal:
            words.append(", ".join(json.dumps(one) if isinstance(one, bool) else str(one) for one in get_args(kind)))
        elif origin in (list, tuple):
            filled = any(getattr(bound, "min_length", 0) for bound in _flat((*bounds, *more)))
            words.append(f"a list {'of at least one ' if filled else ''}({_allowed(get_args(kind)[0])})")
        elif kind in (int, float):
            limits = " and ".join(_limits((*bounds, *more)))
            words.append(f"{'a whole number' if kind is int else 'a number'} {limits}".strip())
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            keys = list(kind.model_fields)
            words.append("a section" if len(keys) > 20 else f"a section with the keys {', '.join(keys)}")
        else:
            examples = [one for bound in (*bounds, *more) for one in getattr(bound, "examples", None) or ()]
            text = f"text such as {' or '.join(map(repr, examples))}" if examples else "text"
            names = {str: text, bool: "true or false", type(None): "null", dict: "a section"}
            words.append(names.get(origin or kind, "a value"))
    return "; or ".join(dict.fromkeys(words))


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    """Bounds, those inside a `Field(...)` of an `Annotated` among them."""
    for bound in metadata:
        yield bound
        yield from getattr(bound, "metadata", ())


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    for bound in _flat(metadata):
        for name, words in ("gt", "above"), ("ge", "not below"), ("lt", "below"), ("le", "not above"):
            if getattr(bound, name, None) is not None:
                yield f"{words} {getattr(bound, name)}"


def _value_meant(value: Any, annotation: Any) -> str | None:
    """What was probably meant by a value of the wrong type."""
    kinds = [kind for kind, _ in _parts(annotation)]
    choices = [str(one) for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
    if value is False and "no" in choices:
        return "no"
    if isinstance(value, int | float) and str in kinds and not isinstance(value, bool):
        return f'"{value}"'
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
        return longer[0] if longer else closest(value.lower(), choices, 0.5)
    return f"[{value}]" if any(get_origin(kind) in (list, tuple) for kind in kinds) else None
