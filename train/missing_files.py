"""Files and packages that a recipe names and that are not there, told before anything heavy is imported."""

import glob
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from train.data.sources import open_source
from train.errors import UserError
from train.local_paths import may_be_hub_id, similar, unreachable
from train.optimizer_arguments import missing_package
from train.recipe import ModelSection, Recipe, Source


def refuse_missing(recipe: Recipe, *, packages: bool = True) -> None:
    """Raise UserError, naming each, for a missing model folder, source of the data or package that a setting needs.

    Hub ids are looked for in the cache; none is asked for. Sources are found, not read. `packages`: the run is
    going to be on this machine.
    """
    faults = [error for look in _looks(recipe) if (error := _error_of(look))]
    if packages and (package := missing_package(recipe.training.get("optim") or "")):
        faults.append(package)
    if packages and recipe.training.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        faults.append(
            "training.use_liger_kernel: it needs the package liger-kernel, which is not installed. Install it with "
            "`pip install liger-kernel`, or write false."
        )
    if len(faults) > 1:
        raise UserError("\n  ".join([f"{recipe._origin.file} names {len(faults)} that are not there:", *faults]))
    for fault in faults:
        raise UserError(fault)


def refuse_missing_model(model: ModelSection, recipe_file: str | None = None) -> None:
    """Raise UserError where `model.name_or_path` is neither a folder nor an id that the hub may have."""
    name = model.name_or_path
    path = Path(name)
    if path.is_dir():
        return
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    if path.exists():
        raise UserError(f"model.name_or_path: {path} is a file. Write the folder that the model is in: {path.parent}.")
    if not may_be_hub_id(name):
        hint = _from_recipe(path, recipe_file) or similar(path)
        raise UserError(
            f"model.name_or_path: there is no folder {path}{where}.{hint} Write a model folder or a hub id."
        )
    if why := unreachable(name, "model"):
        hint = _from_recipe(path, recipe_file) or similar(path)
        raise UserError(
            f"model.name_or_path: {name} can't be loaded: there is no folder of that name{where}; {why}.{hint}"
        )


def _looks(recipe: Recipe) -> Iterator[Callable[[], object]]:
    yield partial(refuse_missing_model, recipe.model, recipe._origin.file)
    parts = {"sources": recipe.data.sources, "validation": recipe.data.validation}
    for name, sources in parts.items():
        for number, source in enumerate(sources if isinstance(sources, tuple) else ()):
            yield partial(_find_source, f"data.{name}.{number}.path", source, recipe)


def _find_source(key: str, source: Source, recipe: Recipe) -> None:
    path = Path(source.path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return  # to open what save_to_disk wrote takes the package datasets, which is heavy
    local = path.exists() or glob.has_magic(source.path) or not may_be_hub_id(source.path)
    try:
        if local:
            open_source(source, recipe.data.allow_pickle)
            return
    except UserError as error:
        raise UserError(f"{key}: {error}{_from_recipe(path, recipe._origin.file)}") from error
    if why := unreachable(source.path, "dataset"):
        where = f"there is no file or folder of that name in {Path.cwd()}"
        hint = _from_recipe(path, recipe._origin.file) or similar(path)
        raise UserError(f"{key}: {source.path} can't be loaded: {where}; {why}.{hint}")


def _from_recipe(path: Path, recipe_file: str | None) -> str:
    """Return a hint where `path` is there when looked up from the recipe's folder: paths are not."""
    beside = Path(recipe_file).parent / path if recipe_file else path
    if path.exists() or not beside.exists():
        return ""
    return f" Paths start from the working folder, not from the recipe's: did you mean {beside}?"


def _error_of(look: Callable[[], object]) -> str | None:
    try:
        look()
    except UserError as error:
        return str(error)
    return None
