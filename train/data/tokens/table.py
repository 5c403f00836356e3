"""Tokenized rows on disk: an Arrow stream, mapped into memory, 4 bytes a token and about 8 for the mask of a turn.

Places are kept without the file's name, digests in the place of texts: what is stored depends on what rows say, not on
where they stood. `datasets.Dataset.from_file` opens the file too.
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
from train.data.sources.unread_text import Unread, lost_text

_DIGEST = pyarrow.binary(16)
SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "trained": pyarrow.list_(pyarrow.int32()),  # first token of a span, the one behind its last, and so on
        "trained_tokens": pyarrow.int32(),
        "first_of_conversation": pyarrow.int32(),  # 0 or 1
        "file": pyarrow.int32(),
        "place": pyarrow.string(),
        "conversation": _DIGEST,
        "question": _DIGEST,
        "systems": pyarrow.list_(_DIGEST),
    }
)
_PLAIN = {"role", "content"}
_EXAMPLES = 3
_SHOWN = 60


@dataclass(slots=True)
class RowIssues:
    """Rows that can't be trained as they are.

    `kinds`: for each kind of fault how many, and (file, place, detail) of the first. `escaped`: rows that are trained
    with the control tokens typed in their text broken up. `unread`: for each column or key of a message that nothing
    reads how many rows have it, how many of them lose content with it, and (file, place, text) of the first of those.
    """

    kinds: dict[str, tuple[int, list[tuple[int, str, str]]]] = field(default_factory=dict)
    escaped: int = 0
    unread: dict[str, tuple[int, int, tuple[int, str, str] | None]] = field(default_factory=dict)

    def add(self, fault: RowError, file: int, place: str) -> None:
        """Count one more."""
        self.merge(RowIssues({fault.kind: (1, [(file, place, fault.detail)])}))

    def add_unread(self, unread: Unread, messages: Sequence[Message], file: int, place: str) -> None:
        """Count what was not read of one more row, which became these messages."""
        said = [text for message in messages for key in ("content", "reasoning_content") if (text := message.get(key))]
        for name, values in unread.items():
            text = lost_text(name, values, said)
            name = _printable(name)
            rows, losing, example = self.unread.get(name, (0, 0, None))
            if text is not None and example is None:
                example = (file, place, _printable(text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")))
            self.unread[name] = (rows + 1, losing + (text is not None), example)

    def merge(self, others: "RowIssues") -> None:
        """Count those that come after these."""
        self.escaped += others.escaped
        for name, (rows, losing, example) in others.unread.items():
            rows_before, losing_before, example_before = self.unread.get(name, (0, 0, None))
            self.unread[name] = (rows_before + rows, losing_before + losing, example_before or example)
        for kind, (count, examples) in others.kinds.items():
            before, first = self.kinds.get(kind, (0, []))
            self.kinds[kind] = before + count, [*first, *examples][:_EXAMPLES]


def _printable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which no file takes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def batch_of(file: int, rows: Sequence[tuple[Conversation, Sequence[EncodedRow]]]) -> pyarrow.RecordBatch:
    """Conversations of one file, each with its encoded rows, as they are stored."""
    each = [
        (conversation, encoded, number == 0) for conversation, parts in rows for number, encoded in enumerate(parts)
    ]
    digests = {id(conversation): _digests(conversation) for conversation, _ in rows}
    columns = {
        "input_ids": _lists([encoded.ids for _, encoded, _ in each]),
        "trained": _lists([encoded.trained.reshape(-1) for _, encoded, _ in each]),
        "trained_tokens": np.fromiter(
            (int((encoded.trained[:, 1] - encoded.trained[:, 0]).sum()) for _, encoded, _ in each), np.int32, len(each)
        ),
        "first_of_conversation": np.fromiter((first for _, _, first in each), np.int32, len(each)),
        "file": np.full(len(each), file, np.int32),
        "place": [conversation.place for conversation, _, _ in each],
        "conversation": [digests[id(conversation)][0] for conversation, _, _ in each],
        "question": [digests[id(conversation)][1] for conversation, _, _ in each],
        "systems": [digests[id(conversation)][2] for conversation, _, _ in each],
    }
    return pyarrow.record_batch([pyarrow.array(columns[column.name], column.type) for column in SCHEMA], schema=SCHEMA)


def _lists(values: Sequence[NDArray[np.int32]]) -> pyarrow.ListArray:
    ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(ends, np.concatenate([np.empty(0, np.int32), *values]))


def _digests(conversation: Conversation) -> tuple[bytes, bytes, list[bytes]]:
    """Of all that is said, of the first user message (white space aside), and of each system message."""
    messages = conversation.messages
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    beside = [part for part in (conversation.tools, conversation.template_kwargs) if part is not None]
    if not beside and all(message.keys() == _PLAIN for message in messages):
        whole = "\0".join([text for message in messages for text in (message["role"], message["content"])])
    else:
        whole = json.dumps([messages, *beside], ensure_ascii=False, sort_keys=True, default=str)
    return (
        _digest(whole),
        _digest(" ".join(first["content"].split())),
        [_digest(message["content"]) for message in messages if message["role"] == "system"],
    )


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


class TokensDigest:
    """A digest of tokens and trained spans: of all rows in their order, however they come in batches and files.

    `facts`: it, and the numbers of rows, tokens and trained tokens.
    """

    def __init__(self) -> None:
        self._streams = [xxhash.xxh3_128() for _ in range(5)]
        self._rows = self._tokens = self._trained = 0

    def add(self, batch: pyarrow.RecordBatch) -> None:
        """Take in the rows that follow."""
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
        """Return them as JSON has them."""
        digest = xxhash.xxh3_128(b"".join(stream.digest() for stream in self._streams)).hexdigest()
        return {"rows": self._rows, "tokens": self._tokens, "trained_tokens": self._trained, "digest": digest}


class TokenRows:
    """The rows of some files that `write` wrote, one after the other; their tokens stay on disk until they are asked.

    `lengths`, `trained_tokens`: int32 [rows]. `first_trained`: int32 [rows], the first token that is learnt.
    `conversations`: int64 [rows], to which conversation of all files each row belongs; those of one stand together.
    `has_system`: bool [rows]. `digests`, `questions`: bytes of 16 [rows], of what is said and of what is first asked.
    """

    def __init__(self, files: Sequence[Path], places: Sequence[Sequence[str]]) -> None:
        """`places`: for each of the files what the places of its rows begin with, by number."""
        tables = [_opened(path) for path in files]
        self._places = places
        self._batches = [(source, batch) for source, table in enumerate(tables) for batch in table]
        batches = [batch for _, batch in self._batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
        self._ids = [_offsets_and_values(batch["input_ids"]) for batch in batches]
        self._trained = [_offsets_and_values(batch["trained"]) for batch in batches]
        self.lengths = _joined([np.diff(offsets) for offsets, _ in self._ids], np.int32)
        self.first_trained = _joined([values[offsets[:-1]] for offsets, values in self._trained], np.int32)
        self.trained_tokens = _joined([_int32(batch["trained_tokens"]) for batch in batches], np.int32)
        first = _joined([_int32(batch["first_of_conversation"]) for batch in batches], np.int64)
        self.conversations = np.cumsum(first) - 1
        self.digests = _joined([_fixed(batch["conversation"]) for batch in batches], np.dtype("S16"))
        self.questions = _joined([_fixed(batch["question"]) for batch in batches], np.dtype("S16"))
        systems = [_offsets_and_lists(batch["systems"]) for batch in batches]
        self._system_counts = _joined([np.diff(offsets) for offsets, _ in systems], np.int32)
        self._systems = _joined([values for _, values in systems], np.dtype("S16"))
        self.has_system = self._system_counts > 0
        rows_of_sources = [sum(batch.num_rows for batch in table) for table in tables]
        self.source_ends = np.cumsum([0, *rows_of_sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def ids(self, row: int) -> NDArray[np.int32]:
        """The tokens of a row; not a copy."""
        batch, number = self._find(row)
        offsets, values = self._ids[batch]
        return values[offsets[number] : offsets[number + 1]]

    def trained(self, row: int) -> NDArray[np.int32]:
        """The spans of a row's tokens that are learnt, shape (spans, 2)."""
        batch, number = self._find(row)
        offsets, values = self._trained[batch]
        return values[offsets[number] : offsets[number + 1]].reshape(-1, 2)

    def place(self, row: int) -> str:
        """Where the row stood, in words."""
        batch, number = self._find(row)
        source, columns = self._batches[batch]
        return self._places[source][columns["file"][number].as_py()] + str(columns["place"][number].as_py())

    def distinct_systems(self, rows: NDArray[np.int64]) -> int:
        """How many different system messages these rows have."""
        wanted = np.zeros(len(self), bool)
        wanted[rows] = True
        return len(np.unique(self._systems[np.repeat(wanted, self._system_counts)]))

    def _find(self, row: int) -> tuple[int, int]:
        batch = bisect_right(self._starts, row) - 1
        return batch, int(row) - self._starts[batch]


def write(path: Path, batches: Iterable[pyarrow.RecordBatch]) -> None:
    """Write the batches as they come."""
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, SCHEMA) as stream:
        for batch in batches:
            stream.write_batch(batch)


def _opened(path: Path) -> list[pyarrow.RecordBatch]:
    with pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) as stream:
        return [batch for batch in stream if batch.num_rows]


def _offsets_and_values(column: pyarrow.ListArray) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return _int32(column.offsets), _int32(column.values)


def _offsets_and_lists(column: pyarrow.ListArray) -> tuple[NDArray[np.int32], NDArray[np.bytes_]]:
    return _int32(column.offsets), _fixed(column.values)


def _int32(column: pyarrow.Int32Array) -> NDArray[np.int32]:
    """Not a copy. (Arrow's own to_numpy imports pandas first.)"""
    return np.frombuffer(column.buffers()[1] or b"", np.int32)[column.offset : column.offset + len(column)]


def _fixed(column: pyarrow.FixedSizeBinaryArray) -> NDArray[np.bytes_]:
    return np.frombuffer(column.buffers()[1] or b"", "S16")[column.offset : column.offset + len(column)]


def _joined(parts: Sequence[NDArray[Any]], kind: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, kind), *parts]).astype(kind, copy=False)
