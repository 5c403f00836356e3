"""The journal of answers: one SQLite file, a row for each request that was answered; nothing is asked twice.

An answer is handed out only once its row is committed. What a run builds on an answer (the next stage's prompt, a
written row) can therefore never name an answer that the next start doesn't find, and asks for anew and gets
otherwise. A killed process loses only what the server had sent and the journal had not yet committed: some
milliseconds' worth, and never more than the client allows (`ConcurrencyLimiter.max_uncommitted`).
"""

import asyncio
import hashlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from train.errors import UserError
from train.llm.finish_reasons import BELOW_LIMIT, INFERRED, Ending, classify_finish_reason, describe_unfinished
from train.llm.journal_errors import READING, WRONG_TYPE, are_of_the_columns, explained, warn_of_empty

LAYOUT = 1
"""The layout of the table, in the file's user_version."""

APPLICATION = 0x4A534654
"""`JSFT`, in the file's application_id, so that no one else's database is written to."""

ANSWERS_A_COMMIT = 1_000

NO_LIMIT = 2**63 - 1
"""The token limit of a request without one: what a limit cut before is asked again."""

COLUMNS = (
    "key, stage, model, text, finish_reason, refusal, prompt_tokens, completion_tokens, max_tokens, seconds, asked_at"
)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is drawn, in the names of the OpenAI API.

    What is None or empty is not sent, so the server's own default holds. `extra` goes into the request as it stands
    (top_k, min_p, chat_template_kwargs and what else a server knows). `limit_name`: the field of the token limit; None
    = no limit is sent. Under the name max_tokens a server that refuses it gets the name that it asks for.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    limit_name: str | None = "max_tokens"

    @classmethod
    def from_settings(
        cls,
        max_tokens: int,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Return the decoding of a stage's settings. A null in `extra` takes its field out of the request, and a
        `max_completion_tokens` there takes the place of `max_tokens`.
        """
        own = {"temperature": temperature, "top_p": top_p, "seed": seed}
        own |= dict.fromkeys(name for name in own if name in extra)
        rest = {name: value for name, value in extra.items() if value is not None}
        limit = rest.pop("max_completion_tokens", None)
        limit_name: str | None = "max_completion_tokens"
        if limit is None:
            limit, limit_name = (NO_LIMIT, None) if "max_tokens" in extra else (max_tokens, "max_tokens")
        return cls(limit, **own, extra=rest, limit_name=limit_name)  # type: ignore[arg-type]

    def parameters(self, sample: int) -> dict[str, Any]:
        """What stands in a request beside model, messages and the token limit. Each sample has a seed of its own."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": None if self.seed is None else self.seed + sample,
            "stop": list(self.stop) or None,
        }
        return {name: value for name, value in given.items() if value is not None} | dict(self.extra)


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to ask. `sample` tells apart several answers to the same messages: 1 is a second try, and so on."""

    stage: str
    messages: Sequence[Mapping[str, Any]]
    decoding: Decoding
    sample: int = 0

    def key(self, model: str) -> bytes:
        """What the journal knows the request by: stage, model, messages and decoding, without the token limit.

        The messages hold the prompt itself, so a reworded prompt is another request and needs no version here.
        The limit stands beside the answer instead (see `Journal.find`): to raise it asks again what was cut, and
        that alone.
        """
        parameters = self.decoding.parameters(self.sample)
        told_apart = [LAYOUT, self.stage, model, self.sample, parameters, [dict(message) for message in self.messages]]
        return hashlib.blake2b(json.dumps(told_apart, sort_keys=True).encode(), digest_size=20).digest()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, as the server told it. Tokens are None where the server doesn't count them."""

    text: str
    finish_reason: str
    refusal: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    """From the request that was answered to its answer: without the tries and pauses before."""
    from_journal: bool = False
    reasoning_in: str = ""
    """The field that held reasoning beside the text (reasoning_content, ...). The journal does not keep it."""
    ignored_part: str = ""
    """The type of a part beside the text that can't be read as text. The journal does not keep it."""
    only_reasoning: bool = False
    """Its text was reasoning that never ended, so it holds no answer (set by `train.llm.reasoning.answer.read_answer`)."""

    @property
    def ending(self) -> Ending:
        """The class of its finish reason."""
        return classify_finish_reason(self.finish_reason)

    @property
    def detail(self) -> str:
        """Its text, or the reason that it has none, for the reports."""
        nothing = "its reasoning has no end, " if self.only_reasoning else ""
        return self.refusal or self.text or f"{nothing}finish_reason {self.finish_reason or 'missing'}"

    @property
    def cut(self) -> bool:
        """Whether the token limit ended it."""
        return self.ending == "cut"

    @property
    def refused(self) -> bool:
        """Whether the server withheld it (a content filter) or the model's refusal came marked as one."""
        return bool(self.refusal) or self.ending == "refused"

    @property
    def empty(self) -> bool:
        """True for an answer without text that nothing cut or withheld, and that calls no tool."""
        return self.blank and not self.refusal and self.ending in ("complete", "unknown", "unstated")

    @property
    def blank(self) -> bool:
        """True for a text of blanks and invisible characters (U+200B, U+FEFF) alone."""
        return not any(letter.isprintable() and not letter.isspace() for letter in self.text)

    @property
    def unfinished(self) -> str:
        """The reason that it is not a complete answer, in the words of the reports; empty for a complete one."""
        if self.refused:
            return "refused"
        if self.ending != "complete":
            return describe_unfinished(self.finish_reason)
        if self.only_reasoning:
            return "without an end to its reasoning"
        if not self.blank:
            return ""
        return f"empty, all of it in {self.reasoning_in}" if self.reasoning_in else "empty"


