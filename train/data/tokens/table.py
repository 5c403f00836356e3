"""Token table: tokenized rows in an Arrow stream, mapped into memory.

A row takes 4 bytes a token and about 8 for each trained span. A table with a loss weight other than 1 has those of all
spans in a file beside it. Places are stored without the file's name, and digests instead of texts, so the content
depends on the rows alone and not on their paths. `datasets.Dataset.from_file` opens the file too.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import xxhash
from numpy.typing import NDArray

from train.data.loss_mask import EncodedRow
from train.data.sources.formats import Conversation, Message, RowError
from train.data.sources.loss_weights import LOSS_WEIGHT
from train.data.sources.unread_text import Unread, find_lost_text

_DIGEST = pyarrow.binary(16)
SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "trained": pyarrow.list_(pyarrow.int32()),  # start and end (exclusive) of each trained span
        "trained_tokens": pyarrow.int32(),
        "first_of_conversation": pyarrow.int32(),  # 0 or 1
        "file": pyarrow.int32(),
        "place": pyarrow.string(),
        "conversation": _DIGEST,
        "question": _DIGEST,
        "systems": pyarrow.list_(_DIGEST),
    }
)
_LOSS_WEIGHTS = "loss_weights"
"""Column of a batch with a loss weight other than 1: that of each trained span."""
_WEIGHTS_FILE = ".loss_weights"
"""Ending of the file beside a table that holds this column of all batches: float32, little-endian."""
_PLAIN_KEYS = {"role", "content"}
_EXAMPLES = 3
_PREVIEW = 60
"""Characters of an unread text in an example."""


@dataclass(slots=True)
class RowIssues:
    """Rows that can't be trained, and text of trained rows that is changed or not read.

    - `errors`: kind of error -> number of rows and (file, place, detail) of the first ones.
    - `escaped`: number of trained rows in which control tokens typed in the text were broken up.
    - `unread`: column or message key -> number of rows that have it, number of those that lose content with it, and
      (file, place, text) of the first of those.
    """

    errors: dict[str, tuple[int, list[tuple[int, str, str]]]] = field(default_factory=dict)
    escaped: int = 0
    unread: dict[str, tuple[int, int, tuple[int, str, str] | None]] = field(default_factory=dict)

    def add(self, error: RowError, file: int, place: str) -> None:
        """Count the error of one more row."""
        self.merge(RowIssues({error.kind: (1, [(file, place, error.detail)])}))

    def add_unread(self, unread: Unread, messages: Sequence[Message], file: int, place: str) -> None:
        """Count the unread values of one more row. `messages`: what the row became."""
        texts = [text for message in messages for key in ("content", "reasoning_content") if (text := message.get(key))]
        for name, values in unread.items():
            text = find_lost_text(name, values, texts)
            name = _printable(name)
            rows, losing, example = self.unread.get(name, (0, 0, None))
            if text is not None and example is None:
                example = (file, place, _printable(text[:_PREVIEW] + ("..." if len(text) > _PREVIEW else "")))
            self.unread[name] = (rows + 1, losing + (text is not None), example)

    def merge(self, later: "RowIssues") -> None:
        """Add the issues of rows that follow these."""
        self.escaped += later.escaped
        for name, (rows, losing, example) in later.unread.items():
            rows_before, losing_before, example_before = self.unread.get(name, (0, 0, None))
            self.unread[name] = (rows_before + rows, losing_before + losing, example_before or example)
        for kind, (count, examples) in later.errors.items():
            count_before, examples_before = self.errors.get(kind, (0, []))
            self.errors[kind] = count_before + count, [*examples_before, *examples][:_EXAMPLES]


def _printable(text: str) -> str:
    """Return `text` with halves of surrogate pairs escaped: UTF-8 files can't hold them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def make_batch(
    file: int,
    rows: Sequence[tuple[Conversation, Sequence[EncodedRow]]],
    *,
    questions: Sequence[bytes] | None = None,
    in_pairs: bool = False,
) -> pyarrow.RecordBatch:
    """Return a record batch of `SCHEMA` with the rows of conversations of one file, and perhaps their loss weights.

    - `file`: its number.
    - `questions`: for each of `rows`, a digest in place of that of its first user message.
    - `in_pairs`: each two of `rows` are one conversation of the table: a pair, the chosen one first.
    """
    items = [
        (number, encoded, not (part or (in_pairs and number % 2)))
        for number, (_, parts) in enumerate(rows)
        for part, encoded in enumerate(parts)
    ]
    digests = [_digests(conversation) for conversation, _ in rows]
    trained = [encoded.trained for _, encoded, _ in items]
    systems = [digests[number][2] for number, _, _ in items]
    columns = {
        "input_ids": _lists([encoded.ids for _, encoded, _ in items]),
        "trained": _lists([spans.reshape(-1) for spans in trained]),
        "trained_tokens": _int32_array([int((spans[:, 1] - spans[:, 0]).sum()) for spans in trained]),
        "first_of_conversation": _int32_array([first for _, _, first in items]),
        "file": _int32_array([file] * len(items)),
        "place": _texts([rows[number][0].place for number, _, _ in items]),
        "conversation": _digest_array([digests[number][0] for number, _, _ in items]),
        "question": _digest_array([questions[number] if questions else digests[number][1] for number, _, _ in items]),
        "systems": pyarrow.ListArray.from_arrays(
            _int32_array(_offsets(systems)), _digest_array([*chain.from_iterable(systems)])
        ),
    }
    batch = pyarrow.record_batch([columns[column.name] for column in SCHEMA], schema=SCHEMA)
    if any(encoded.weights is not None for _, encoded, _ in items):
        batch = batch.append_column(
            _LOSS_WEIGHTS, _lists([encoded.span_weights for _, encoded, _ in items], np.float32)
        )
    return batch


