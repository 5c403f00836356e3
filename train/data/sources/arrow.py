"""Arrow record batches (Parquet, saved data sets) -> rows of Python values.

Only texts, numbers and what is built of them are converted, as no format reads anything else: a date, a decimal or the
bytes of an image becomes an `ArrowValue`. That costs nothing and can't fail (Python's dates end with the year 9999, its
time zones with those that are installed). The same holds inside nested columns, and for a complete column of nested
numbers, such as an embedding.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import pyarrow
import pyarrow.types as arrow

from train.data.sources.formats import RawRow
from train.data.sources.row_errors import preview

_IS_TEXT = (arrow.is_string, arrow.is_large_string, arrow.is_string_view)
_IS_NUMBER = (arrow.is_boolean, arrow.is_integer, arrow.is_floating)
_IS_LIST = (
    *(arrow.is_list, arrow.is_large_list, arrow.is_fixed_size_list),
    *(arrow.is_list_view, arrow.is_large_list_view),
)


@dataclass(frozen=True, slots=True)
class ArrowValue:
    """An unconverted value, not null. `type`: the name of its Arrow type."""

    type: str

    def __str__(self) -> str:
        return self.type


@preview.register
def _(value: ArrowValue) -> str:
    cast = "" if "<" in value.type else ' (in pyarrow, column.cast("string") converts it to text)'
    return f"of Arrow's type {value.type}{cast}"


@dataclass(frozen=True, slots=True)
class ArrowRows:
    """A chunk of rows: a record batch. `first`: the number of its first row."""

    first: int
    batch: pyarrow.RecordBatch

    def rows(self) -> Iterator[tuple[str, RawRow]]:
        """Yield each row with its place, without the nulls that Arrow added."""
        names = self.batch.schema.names
        columns = [_values(column) for column in self.batch.columns]
        for number in range(self.batch.num_rows):
            yield (
                f" row {self.first + number}",
                {name: column[number] for name, column in zip(names, columns, strict=True)},
            )

    def __len__(self) -> int:
        return self.batch.num_rows


def arrow_chunks(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[ArrowRows]:
    """Yield consecutive record batches as chunks."""
    first = 1
    for batch in batches:
        yield ArrowRows(first, batch)
        first += batch.num_rows


def _values(column: pyarrow.Array) -> list[Any]:
    """Return the values of a column in Python; null is None."""
    kind = column.type
    leaves = _leaves(kind)
    if not (any(map(_is_text, leaves)) or all(map(arrow.is_null, leaves)) or _is_number(kind)):
        return [ArrowValue(str(kind)) if valid else None for valid in column.is_valid().to_pylist()]
    return _convert_all(column, _converter(kind))


def _inner(kind: pyarrow.DataType) -> list[pyarrow.DataType] | None:
    """Return the types that a nested type is built of, or None for any other."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return [kind.storage_type]
    if arrow.is_dictionary(kind) or arrow.is_run_end_encoded(kind):
        return [kind.value_type]
    return [kind.field(number).type for number in range(kind.num_fields)] if arrow.is_nested(kind) else None


@lru_cache(maxsize=1024)
def _leaves(kind: pyarrow.DataType) -> tuple[pyarrow.DataType, ...]:
    inner = _inner(kind)
    return (kind,) if inner is None else tuple(chain.from_iterable(map(_leaves, inner)))


def _has_distinct_names(kind: pyarrow.DataType) -> bool:
    """Return whether the fields of a struct have distinct names, as a dictionary needs."""
    names = [kind.field(number).name for number in range(kind.num_fields)] if arrow.is_struct(kind) else []
    return len(set(names)) == len(names)


def _is_json(kind: pyarrow.DataType) -> bool:
    return isinstance(kind, pyarrow.BaseExtensionType) and bool(kind.extension_name == "arrow.json")


def _is_text(kind: pyarrow.DataType) -> bool:
    return any(test(kind) for test in _IS_TEXT)


def _is_number(kind: pyarrow.DataType) -> bool:
    return any(test(kind) for test in _IS_NUMBER)


def _convert_all(values: Iterable[pyarrow.Scalar], convert: Callable[[pyarrow.Scalar], Any]) -> list[Any]:
    return [convert(value) if value.is_valid else None for value in values]


@lru_cache(maxsize=1024)
def _converter(kind: pyarrow.DataType) -> Callable[[pyarrow.Scalar], Any]:
    """Return a function that converts a non-null Arrow value of this type to Python.

    In Arrow every struct has the keys of all rows, null where a row had none: these are left out. A null that the row
    did have is lost with them, except in a JSON column.
    """
    inner = _inner(kind)
    if inner is None and _is_text(kind):
        return _to_text
    if inner is None and _is_number(kind):
        return lambda scalar: scalar.as_py()
    if inner is None or not _has_distinct_names(kind):
        value = ArrowValue(str(kind))
        return lambda scalar: value
    if arrow.is_union(kind):
        return lambda scalar: _convert_all([scalar.value], _converter(scalar.value.type))[0]
    converters = [_converter(part) for part in inner]
    if arrow.is_struct(kind):
        fields = [(number, kind.field(number).name, convert) for number, convert in enumerate(converters)]
        return lambda scalar: {
            name: convert(part) for number, name, convert in fields if (part := scalar[number]).is_valid
        }
    if arrow.is_map(kind):
        pair = (_converter(kind.key_type), _converter(kind.item_type))
        return lambda scalar: dict(zip(*map(_convert_all, scalar.values.flatten(), pair), strict=True))
    if any(test(kind) for test in _IS_LIST):
        return lambda scalar: _convert_all(scalar.values, converters[0])
    parse = _parse_json if _is_json(kind) else lambda value: value
    return lambda scalar: parse(_convert_all([scalar.value], converters[0])[0])


def _to_text(scalar: pyarrow.Scalar) -> str:
    """Return a text. Bytes that are not UTF-8 become halves of surrogate pairs, which formats refuse."""
    try:
        return str(scalar.as_py())
    except UnicodeDecodeError:
        return bytes(scalar.as_buffer()).decode("utf-8", "surrogateescape")


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a format that reads it reports the error
