"""Keys of servers: read from the environment, and checked for what is copied along with them."""

import os
import re

from train.errors import UserError

_QUOTES = "\"'`"
_HEADER = re.compile(r"authorization\s*:|(?:x-)?api-key\s*:|bearer\s|basic\s", re.IGNORECASE)


def load_api_key(server: str, variable: str) -> str:
    """Return the key in an environment variable. Raises UserError where it is missing or can't be a key."""
    if not (key := os.environ.get(variable, "").strip()):
        raise UserError(f"{server} needs a key: set the environment variable {variable}.")
    if not (key.isascii() and key.isprintable()):
        found = "a line break" if len(key.splitlines()) > 1 else "a control character"
        found = found if key.isascii() else "a character that is not ASCII (a curly quote, an invisible space?)"
        raise UserError(
            f"{variable}: the key in this environment variable holds {found}. A key is one line of ASCII "
            "characters: set the variable to that alone."
        )
    if fault := _fault_of(key, variable):
        raise UserError(f"{variable}: the key in this environment variable {fault}.")
    return key


def _fault_of(key: str, variable: str) -> str:
    """Return what is wrong with a key that was copied with more than itself; nothing where it looks like one."""
    if key[0] in _QUOTES or key[-1] in _QUOTES:
        return "stands in quotes. Set the variable without them"
    if word := _HEADER.match(key):
        return f"begins with {word[0].strip()!r}. Set the variable to the key alone: the header is made of it"
    if key.startswith(f"{variable}="):
        return f"begins with '{variable}='. Set the variable to the key alone"
    return ""