# Columns are made of buffers: pyarrow.array() would import pandas first, a quarter of a second in each process.


def _lists(values: Sequence[NDArray[Any]], kind: Any = np.int32) -> pyarrow.ListArray:
    flat = np.concatenate([np.empty(0, kind), *values])
    numbers = pyarrow.Array.from_buffers(pyarrow.from_numpy_dtype(kind), len(flat), [None, pyarrow.py_buffer(flat)])
    return pyarrow.ListArray.from_arrays(_int32_array(_offsets(values)), numbers)


def _offsets(values: Sequence[Sized]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, values)])


def _int32_array(values: Sequence[int] | NDArray[np.int64]) -> pyarrow.Int32Array:
    buffer = pyarrow.py_buffer(np.asarray(values, np.int32))
    return pyarrow.Array.from_buffers(pyarrow.int32(), len(values), [None, buffer])


def _texts(values: Sequence[str]) -> pyarrow.StringArray:
    data = [value.encode() for value in values]
    offsets = pyarrow.py_buffer(_offsets(data).astype(np.int32))
    return pyarrow.StringArray.from_buffers(len(data), offsets, pyarrow.py_buffer(b"".join(data)))


def _digest_array(values: Sequence[bytes]) -> pyarrow.FixedSizeBinaryArray:
    return pyarrow.Array.from_buffers(_DIGEST, len(values), [None, pyarrow.py_buffer(b"".join(values))])


def has_loss_weights(batch: pyarrow.RecordBatch) -> bool:
    """Return whether a batch of `make_batch` has a loss weight other than 1."""
    return _LOSS_WEIGHTS in batch.schema.names


def _span_weights(batch: pyarrow.RecordBatch) -> NDArray[np.float32]:
    """Return the loss weights of all trained spans of a batch of `make_batch`, in order."""
    if has_loss_weights(batch):
        offsets, values = _offsets_and_values(batch[_LOSS_WEIGHTS], np.float32)
    else:
        offsets = _offsets_and_values(batch["trained"])[0] // 2
        values = np.ones(int(offsets[-1]), np.float32)
    return values[offsets[0] : offsets[-1]]


def digest_conversation(conversation: Conversation) -> bytes:
    """Return a digest of the messages, tools and template variables of a conversation: 16 bytes."""
    messages = conversation.messages
    if any(LOSS_WEIGHT in message for message in messages):  # the same row, however it weighs
        messages = [{key: message[key] for key in message if key != LOSS_WEIGHT} for message in messages]
    extras = [part for part in (conversation.tools, conversation.template_kwargs) if part is not None]
    if not extras and all(message.keys() == _PLAIN_KEYS for message in messages):
        text = "\0".join([text for message in messages for text in (message["role"], message["content"])])
    else:
        text = json.dumps([messages, *extras], ensure_ascii=False, sort_keys=True, default=str)
    return _digest(text)


def digest_instruction(conversation: Conversation, answer: int) -> bytes:
    """Return a digest of all but the leading system message and the message `answer`: 16 bytes."""
    before = conversation.messages[:answer]
    before = before[1:] if before and before[0]["role"] == "system" else before
    parts = [before, conversation.messages[answer + 1 :], conversation.tools, conversation.template_kwargs]
    return _digest(json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str))


def _digests(conversation: Conversation) -> tuple[bytes, bytes, list[bytes]]:
    """Return digests of a conversation, of its first user message (white space aside), and of its system messages."""
    messages = conversation.messages
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    return (
        digest_conversation(conversation),
        _digest(" ".join(first["content"].split())),
        [_digest(message["content"]) for message in messages if message["role"] == "system"],
    )


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


