"""Rows of Arrow record batches (Parquet, saved data sets) as Python values: texts, numbers, and what is built of them.

No format reads anything else, so nothing else is converted: a date, a decimal or the bytes of an image becomes an
`ArrowValue`, which costs nothing and can't fail (Python's dates end with the year 9999, its time zones with those that
are installed). The same holds inside nested columns, and for a whole column of nested numbers, such as an embedding.
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
from train.data.sources.row_errors import shown

_IS_TEXT = (arrow.is_string, arrow.is_large_string, arrow.is_string_view)
_IS_NUMBER = (arrow.is_boolean, arrow.is_integer, arrow.is_floating)
_IS_LIST = (
    *(arrow.is_list, arrow.is_large_list, arrow.is_fixed_size_list),
    *(arrow.is_list_view, arrow.is_large_list_view),
)


@dataclass(frozen=True, slots=True)
class ArrowValue:
    """A value of an Arrow type that holds no text: there, and not converted. `type`: the name that Arrow gives it."""

    type: str

    def __str__(self) -> str:
        return self.type


@shown.register
def _(value: ArrowValue) -> str:
    cast = "" if "<" in value.type else ' (in pyarrow, column.cast("string") makes text of it)'
    return f"of Arrow's type {value.type}{cast}"


@dataclass(frozen=True, slots=True)
class ArrowRows:
    """Rows of a record batch."""

    first: int
    batch: pyarrow.RecordBatch

    def rows(self) -> Iterator[tuple[str, RawRow]]:
        """The rows as they were before Arrow."""
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
    """The rows of record batches that follow one another."""
    first = 1
    for batch in batches:
        yield ArrowRows(first, batch)
        first += batch.num_rows


def _values(column: pyarrow.Array) -> list[Any]:
    """A column in Python, null as None."""
    kind = column.type
    leaves = _leaves(kind)
    if not (any(map(_is_text, leaves)) or all(map(arrow.is_null, leaves)) or _is_number(kind)):
        return [ArrowValue(str(kind)) if there else None for there in column.is_valid().to_pylist()]
    return _converted(column, _converter(kind))


def _inner(kind: pyarrow.DataType) -> list[pyarrow.DataType] | None:
    """The types that `kind` is built of; None where it is a value itself."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return [kind.storage_type]
    if arrow.is_dictionary(kind) or arrow.is_run_end_encoded(kind):
        return [kind.value_type]
    return [kind.field(number).type for number in range(kind.num_fields)] if arrow.is_nested(kind) else None


@lru_cache(maxsize=1024)
def _leaves(kind: pyarrow.DataType) -> tuple[pyarrow.DataType, ...]:
    inner = _inner(kind)
    return (kind,) if inner is None else tuple(chain.from_iterable(map(_leaves, inner)))


def _distinct(kind: pyarrow.DataType) -> bool:
    """Return whether no two fields of a struct share a name, as keys of a dictionary can't."""
    names = [kind.field(number).name for number in range(kind.num_fields)] if arrow.is_struct(kind) else []
    return len(set(names)) == len(names)


def _is_json(kind: pyarrow.DataType) -> bool:
    return isinstance(kind, pyarrow.BaseExtensionType) and bool(kind.extension_name == "arrow.json")


def _is_text(kind: pyarrow.DataType) -> bool:
    return any(test(kind) for test in _IS_TEXT)


def _is_number(kind: pyarrow.DataType) -> bool:
    return any(test(kind) for test in _IS_NUMBER)


def _converted(values: Iterable[pyarrow.Scalar], convert: Callable[[pyarrow.Scalar], Any]) -> list[Any]:
    return [convert(value) if value.is_valid else None for value in values]


@lru_cache(maxsize=1024)
def _converter(kind: pyarrow.DataType) -> Callable[[pyarrow.Scalar], Any]:
    """Makes Python's value of one of Arrow's that is not null, as the row had it.

    Arrow gives every struct all keys that any row has, null where a row had none: these are left out. A null that the
    row did have is lost with them, unless the column is one of JSON.
    """
    inner = _inner(kind)
    if inner is None and _is_text(kind):
        return _text
    if inner is None and _is_number(kind):
        return lambda scalar: scalar.as_py()
    if inner is None or not _distinct(kind):
        value = ArrowValue(str(kind))
        return lambda scalar: value
    if arrow.is_union(kind):
        return lambda scalar: _converted([scalar.value], _converter(scalar.value.type))[0]
    converters = [_converter(part) for part in inner]
    if arrow.is_struct(kind):
        fields = [(number, kind.field(number).name, convert) for number, convert in enumerate(converters)]
        return lambda scalar: {
            name: convert(part) for number, name, convert in fields if (part := scalar[number]).is_valid
        }
    if arrow.is_map(kind):
        pair = (_converter(kind.key_type), _converter(kind.item_type))
        return lambda scalar: dict(zip(*map(_converted, scalar.values.flatten(), pair), strict=True))
    if any(test(kind) for test in _IS_LIST):
        return lambda scalar: _converted(scalar.values, converters[0])
    parse = _parsed if _is_json(kind) else lambda value: value
    return lambda scalar: parse(_converted([scalar.value], converters[0])[0])


def _text(scalar: pyarrow.Scalar) -> str:
    """A text. Bytes that are no UTF-8 become halves of surrogate pairs, which a format refuses as it reads them."""
    try:
        return str(scalar.as_py())
    except UnicodeDecodeError:
        return bytes(scalar.as_buffer()).decode("utf-8", "surrogateescape")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a format that reads it says what is wrong
