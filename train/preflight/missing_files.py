"""Search for the files and packages that a recipe names, before anything heavy is imported."""

import glob
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from train.data.sources.source import open_source
from train.errors import MachineError, UserError
from train.model.folder import _from_recipe, check_model_exists
from train.recipe import Recipe, Source
from train.recipe.optimizer_arguments import missing_package
from train.storage.local_paths import hub_unreachable_reason, looks_like_hub_id, suggest_similar


def check_files_exist(recipe: Recipe, *, packages: bool = True) -> None:
    """Raise UserError if the model's folder, a source of the data or a package that a setting needs is missing.

    One error names all of them. Hub ids are looked up in the local cache only; sources are not read.
    `packages`: whether the run will be on this machine.
    """
    errors = [error for search in _searches(recipe) if (error := _error_of(search))]
    lacks = find_missing_packages(recipe) if packages else []
    if len(lacks) == 1 and not errors:
        raise lacks[0]
    errors += map(str, lacks)
    if len(errors) > 1:
        raise UserError("\n  ".join([f"{recipe._origin.file} names {len(errors)} that are not there:", *errors]))
    for error in errors:
        raise UserError(error)


def find_missing_packages(recipe: Recipe) -> list[MachineError]:
    """Return an error for each package that `training` needs and this machine lacks."""
    errors = []
    optimizer = recipe.training.get("optim") or ""
    if package := missing_package(optimizer):
        reason = f"training.optim: {optimizer} needs the package {package}, which is not installed"
        errors.append(MachineError(reason, f"Install it with `pip install {package}`, or remove the key to use AdamW."))
    if recipe.training.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        reason = "training.use_liger_kernel: it needs the package liger-kernel, which is not installed"
        errors.append(MachineError(reason, "Install it with `pip install liger-kernel`, or write false."))
    return errors


def _searches(recipe: Recipe) -> Iterator[Callable[[], object]]:
    yield partial(check_model_exists, recipe.model, recipe._origin.file)
    parts = {"sources": recipe.data.sources, "validation": recipe.data.validation}
    for name, sources in parts.items():
        for number, source in enumerate(sources if isinstance(sources, tuple) else ()):
            yield partial(_find_source, f"data.{name}.{number}.path", source, recipe)


def _find_source(key: str, source: Source, recipe: Recipe) -> None:
    path = Path(source.path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return  # to open what save_to_disk wrote takes the package datasets, which is heavy
    local = path.exists() or glob.has_magic(source.path) or not looks_like_hub_id(source.path)
    try:
        if local:
            open_source(source, recipe.data.allow_pickle)
            return
    except UserError as error:
        raise UserError(f"{key}: {error}{_from_recipe(path, recipe._origin.file)}") from error
    if reason := hub_unreachable_reason(source.path, "dataset"):
        where = f"there is no file or folder of that name in {Path.cwd()}"
        hint = _from_recipe(path, recipe._origin.file) or suggest_similar(path)
        raise UserError(f"{key}: {source.path} can't be loaded: {where}; {reason}.{hint}")


def _error_of(search: Callable[[], object]) -> str | None:
    try:
        search()
    except UserError as error:
        return str(error)
    return None