class TokensDigest:
    """Digest of the tokens, trained spans and loss weights of all rows in order.

    How the rows are split into batches doesn't matter, and weights count only if one of them isn't 1.
    """

    def __init__(self) -> None:
        self._streams = [xxhash.xxh3_128() for _ in range(5)]
        self._weights = xxhash.xxh3_128()
        self.has_loss_weights = False
        self._rows = self._tokens = self._trained = 0

    def add(self, batch: pyarrow.RecordBatch) -> None:
        """Add the next rows."""
        ids, trained = _offsets_and_values(batch["input_ids"]), _offsets_and_values(batch["trained"])
        first = _int32(batch["first_of_conversation"])
        columns = [first]
        for offsets, values in (ids, trained):
            columns += [np.diff(offsets), values[offsets[0] : offsets[-1]]]
        for stream, column in zip(self._streams, columns, strict=True):
            stream.update(column.astype("<i4", copy=False).tobytes())
        self._weights.update(_span_weights(batch).astype("<f4", copy=False).tobytes())
        self.has_loss_weights |= has_loss_weights(batch)
        self._rows += batch.num_rows
        self._tokens += int(ids[0][-1] - ids[0][0])
        self._trained += int(_int32(batch["trained_tokens"]).sum())

    def facts(self) -> dict[str, Any]:
        """Return the digest and the numbers of rows, tokens and trained tokens."""
        streams = [*self._streams, *([self._weights] if self.has_loss_weights else [])]
        digest = xxhash.xxh3_128(b"".join(stream.digest() for stream in streams)).hexdigest()
        return {"rows": self._rows, "tokens": self._tokens, "trained_tokens": self._trained, "digest": digest}


