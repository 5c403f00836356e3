"""The journal of answers: one SQLite file with a row for each answered request, so that nothing is asked twice.

`Journal.add` returns once the row is committed. Whatever a run derives from an answer (the next stage's prompt, a
written row) therefore never refers to an answer that the next start would have to ask for again, with another result. A
killed process loses only answers that arrived but were not committed: a few milliseconds' worth, and never more than
`ConcurrencyLimiter.max_uncommitted`.
"""

import asyncio
import queue
import sqlite3
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from train.errors import UserError
from train.llm.finish_reasons import BELOW_LIMIT, INFERRED
from train.llm.request import Answer, Request

SCHEMA_VERSION = 1
"""Version of the table, in the file's user_version."""

APPLICATION_ID = 0x4A534654
"""`JSFT`, in the file's application_id: no other application's database is written to."""

ANSWERS_PER_COMMIT = 1_000

_SCHEMA = (
    f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
    "CREATE TABLE answers (key BLOB PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL,"
    " text TEXT NOT NULL, finish_reason TEXT NOT NULL, refusal TEXT, prompt_tokens INTEGER,"
    " completion_tokens INTEGER, max_tokens INTEGER NOT NULL, seconds REAL NOT NULL,"
    " asked_at REAL NOT NULL);"
    "COMMIT;"
)
_COLUMNS = (
    "key, stage, model, text, finish_reason, refusal, prompt_tokens, completion_tokens, max_tokens, seconds, asked_at"
)
_FIND = (
    "SELECT text, finish_reason, refusal, prompt_tokens, completion_tokens, seconds, max_tokens FROM answers"
    " WHERE key = ?"
)
_TYPES: tuple[tuple[type, ...], ...] = (
    (str,), (str,), (str, NoneType), (int, NoneType), (int, NoneType), (float,), (int,),
)  # fmt: skip
"""Types of the columns of `_FIND`."""
_HAS_STAGE = (
    "SELECT 1 FROM answers WHERE stage = ? AND model = ? AND (trim(text, char(9, 10, 13, 32)) != ''"
    " OR refusal IS NOT NULL OR finish_reason NOT IN ('stop', '', ?)) LIMIT 1"
)
_READ_FAILED = "answers can't be read from it"
_WRONG_TYPE = sqlite3.DatabaseError("a column holds a value of another type")
"""The error of a damaged record: a flipped bit in its header changes a column's type."""
_WRONG_TYPE.sqlite_errorcode = sqlite3.SQLITE_CORRUPT


