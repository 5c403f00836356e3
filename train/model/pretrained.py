"""Arguments and errors of transformers' `from_pretrained`: files that belong to the model of a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import cached_file

from train.errors import UserError
from train.recipe import ModelSection


def origin(model: ModelSection) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` that say which model is meant."""
    return {
        "pretrained_model_name_or_path": model.name_or_path,
        "revision": model.revision or "main",
        "trust_remote_code": model.trust_remote_code,  # never None: None asks at the terminal and waits
    }


def unloadable(model: ModelSection, error: Exception) -> UserError:
    """Return the error for the user where a model can't be opened because of `error`."""
    name, text = model.name_or_path, str(error).strip()
    if "trust_remote_code" in text:
        return UserError(
            f"model.name_or_path: {name} needs its own Python code to load. Read that code; if you trust it, write "
            "`model.trust_remote_code: true`."
        )
    if isinstance(error, StrictDataclassError):  # the first of its lines names the key, the next ones the value
        return UserError(f"model.name_or_path: {name}: config.json: {' '.join(text.split())} Correct that value.")
    first_line = text.splitlines()[0] if text else type(error).__name__
    return UserError(f"model.name_or_path: {name} can't be loaded: {first_line}")


@contextmanager
def reading(model: ModelSection, files: str) -> Iterator[None]:
    """Raise UserError for whatever transformers and tokenizers raise while they read `files`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        raise unloadable(model, error) from error
    except Exception as error:  # tokenizers raises nothing better; transformers trips over values of another type
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name_or_path: {model.name_or_path}: a value in {files} can't be used ({type(error).__name__}: "
            f"{text}). Correct it, or download the file again."
        ) from error


def optional_file(model: ModelSection, name: str) -> str | None:
    """Return the path of a file of the model; None if it has none, or if it can't be fetched."""
    file: str | None = cached_file(
        model.name_or_path,
        name,
        revision=model.revision or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return file
