"""JSON objects at the end of replies."""

import json
import re
from typing import Any

_MAX_ATTEMPTS = 5
_MAX_CHARACTERS = 16_000


def json_at_end(text: str) -> dict[str, Any] | None:
    """Return the JSON object at the end of a text, perhaps in a code block; None if there is none. Never raises.

    The object begins on a line of its own. Text before it is skipped; text after it makes it a quotation. An object
    with the same key twice contradicts itself and is none.
    """
    text = text[-_MAX_CHARACTERS:].rstrip(" \n\t`")
    if not text.endswith("}"):
        return None
    starts = [match.end() - 1 for match in re.finditer(r"(?:\A|\n)[^\S\n]*\{", text)]
    for start in starts[-_MAX_ATTEMPTS:]:
        try:
            record = json.loads(text[start:], strict=False, object_pairs_hook=_with_unique_keys)
        except (ValueError, RecursionError):
            continue
        return record if isinstance(record, dict) else None
    return None


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice")
    return record