class Journal:
    """The answers in one file. Use it in a `with` block; one process at a time.

    Raises UserError where the file is no journal, is in use by another run, or can't be written.
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
            # A second connection, as a WAL lets it read while the first commits: the event loop never waits.
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
            layout = connection.execute("PRAGMA user_version").fetchone()[0]
            is_new = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
            if not is_new and (application, layout) != (APPLICATION, LAYOUT):
                raise UserError(f"{self.path} is a database, but no journal of this version: name another file.")
            connection.execute("PRAGMA journal_mode = WAL")
            # A commit of a WAL is safe from a killed process without waiting for the disk, and a power cut can lose
            # the last of them but break nothing (sqlite.org/pragma.html#pragma_synchronous).
            connection.execute("PRAGMA synchronous = NORMAL")
            if is_new:
                warn_of_empty(self.path)
                connection.executescript(
                    f"BEGIN; PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {LAYOUT};"
                    "CREATE TABLE answers (key BLOB PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL,"
                    " text TEXT NOT NULL, finish_reason TEXT NOT NULL, refusal TEXT, prompt_tokens INTEGER,"
                    " completion_tokens INTEGER, max_tokens INTEGER NOT NULL, seconds REAL NOT NULL,"
                    " asked_at REAL NOT NULL);"
                    "COMMIT;"
                )
        except sqlite3.Error as error:
            raise explained(self.path, error, "it can't be used as a journal of answers") from error
        return connection

    def find(self, key: bytes, max_tokens: int, *, accept_empty: bool = False) -> Answer | None:
        """Return the answer to a request, if it was given and is what `max_tokens` would have let through.

        An answer that came to its own end within the limit is. One that was cut counts for the very limit that cut
        it: under a higher one there is more to hear, under a lower one it is too long. One that the server broke off
        (abort, error) is not returned: earlier versions kept those. Nor is an empty one unless `accept_empty`.
        """
        found = self._first(
            "SELECT text, finish_reason, refusal, prompt_tokens, completion_tokens, seconds, max_tokens"
            " FROM answers WHERE key = ?",
            (key,),
        )
        if found is None:
            return None
        text, finish_reason, refusal, prompt_tokens, completion_tokens, seconds, limit = found
        if not are_of_the_columns(*found):
            raise explained(self.path, WRONG_TYPE, READING)
        answer = Answer(text, finish_reason, refusal, prompt_tokens, completion_tokens, seconds, from_journal=True)
        if answer.ending == "fault" or (answer.empty and not accept_empty):
            return None
        if limit == max_tokens:
            return answer
        length = limit if answer.completion_tokens is None else answer.completion_tokens
        return answer if not answer.cut and length <= max_tokens else None

    def has_stage(self, stage: str, model: str) -> bool:
        """Return whether `model` ever answered anything in `stage`. Empty answers, which are kept too, don't count."""
        query = (
            "SELECT 1 FROM answers WHERE stage = ? AND model = ?"
            " AND (trim(text, char(9, 10, 13, 32)) != '' OR refusal IS NOT NULL"
            " OR finish_reason NOT IN ('stop', '', ?)) LIMIT 1"
        )
        return self._first(query, (stage, model, BELOW_LIMIT)) is not None

    def has_finish_reasons(self, model: str, servers: int) -> bool:
        """Return whether answers of `model` came with a finish_reason of the server's own.

        Where several servers answered and some of the answers had none, one of the servers may never give any.
        """
        places = ", ".join("?" * len(INFERRED))
        given = f"SELECT 1 FROM answers WHERE model = ? AND lower(finish_reason) NOT IN ({places}) LIMIT 1"
        missing = "SELECT 1 FROM answers WHERE model = ? AND finish_reason = ? LIMIT 1"
        return self._first(given, (model, *INFERRED)) is not None and (
            servers == 1 or self._first(missing, (model, BELOW_LIMIT)) is None
        )

    def seconds(self) -> float | None:
        """From the first request to the last answer of all that stands here, breaks included; None if nothing does."""
        found = self._first("SELECT min(asked_at), max(asked_at + seconds) FROM answers")
        if found is None or found[0] is None:
            return None
        first, last = found
        if not type(first) is type(last) is float:
            raise explained(self.path, WRONG_TYPE, READING)
        return float(last - first)

    def _first(self, query: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """Return the first row of a query's result. Raises UserError where the file can't be read."""
        try:
            row: tuple[Any, ...] | None = self._reader.execute(query, values).fetchone()
        except sqlite3.Error as error:
            raise explained(self.path, error, READING) from error
        return row

    async def add(self, key: bytes, model: str, request: Request, answer: Answer) -> None:
        """Write an answer down; returns when a killed process would no longer lose it."""
        loop = asyncio.get_running_loop()
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
        entry = _Entry(row, loop.create_future())
        self._queue.put(entry)
        await entry.committed

    def close(self) -> None:
        """Commit what is left and close the file."""
        self._queue.put(None)
        self._thread.join()
        self._reader.close()
        self._writer.close()  # the last to leave folds the WAL into the file
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self) -> None:
        """Commit whatever has gathered, again and again: while one commit runs, the next one's rows come in."""
        open_for_more = True
        while open_for_more:
            entries = [self._queue.get()]
            while len(entries) < ANSWERS_A_COMMIT and not self._queue.empty():
                entries.append(self._queue.get())
            open_for_more = None not in entries
            self._commit([entry for entry in entries if entry is not None])

    def _commit(self, entries: list["_Entry"]) -> None:
        if not entries:
            return
        failure: Exception | None = None
        # One statement, and so one transaction, for all: executemany would hand Python's global lock to and fro with
        # the event loop for every row, and wait for it up to 5 ms each time while that one is busy.
        values = ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"] * len(entries))
        try:
            self._writer.execute(
                f"INSERT OR REPLACE INTO answers ({COLUMNS}) VALUES {values}",
                [value for entry in entries for value in entry.row],
            )
            if not self._is_there():
                failure = UserError(
                    f"{self.path} was deleted or replaced during the run, so answers can no longer be written down. "
                    "Put it back if you have moved it, and start the same command again."
                )
        except sqlite3.Error as error:
            failure = explained(self.path, error, "answers can no longer be written down")
        except Exception as error:  # a number that SQLite can't hold: who waits for the answer must hear of it
            failure = error
        for loop in {entry.committed.get_loop() for entry in entries}:
            settled = [entry.committed for entry in entries if entry.committed.get_loop() is loop]
            # A loop that was closed over waiting requests (Ctrl-C) needs no news.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, settled, failure)

    def _is_there(self) -> bool:
        """Return whether the path still names the open file: SQLite goes on writing to one that is deleted."""
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class _Entry:
    row: tuple[Any, ...]
    committed: asyncio.Future[None]


def _settle(futures: list[asyncio.Future[None]], failure: Exception | None) -> None:
    for future in futures:
        if future.done():  # whoever asked was cancelled meanwhile
            continue
        if failure:
            future.set_exception(failure)
        else:
            future.set_result(None)