class TokenTable:
    """The rows of several files that `write_table` wrote, in order; their tokens stay on disk until they are asked for.

    - `lengths`, `trained_tokens`: int32 [rows].
    - `first_trained`: int32 [rows], the first token that is trained.
    - `conversations`: int64 [rows], the number of the row's conversation. Rows of one conversation are adjacent. A pair
      is a conversation of two rows, the chosen one first.
    - `has_system`: bool [rows].
    - `has_loss_weight`: bool [rows], a part of the row has a loss weight other than 1.
    - `digests`, `questions`: 16 bytes [rows], digests of the conversation and of its first user message (in preference
      training: of its instruction, see `digest_instruction`).
    - `source_ends`: int64 [files + 1], the first row of each file, and the number of all rows.
    - `source_names`: the name of each file's source in metrics and reports.
    """

    def __init__(
        self,
        files: Sequence[Path],
        places: Sequence[Sequence[str]],
        loss_weights: Sequence[float] | None = None,
        source_names: Sequence[str] = (),
    ) -> None:
        """Open the tables.

        - `places`: for each table, the names of its source's files, by number: the beginning of a row's place.
        - `loss_weights`: for each table, that of its source; None = 1.
        """
        self.source_names = source_names
        tables = [_open_table(path) for path in files]
        self._places = places
        self._batches = [(source, batch) for source, table in enumerate(tables) for batch in table]
        batches = [batch for _, batch in self._batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
        self._ids = [_offsets_and_values(batch["input_ids"]) for batch in batches]
        self._trained = [_offsets_and_values(batch["trained"]) for batch in batches]
        self.lengths = _concatenate([np.diff(offsets) for offsets, _ in self._ids], np.int32)
        self.first_trained = _concatenate([values[offsets[:-1]] for offsets, values in self._trained], np.int32)
        self.trained_tokens = _concatenate([_int32(batch["trained_tokens"]) for batch in batches], np.int32)
        first = _concatenate([_int32(batch["first_of_conversation"]) for batch in batches], np.int64)
        self.conversations = np.cumsum(first) - 1
        self.digests = _concatenate([_fixed(batch["conversation"]) for batch in batches], np.dtype("S16"))
        self.questions = _concatenate([_fixed(batch["question"]) for batch in batches], np.dtype("S16"))
        systems = [_offsets_and_lists(batch["systems"]) for batch in batches]
        self._system_counts = _concatenate([np.diff(offsets) for offsets, _ in systems], np.int32)
        self._systems = _concatenate([values for _, values in systems], np.dtype("S16"))
        self.has_system = self._system_counts > 0
        rows_of_sources = [sum(batch.num_rows for batch in table) for table in tables]
        self.source_ends = np.cumsum([0, *rows_of_sources])
        factors = loss_weights or [1.0] * len(files)
        self._loss_weights = [
            weights
            for file, table, factor in zip(files, tables, factors, strict=True)
            for weights in _read_weights(file, [len(batch["trained"].values) // 2 for batch in table], factor)
        ]
        counts = [
            np.diff(np.append(0, np.cumsum(weights != 1))[offsets // 2])
            for (offsets, _), weights in zip(self._trained, self._loss_weights, strict=True)
        ]
        self.has_loss_weight = _concatenate(counts, np.int64) > 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def ids(self, row: int) -> NDArray[np.int32]:
        """Return the tokens of a row, a view."""
        batch, number = self._find(row)
        offsets, values = self._ids[batch]
        return values[offsets[number] : offsets[number + 1]]

    def trained(self, row: int) -> NDArray[np.int32]:
        """Return the trained spans of a row: int32 [spans, 2], first token and end (exclusive)."""
        batch, number = self._find(row)
        offsets, values = self._trained[batch]
        return values[offsets[number] : offsets[number + 1]].reshape(-1, 2)

    def loss_weights(self, row: int) -> NDArray[np.float32]:
        """Return the loss weight of each trained span of a row, that of its source included: float32 [spans]."""
        batch, number = self._find(row)
        offsets = self._trained[batch][0] // 2
        return self._loss_weights[batch][offsets[number] : offsets[number + 1]]

    def place(self, row: int) -> str:
        """Return the place of a row: its file and line or row number."""
        batch, number = self._find(row)
        source, columns = self._batches[batch]
        return self._places[source][columns["file"][number].as_py()] + str(columns["place"][number].as_py())

    def source_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of each row's source."""
        return np.searchsorted(self.source_ends, rows, side="right") - 1

    def count_distinct_systems(self, rows: NDArray[np.int64]) -> int:
        """Count the distinct system messages of these rows."""
        mask = np.zeros(len(self), bool)
        mask[rows] = True
        return len(np.unique(self._systems[np.repeat(mask, self._system_counts)]))

    def _find(self, row: int) -> tuple[int, int]:
        batch = bisect_right(self._starts, row) - 1
        return batch, int(row) - self._starts[batch]


def write_table(path: Path, batches: Iterable[pyarrow.RecordBatch]) -> None:
    """Write batches of `make_batch` to a file, one at a time, and loss weights beside it if one isn't 1."""
    weights_file, has_weights = path.with_suffix(_WEIGHTS_FILE), False
    with (
        weights_file.open("wb") as weights,
        pyarrow.OSFile(str(path), "wb") as sink,
        pyarrow.ipc.new_stream(sink, SCHEMA) as stream,
    ):
        for batch in batches:
            weights.write(_span_weights(batch).astype("<f4", copy=False).tobytes())
            has_weights |= has_loss_weights(batch)
            stream.write_batch(batch.select(SCHEMA.names))
    if not has_weights:
        weights_file.unlink()


def _read_weights(table: Path, spans: Sequence[int], factor: float) -> Iterator[NDArray[np.float32]]:
    """Yield the loss weights of a table times `factor`, for each of its batches. `spans`: their trained spans."""
    path, ends = table.with_suffix(_WEIGHTS_FILE), np.cumsum([0, *spans])
    weights: NDArray[np.float32] = np.broadcast_to(np.float32(factor), (int(ends[-1]),))
    if path.exists():
        weights = np.memmap(path, "<f4", "r")
        weights = weights if factor == 1 else weights * np.float32(factor)
    for start, end in pairwise(ends.tolist()):
        yield weights[start:end]


def _open_table(path: Path) -> list[pyarrow.RecordBatch]:
    with pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) as stream:
        return [batch for batch in stream if batch.num_rows]


def _offsets_and_values(column: pyarrow.ListArray, kind: Any = np.int32) -> tuple[NDArray[np.int32], NDArray[Any]]:
    return _int32(column.offsets), _numbers(column.values, kind)


def _offsets_and_lists(column: pyarrow.ListArray) -> tuple[NDArray[np.int32], NDArray[np.bytes_]]:
    return _int32(column.offsets), _fixed(column.values)


def _int32(column: pyarrow.Int32Array) -> NDArray[np.int32]:
    return _numbers(column, np.int32)


def _numbers(column: pyarrow.Array, kind: Any) -> NDArray[Any]:
    """Return a view of the values. (Arrow's own to_numpy imports pandas first.)"""
    return np.frombuffer(column.buffers()[1] or b"", kind)[column.offset : column.offset + len(column)]


def _fixed(column: pyarrow.FixedSizeBinaryArray) -> NDArray[np.bytes_]:
    return np.frombuffer(column.buffers()[1] or b"", "S16")[column.offset : column.offset + len(column)]


def _concatenate(parts: Sequence[NDArray[Any]], kind: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, kind), *parts]).astype(kind, copy=False)
