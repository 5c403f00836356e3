"""Request fields that a configuration's `extra` may not set: those of the run itself, secrets, contradictions."""

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from train.recipe.yaml_document import SECRET

_RESERVED = {
    "model": "set by the run itself",
    "messages": "set by the run itself",
    "stream": "not supported: each answer is read in one piece. Set `stream` of the server if it can only stream",
    "stream_options": "not supported: each answer is read in one piece",
    "n": "not supported: each request gets one answer",
}
_NO_SECRETS = (
    "requests hold no secrets here: they are copied into the output folder and into logs. Set a server's key in the "
    "environment, and name the variable by {key_variable}."
)


def find_extra_errors(extra: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each invalid field name in `extra` with the reason.

    Args:
        extra: further fields of a request.
        own: values of the request fields that have a setting of their own.

    `{setting}` in a reason stands for the name of that setting, `{key_variable}` for the setting that names the
    variable of a server's key.
    """
    for name, value in extra.items():
        if _holds_secret(name, value):
            yield name, _NO_SECRETS
        elif name in _RESERVED:
            yield name, f"{_RESERVED[name]}."
        elif value is not None and own.get(name) is not None:
            yield name, "not set here: write {setting}."
        elif name == "max_completion_tokens" and (type(value) not in (int, NoneType) or value == 0):
            yield name, "must be an integer >= 1, or null."


def _holds_secret(name: str, value: Any) -> bool:
    """Return whether the name of a request field, or a name inside its value, is that of a secret."""
    if SECRET.search(name):
        return True
    if isinstance(value, list):
        return any(_holds_secret("", item) for item in value)
    return isinstance(value, Mapping) and any(_holds_secret(str(key), item) for key, item in value.items())
