"""Token table: tokenized rows in an Arrow stream, mapped into memory.

A row takes 4 bytes a token and about 8 for each trained span. Places are stored without the file's name, and digests
instead of texts, so the content depends on the rows alone and not on their paths. `datasets.Dataset.from_file` opens
the file too.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import xxhash
from numpy.typing import NDArray

from train.data.loss_mask import EncodedRow
from train.data.sources.formats import Conversation, Message, RowError
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


def make_batch(file: int, rows: Sequence[tuple[Conversation, Sequence[EncodedRow]]]) -> pyarrow.RecordBatch:
    """Return a record batch of `SCHEMA` with the rows of conversations of one file. `file`: its number."""
    items = [
        (conversation, encoded, number == 0) for conversation, parts in rows for number, encoded in enumerate(parts)
    ]
    digests = {id(conversation): _digests(conversation) for conversation, _ in rows}
    columns = {
        "input_ids": _lists([encoded.ids for _, encoded, _ in items]),
        "trained": _lists([encoded.trained.reshape(-1) for _, encoded, _ in items]),
        "trained_tokens": np.fromiter(
            (int((encoded.trained[:, 1] - encoded.trained[:, 0]).sum()) for _, encoded, _ in items),
            np.int32,
            len(items),
        ),
        "first_of_conversation": np.fromiter((first for _, _, first in items), np.int32, len(items)),
        "file": np.full(len(items), file, np.int32),
        "place": [conversation.place for conversation, _, _ in items],
        "conversation": [digests[id(conversation)][0] for conversation, _, _ in items],
        "question": [digests[id(conversation)][1] for conversation, _, _ in items],
        "systems": [digests[id(conversation)][2] for conversation, _, _ in items],
    }
    return pyarrow.record_batch([pyarrow.array(columns[column.name], column.type) for column in SCHEMA], schema=SCHEMA)


def _lists(values: Sequence[NDArray[np.int32]]) -> pyarrow.ListArray:
    ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(ends, np.concatenate([np.empty(0, np.int32), *values]))


def digest_conversation(conversation: Conversation) -> bytes:
    """Return a digest of the messages, tools and template variables of a conversation: 16 bytes."""
    messages = conversation.messages
    extras = [part for part in (conversation.tools, conversation.template_kwargs) if part is not None]
    if not extras and all(message.keys() == _PLAIN_KEYS for message in messages):
        text = "\0".join([text for message in messages for text in (message["role"], message["content"])])
    else:
        text = json.dumps([messages, *extras], ensure_ascii=False, sort_keys=True, default=str)
    return _digest(text)


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
    """Digest of the tokens and trained spans of all rows in order; how they are split into batches doesn't matter."""

    def __init__(self) -> None:
        self._streams = [xxhash.xxh3_128() for _ in range(5)]
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
        self._rows += batch.num_rows
        self._tokens += int(ids[0][-1] - ids[0][0])
        self._trained += int(_int32(batch["trained_tokens"]).sum())

    def facts(self) -> dict[str, Any]:
        """Return the digest and the numbers of rows, tokens and trained tokens."""
        digest = xxhash.xxh3_128(b"".join(stream.digest() for stream in self._streams)).hexdigest()
        return {"rows": self._rows, "tokens": self._tokens, "trained_tokens": self._trained, "digest": digest}


class TokenTable:
    """The rows of several files that `write_table` wrote, in order; their tokens stay on disk until they are asked for.

    - `lengths`, `trained_tokens`: int32 [rows].
    - `first_trained`: int32 [rows], the first token that is trained.
    - `conversations`: int64 [rows], the number of the row's conversation. Rows of one conversation are adjacent.
    - `has_system`: bool [rows].
    - `digests`, `questions`: 16 bytes [rows], digests of the conversation and of its first user message.
    - `source_ends`: int64 [files + 1], the first row of each file, and the number of all rows.
    - `source_names`: the name of each file's source in metrics and reports.
    """

    def __init__(
        self, files: Sequence[Path], places: Sequence[Sequence[str]], source_names: Sequence[str] = ()
    ) -> None:
        """`places`: for each table, the names of its source's files, by number: the beginning of a row's place."""
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
    """Write batches of `SCHEMA` to a file, one at a time."""
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, SCHEMA) as stream:
        for batch in batches:
            stream.write_batch(batch)


def _open_table(path: Path) -> list[pyarrow.RecordBatch]:
    with pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) as stream:
        return [batch for batch in stream if batch.num_rows]


def _offsets_and_values(column: pyarrow.ListArray) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return _int32(column.offsets), _int32(column.values)


def _offsets_and_lists(column: pyarrow.ListArray) -> tuple[NDArray[np.int32], NDArray[np.bytes_]]:
    return _int32(column.offsets), _fixed(column.values)


def _int32(column: pyarrow.Int32Array) -> NDArray[np.int32]:
    """Return a view of the values. (Arrow's own to_numpy imports pandas first.)"""
    return np.frombuffer(column.buffers()[1] or b"", np.int32)[column.offset : column.offset + len(column)]


def _fixed(column: pyarrow.FixedSizeBinaryArray) -> NDArray[np.bytes_]:
    return np.frombuffer(column.buffers()[1] or b"", "S16")[column.offset : column.offset + len(column)]


def _concatenate(parts: Sequence[NDArray[Any]], kind: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, kind), *parts]).astype(kind, copy=False)
