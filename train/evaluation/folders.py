"""Folders and files that an option of scripts/evaluate.py names, looked for before anything is loaded or asked.

Each function raises one UserError that begins with the option and names what is missing, where it was looked for, and
what there has nearly that name.
"""

from pathlib import Path

from train.errors import UserError
from train.storage.local_paths import describe_missing_path, looks_like_hub_id

_MODEL_FILES = ("config.json", "adapter_config.json")


def require_file(option: str, path: Path) -> None:
    """Raise UserError where there is no file `path`; of a folder it names the files that may be meant."""
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.suffix in (".jsonl", ".json", ".py"))[:5]
        inside = f" Name a file in it, such as {', '.join(names)}." if names else " Name a file."
        raise UserError(f"{option} {path}: that is a folder.{inside}")
    if not path.exists():
        raise UserError(f"{option} {path}: can't be read: {describe_missing_path(path)}")


def require_model(option: str, name: str, *, hub: bool = True) -> None:
    """Raise UserError where `name` is no folder with a model or an adapter; with `hub` what may be a hub id is left."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in _MODEL_FILES):
            raise UserError(f"{option} {name}: can't be loaded: there is no {' or '.join(_MODEL_FILES)} in it.")
    elif path.exists():
        raise UserError(f"{option} {name}: that is a file. Name the model's folder.")
    elif not hub or not looks_like_hub_id(name):
        raise UserError(f"{option} {name}: there is no such folder: {describe_missing_path(path)}")


def require_results_folder(option: str, name: str, otherwise: str) -> None:
    """Raise UserError where `name`, into whose folder results would go, is none. `otherwise`: what to write then."""
    if not Path(name).is_dir():
        raise UserError(f"{option} {name}: there is no such folder: {describe_missing_path(Path(name))} {otherwise}")
