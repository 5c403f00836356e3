"""Journals that are damaged, locked, deleted or no files: one error each, with the file and the remedy."""

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from train.errors import UserError
from train.llm.journal import Journal
from train.llm.request import Answer, Decoding, Request

REQUESTS = [Request("generate", [{"role": "user", "content": "Why?"}], Decoding(100), number) for number in range(200)]
PAGE = 4096


def answer(number: int) -> Answer:
    return Answer(f"because of {number}, " * 20, "stop", None, 7, 40, 0.5)


def ask_and_add(path: Path) -> dict[int, str]:
    """Ask like a run, one request after another; return the journal's answers. Raises UserError."""

    async def work(journal: Journal) -> dict[int, str]:
        texts = {}
        for number, request in enumerate(REQUESTS):
            if stored := journal.find(request.key("m"), 100):
                texts[number] = stored.text
            else:
                await journal.add(request.key("m"), "m", request, answer(number))
        journal.has_stage("generate", "m")
        journal.seconds()
        return texts

    with Journal(path) as journal:
        return asyncio.run(work(journal))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("intact") / "answers.sqlite"
    ask_and_add(path)
    return path.read_bytes()


def zeros(data: bytearray, page: int) -> None:
    data[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)


def half_of_it(data: bytearray, page: int) -> None:
    data[page * PAGE : page * PAGE + PAGE // 2] = bytes(PAGE // 2)


def noise(data: bytearray, page: int) -> None:
    data[page * PAGE + 1000 : page * PAGE + 1200] = random.Random(page).randbytes(200)


def cut(data: bytearray, page: int) -> None:
    del data[page * PAGE + 7 :]


@pytest.mark.parametrize("damage", [zeros, half_of_it, noise, cut])
def test_a_damaged_page_is_one_error_with_file_and_remedy(
    tmp_path: Path, intact: bytes, damage: Callable[[bytearray, int], None]
) -> None:
    """For any page a run gets correct answers or that error: no traceback, and no other text."""
    errors = []
    for page in range(0, len(intact) // PAGE, 3):
        path = tmp_path / f"{page}.sqlite"
        data = bytearray(intact)
        damage(data, page)
        path.write_bytes(data)
        try:
            texts = ask_and_add(path)
        except UserError as failure:
            errors.append((path, str(failure)))
        else:
            assert all(text == answer(number).text for number, text in texts.items())
    assert errors
    for path, message in errors:
        assert message.startswith(f"{path}: ")
        assert "The file is damaged, or is no journal." in message
        assert "Move the file away" in message
        assert message.isprintable()


def test_a_damaged_wal_loses_only_the_last_answers(tmp_path: Path, intact: bytes) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_bytes(intact)
    (tmp_path / "answers.sqlite-wal").write_bytes(random.Random(1).randbytes(50_000))
    (tmp_path / "answers.sqlite-shm").write_bytes(b"\xff" * 32_768)
    assert ask_and_add(path) == {number: answer(number).text for number in range(200)}


@pytest.mark.parametrize(
    "change",
    [
        "text = cast('abc' as blob)",
        "finish_reason = cast('stop' as blob)",
        "refusal = cast('no' as blob)",
        "completion_tokens = 'abc'",
        "prompt_tokens = 1.5",
        "max_tokens = 'y'",
        "seconds = 'x'",
        "asked_at = 'x'",
    ],
)
def test_a_flipped_bit_that_changes_a_type_is_the_same_error(tmp_path: Path, intact: bytes, change: str) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_bytes(intact)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute(f"UPDATE answers SET {change}")
    with pytest.raises(UserError, match=r"answers.sqlite: .*another type\). The file is damaged, or is no journal."):
        ask_and_add(path)


@pytest.mark.parametrize("emptied", [True, False])
def test_an_empty_journal_beside_rows_gives_a_warning(
    tmp_path: Path, intact: bytes, emptied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"" if emptied else intact)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}\n")
    ask_and_add(path)
    warning = capsys.readouterr().err
    assert (
        warning.startswith(f"warning: {path} is empty, though rows are written beside it") if emptied else not warning
    )


def test_a_folder_in_place_of_the_journal_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").mkdir()
    with pytest.raises(UserError, match=r"answers.sqlite: it can't be used as a journal of answers \(unable to open"):
        Journal(tmp_path / "answers.sqlite")


@pytest.mark.parametrize("when", ["at the start", "while it is written"])
def test_a_lock_by_another_program_is_an_error(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.sqlite"
    ask_and_add(path)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *of, **more: connect(*of, **more, timeout=0.01))
    other = connect(path, isolation_level=None)
    if when == "at the start":
        other.execute("PRAGMA journal_mode = DELETE")  # readers of a WAL can't be locked out
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="Another program has locked the file"):
            Journal(path)
    else:
        with Journal(path) as journal:
            other.execute("BEGIN IMMEDIATE")
            late = replace(REQUESTS[0], stage="late")
            with pytest.raises(UserError, match=r"answers can no longer be stored .* has locked the file"):
                asyncio.run(journal.add(late.key("m"), "m", late, answer(0)))
            assert journal.find(REQUESTS[0].key("m"), 100)
            other.execute("ROLLBACK")
    other.close()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_journal_deleted_during_the_run_ends_it(tmp_path: Path, is_replaced: bool) -> None:
    path = tmp_path / "answers.sqlite"
    with Journal(path) as journal:
        path.unlink()
        if is_replaced:
            path.write_bytes(b"")
        with pytest.raises(UserError, match=r"answers.sqlite was deleted or replaced during the run"):
            asyncio.run(journal.add(REQUESTS[0].key("m"), "m", REQUESTS[0], answer(0)))


def test_a_value_that_cannot_be_stored_raises_in_the_waiting_request(tmp_path: Path) -> None:
    with Journal(tmp_path / "answers.sqlite") as journal:
        big = replace(answer(0), completion_tokens=10**30)  # more than SQLite's 64 bits
        with pytest.raises(OverflowError):
            asyncio.run(journal.add(REQUESTS[0].key("m"), "m", REQUESTS[0], big))
        asyncio.run(journal.add(REQUESTS[1].key("m"), "m", REQUESTS[1], answer(1)))  # and it continues