class Journal:
    """The answers in one file. Use it in a `with` block; one process at a time.

    Raises UserError if the file is no journal, is in use by another run, or can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{path}: another run is writing to this journal. Wait until it ends, or give this run another one."
            ) from None
        except OSError as error:
            raise UserError(f"{path} can't be used as a journal of answers: {error.strerror}.") from error
        try:
            self._writer = self._open()
            # A second connection reads the WAL while the first commits: the event loop never waits.
            self._reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._inode = path.stat().st_ino
        except BaseException:
            self._lock.release()
            raise
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name=f"journal {path.name}", daemon=True)
        self._thread.start()

    def _open(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            is_new = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
            if not is_new and (application, version) != (APPLICATION_ID, SCHEMA_VERSION):
                raise UserError(f"{self.path} is a database, but no journal of this version: name another file.")
            connection.execute("PRAGMA journal_mode = WAL")
            # A WAL commit survives a killed process without waiting for the disk; a power cut can lose the last
            # commits but damages nothing (sqlite.org/pragma.html#pragma_synchronous).
            connection.execute("PRAGMA synchronous = NORMAL")
            if is_new:
                self._warn_if_rows_exist()
                connection.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise self._user_error(error, "it can't be used as a journal of answers") from error
        return connection

    def find(self, key: bytes, max_tokens: int, *, accept_empty: bool = False) -> Answer | None:
        """Return the answer to a request, if there is one that fits `max_tokens`.

        A complete answer fits if it is not longer. A cut one fits only the same limit: a higher limit gives a longer
        answer, a lower one a shorter. Answers that the server broke off (abort, error) are not returned: earlier
        versions stored them. Empty ones are returned only with `accept_empty`.
        """
        row = self._fetch(_FIND, (key,))
        if row is None:
            return None
        if not all(map(isinstance, row, _TYPES)):
            raise self._user_error(_WRONG_TYPE, _READ_FAILED)
        text, finish_reason, refusal, prompt_tokens, completion_tokens, seconds, limit = row
        answer = Answer(text, finish_reason, refusal, prompt_tokens, completion_tokens, seconds, from_journal=True)
        if answer.finish_class == "error" or (answer.empty and not accept_empty):
            return None
        if limit == max_tokens:
            return answer
        length = limit if answer.completion_tokens is None else answer.completion_tokens
        return answer if not answer.cut and length <= max_tokens else None

    def has_stage(self, stage: str, model: str) -> bool:
        """Return True if `model` ever gave an answer in `stage` that is not empty."""
        return self._fetch(_HAS_STAGE, (stage, model, BELOW_LIMIT)) is not None

    def has_finish_reasons(self, model: str, servers: int) -> bool:
        """Return True if answers of `model` came with the server's own finish_reason.

        Where several servers answered and some answers had none, one of the servers may never give any: False.
        """
        slots = ", ".join("?" * len(INFERRED))
        present = f"SELECT 1 FROM answers WHERE model = ? AND lower(finish_reason) NOT IN ({slots}) LIMIT 1"
        missing = "SELECT 1 FROM answers WHERE model = ? AND finish_reason = ? LIMIT 1"
        return self._fetch(present, (model, *INFERRED)) is not None and (
            servers == 1 or self._fetch(missing, (model, BELOW_LIMIT)) is None
        )

    def seconds(self) -> float | None:
        """Return the time from the first request to the last answer, breaks included; None for an empty journal."""
        row = self._fetch("SELECT min(asked_at), max(asked_at + seconds) FROM answers")
        if row is None or row[0] is None:
            return None
        first, last = row
        if not type(first) is type(last) is float:
            raise self._user_error(_WRONG_TYPE, _READ_FAILED)
        return float(last - first)

    def _fetch(self, query: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """Return the first row of a query's result. Raises UserError if the file can't be read."""
        try:
            row: tuple[Any, ...] | None = self._reader.execute(query, values).fetchone()
        except sqlite3.Error as error:
            raise self._user_error(error, _READ_FAILED) from error
        return row

    async def add(self, key: bytes, model: str, request: Request, answer: Answer) -> None:
        """Store an answer; return once it is committed."""
        row = (
            key,
            request.stage,
            model,
            answer.text,
            answer.finish_reason,
            answer.refusal,
            answer.prompt_tokens,
            answer.completion_tokens,
            request.decoding.max_tokens,
            answer.seconds,
            time.time() - answer.seconds,
        )
        entry = _Entry(row, asyncio.get_running_loop().create_future())
        self._queue.put(entry)
        await entry.committed

    def close(self) -> None:
        """Commit what is queued and close the file."""
        self._queue.put(None)
        self._thread.join()
        self._reader.close()
        self._writer.close()  # closing the last connection merges the WAL into the file
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self) -> None:
        """Commit queued entries in batches: while one commit runs, the next batch gathers."""
        is_open = True
        while is_open:
            entries = [self._queue.get()]
            while len(entries) < ANSWERS_PER_COMMIT and not self._queue.empty():
                entries.append(self._queue.get())
            is_open = None not in entries
            self._commit([entry for entry in entries if entry is not None])

    def _commit(self, entries: list["_Entry"]) -> None:
        if not entries:
            return
        failure: Exception | None = None
        # One statement, and so one transaction, for all: executemany would hand the GIL back and forth with a busy
        # event loop for every row, up to 5 ms each time.
        values = ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"] * len(entries))
        try:
            self._writer.execute(
                f"INSERT OR REPLACE INTO answers ({_COLUMNS}) VALUES {values}",
                [value for entry in entries for value in entry.row],
            )
            if not self._is_in_place():
                failure = UserError(
                    f"{self.path} was deleted or replaced during the run, so answers can no longer be stored. Put it "
                    "back if you have moved it, and start the same command again."
                )
        except sqlite3.Error as error:
            failure = self._user_error(error, "answers can no longer be stored")
        except Exception as error:  # such as a number that SQLite can't hold: report it to the waiting request
            failure = error
        for loop in {entry.committed.get_loop() for entry in entries}:
            futures = [entry.committed for entry in entries if entry.committed.get_loop() is loop]
            if not loop.is_closed():  # as after Ctrl-C
                loop.call_soon_threadsafe(_set_results, futures, failure)

    def _is_in_place(self) -> bool:
        """Return True if the path still names the open file: SQLite keeps writing to a deleted one."""
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def _warn_if_rows_exist(self) -> None:
        """Print a warning if a new journal begins next to rows that are already written."""
        if any(self.path.parent.glob("data/*")):
            print(
                f"warning: {self.path} is empty, though rows are written beside it: everything is asked again, and the "
                "new rows replace them. If that is not intended, stop the run and put the journal back.",
                file=sys.stderr,
                flush=True,
            )

    def _user_error(self, error: sqlite3.Error, failure: str) -> UserError:
        """Return an error of SQLite with its remedy."""
        code = getattr(error, "sqlite_errorcode", None)  # None for a text that is not UTF-8, which would be quoted
        match sqlite3.SQLITE_CORRUPT if code is None else code & 0xFF:
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_MISMATCH | sqlite3.SQLITE_ERROR:
                remedy = (
                    "The file is damaged, or is no journal. The rows written beside it stay unchanged. Move the file "
                    f"away, with {self.path.name}-wal if there is one, and start the same command again: it asks "
                    "everything again and replaces those rows, so copy them if you want to keep them."
                )
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                remedy = (
                    "Another program has locked the file. Close it, and start the same command again: answers stored "
                    "before are safe."
                )
            case _:
                remedy = (
                    "Answers stored before are safe: check free space, the disk, and the permissions of the file and "
                    "its folder, and start the same command again."
                )
        return UserError(f"{self.path}: {failure} ({'a text in it is not UTF-8' if code is None else error}). {remedy}")


@dataclass(frozen=True, slots=True)
class _Entry:
    row: tuple[Any, ...]
    committed: asyncio.Future[None]


def _set_results(futures: list[asyncio.Future[None]], failure: Exception | None) -> None:
    for future in futures:
        if future.done():  # its request was cancelled
            continue
        if failure:
            future.set_exception(failure)
        else:
            future.set_result(None)
