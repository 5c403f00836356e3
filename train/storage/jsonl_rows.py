"""Rows of a JSONL file, each checked by a pydantic model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from train.errors import UserError

Row = TypeVar("Row", bound=BaseModel)
_HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Tokenizers and files take none; JSON of a text that was cut within an emoji has one."""


class ChatMessage(BaseModel):
    """A message of a row; other keys are ignored."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


def read_jsonl_rows(path: Path, model: type[Row], contents: str, prefix: str = "") -> Iterator[tuple[str, Any, Row]]:
    """Yield the place, the JSON object and the checked row of each line that is not empty.

    `contents`: a sentence on the keys of a row, for errors. `prefix`: the option that names the file, for errors.
    Raises UserError that names the file, the line and the key if the file or a row is not usable.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut a text at U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"{prefix}{path}: not UTF-8: {error}. {contents}") from error
    except OSError as error:
        raise UserError(f"{prefix}{path}: cannot be read: {error.strerror}") from error
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{prefix}{path}:{number}"
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not valid JSON: {error.msg} at column {error.colno}. {contents}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{place}: can't be read as JSON: {error}. {contents}") from error
        if _HALF_PAIR.search(json.dumps(raw, ensure_ascii=False)):
            raise UserError(f"{place}: holds half of a surrogate pair, such as \\ud83d, which is no text. {contents}")
        count += 1
        yield place, raw, check_row(place, raw, model, contents)
    if not count:
        raise UserError(f"{prefix}{path}: holds no rows. {contents}")


def check_row(place: str, raw: Any, model: type[Row], contents: str) -> Row:
    """Return a JSON object as a checked row. Raises UserError that names the place and the key if it is not usable."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{place}: {_first_error(error)}. {contents}") from error


def _first_error(error: ValidationError) -> str:
    """Return the missing keys or, if there are none, the key and the message of the first error."""
    errors = error.errors(include_url=False)
    if missing := [_key(details) for details in errors if details["type"] == "missing"]:
        return f"there is no {', no '.join(missing)}"
    details = errors[0]
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if details["type"] == "model_type":
        kind = f"a {type(details['input']).__name__}, not an object"
        return f"{_key(details)} is {kind}" if details["loc"] else f"found {kind}"
    if not details["loc"]:
        return message
    given = json.dumps(details["input"], ensure_ascii=False, default=str)
    return f"{_key(details)} {message}" + (f" (found {given})" if len(given) <= 60 else "")


def _key(details: Any) -> str:
    return f"`{'.'.join(map(str, details['loc']))}`"
