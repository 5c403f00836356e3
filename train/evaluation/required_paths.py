"""Checks of the paths that options name, made before a model is loaded or asked.

Each function raises one UserError that starts with the option, names the missing part of the path and suggests a
similar name that exists.
"""

from pathlib import Path

from train.errors import UserError
from train.storage.local_paths import describe_missing_path, looks_like_hub_id

_MODEL_FILES = ("config.json", "adapter_config.json")


def require_file(option: str, path: str | Path) -> None:
    """Raise UserError if `path` is no file; the error for a folder names files in it."""
    path = Path(path)
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.suffix in (".jsonl", ".json", ".py"))[:5]
        remedy = f" Name a file in it, such as {', '.join(names)}." if names else " Name a file."
        raise UserError(f"{option} {path}: that is a folder.{remedy}")
    if not path.exists():
        raise UserError(f"{option} {path}: cannot be read: {describe_missing_path(path)}")


def require_model(option: str, name: str, *, hub: bool = True) -> None:
    """Raise UserError if `name` is no folder with a model or an adapter. `hub`: accept possible hub ids."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in _MODEL_FILES):
            raise UserError(f"{option} {name}: cannot be loaded: there is no {' or '.join(_MODEL_FILES)} in it.")
    elif path.exists():
        raise UserError(f"{option} {name}: that is a file. Name the model's folder.")
    elif not hub or not looks_like_hub_id(name):
        raise UserError(f"{option} {name}: there is no such folder: {describe_missing_path(path)}")


def require_results_folder(option: str, name: str, remedy: str) -> None:
    """Raise UserError if `name`, the folder that would hold the results, does not exist. `remedy`: the advice."""
    if not Path(name).is_dir():
        raise UserError(f"{option} {name}: there is no such folder: {describe_missing_path(Path(name))} {remedy}")
