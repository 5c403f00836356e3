"""Files and packages that a recipe names and that are not there, told before anything heavy is imported."""

import glob
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from train.data.sources.source import open_source
from train.errors import UserError
from train.model.folder import _from_recipe, refuse_missing_model
from train.recipe import Recipe, Source
from train.recipe.optimizer_arguments import missing_package_error
from train.storage.local_paths import hub_unreachable_reason, looks_like_hub_id, suggest_similar


def refuse_missing(recipe: Recipe, *, packages: bool = True) -> None:
    """Raise UserError, naming each, for a missing model folder, source of the data or package that a setting needs.

    Hub ids are looked for in the cache; none is asked for. Sources are found, not read. `packages`: the run is
    going to be on this machine.
    """
    faults = [error for look in _looks(recipe) if (error := _error_of(look))]
    if packages and (package := missing_package_error(recipe.training.get("optim") or "")):
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
    local = path.exists() or glob.has_magic(source.path) or not looks_like_hub_id(source.path)
    try:
        if local:
            open_source(source, recipe.data.allow_pickle)
            return
    except UserError as error:
        raise UserError(f"{key}: {error}{_from_recipe(path, recipe._origin.file)}") from error
    if why := hub_unreachable_reason(source.path, "dataset"):
        where = f"there is no file or folder of that name in {Path.cwd()}"
        hint = _from_recipe(path, recipe._origin.file) or suggest_similar(path)
        raise UserError(f"{key}: {source.path} can't be loaded: {where}; {why}.{hint}")


def _error_of(look: Callable[[], object]) -> str | None:
    try:
        look()
    except UserError as error:
        return str(error)
    return None
