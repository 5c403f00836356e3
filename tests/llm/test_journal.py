"""The journal of answers: keys of requests, token limits, and the content of the file."""

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from train.errors import UserError
from train.llm.journal import Journal
from train.llm.request import Answer, Decoding, Request

REQUEST = Request(
    "generate",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    Decoding(max_tokens=100, temperature=0.7, top_p=0.9, seed=3, stop=("\n",), extra={"top_k": 5}),
)
ANSWER = Answer("Because.", "stop", None, 12, 2, 0.25)


def decoding(**changes: Any) -> Request:
    return replace(REQUEST, decoding=replace(REQUEST.decoding, **changes))


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, stage="verify"),
        replace(REQUEST, sample=1),
        replace(REQUEST, messages=[*REQUEST.messages, {"role": "assistant", "content": ""}]),
        replace(REQUEST, messages=list(reversed(REQUEST.messages))),
        decoding(temperature=0.8),
        decoding(temperature=None),
        decoding(top_p=1.0),
        decoding(seed=4),
        decoding(stop=()),
        decoding(extra={"top_k": 6}),
    ],
)
def test_any_difference_makes_another_request(other: Request) -> None:
    assert other.key("m") != REQUEST.key("m")


def test_another_model_is_another_request() -> None:
    assert REQUEST.key("m") != REQUEST.key("n")


def test_key_order_and_token_limit_make_no_difference() -> None:
    swapped = replace(REQUEST, messages=[dict(reversed(list(message.items()))) for message in REQUEST.messages])
    assert swapped.key("m") == REQUEST.key("m")
    assert decoding(max_tokens=5).key("m") == REQUEST.key("m")


def test_each_sample_has_a_seed_of_its_own() -> None:
    assert [REQUEST.decoding.parameters(sample)["seed"] for sample in range(3)] == [3, 4, 5]
    assert "seed" not in Decoding(max_tokens=1).parameters(0)


async def put(journal: Journal, answer: Answer, request: Request = REQUEST) -> None:
    await journal.add(request.key("m"), "m", request, answer)


@pytest.mark.parametrize(
    ("answer", "limit", "is_stored"),
    [
        (ANSWER, 100, True),
        (ANSWER, 2, True),
        (ANSWER, 1, False),  # it would have been cut
        (ANSWER, 5_000, True),
        (replace(ANSWER, completion_tokens=None), 5_000, True),
        (replace(ANSWER, completion_tokens=None), 99, False),  # it may have been cut
        (replace(ANSWER, finish_reason="length", completion_tokens=100), 100, True),
        (replace(ANSWER, finish_reason="length", completion_tokens=100), 101, False),
        (replace(ANSWER, finish_reason="length", completion_tokens=100), 99, False),
    ],
)
def test_a_higher_limit_asks_again_only_for_cut_answers(
    tmp_path: Path, answer: Answer, limit: int, is_stored: bool
) -> None:
    with Journal(tmp_path / "answers.sqlite") as journal:
        asyncio.run(put(journal, answer))
        result = journal.find(REQUEST.key("m"), limit)
    assert result == (replace(answer, from_journal=True) if is_stored else None)


@pytest.mark.parametrize("text", ["", "\0a\0", "𝔘 é 漢 \u2028", "x" * 3_000_000, "'); DROP TABLE answers; --"])
def test_any_text_is_read_back_unchanged(tmp_path: Path, text: str) -> None:
    with Journal(tmp_path / "answers.sqlite") as journal:
        asyncio.run(put(journal, replace(ANSWER, text=text, refusal=text)))
    with Journal(tmp_path / "answers.sqlite") as journal:
        result = journal.find(REQUEST.key("m"), 100, accept_empty=True)
    assert result == replace(ANSWER, text=text, refusal=text, from_journal=True)


def test_queued_answers_are_written_when_the_journal_closes(tmp_path: Path) -> None:
    requests = [replace(REQUEST, sample=sample) for sample in range(3_000)]

    async def leave_at_once(journal: Journal) -> None:
        for request in requests:
            asyncio.get_running_loop().create_task(put(journal, ANSWER, request))
        await asyncio.sleep(0)  # each has queued its row, and none is committed

    with Journal(tmp_path / "answers.sqlite") as journal:
        asyncio.run(leave_at_once(journal))
    with Journal(tmp_path / "answers.sqlite") as journal:
        assert all(journal.find(request.key("m"), 100) for request in requests)
    assert not (tmp_path / "answers.sqlite-wal").exists()


def test_a_stage_exists_once_it_has_an_answer(tmp_path: Path) -> None:
    with Journal(tmp_path / "answers.sqlite") as journal:
        asyncio.run(put(journal, ANSWER))
        assert [journal.has_stage(*pair) for pair in (("generate", "m"), ("verify", "m"), ("generate", "n"))] == [
            True,
            False,
            False,
        ]


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "answers.sqlite"), pytest.raises(UserError, match="another run is writing"):
        Journal(tmp_path / "answers.sqlite")
    Journal(tmp_path / "answers.sqlite").close()


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    text, database = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("dear diary, " * 100)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    before = database.read_bytes()
    with pytest.raises(UserError, match="can't be used as a journal"):
        Journal(text)
    with pytest.raises(UserError, match="no journal of this version"):
        Journal(database)
    assert text.read_text() == "dear diary, " * 100
    assert database.read_bytes() == before


def test_a_full_disk_ends_the_run_and_keeps_stored_answers(tmp_path: Path) -> None:
    errors: list[str] = []

    async def fill(journal: Journal) -> int:
        for number in range(1_000):
            try:
                await put(journal, replace(ANSWER, text="x" * 5_000), replace(REQUEST, sample=number))
            except UserError as error:
                errors.append(str(error))
                return number
        raise AssertionError("the disk never filled up")

    with Journal(tmp_path / "answers.sqlite") as journal:
        journal._writer.execute("PRAGMA max_page_count = 40")  # SQLite's simulation of a full disk
        written = asyncio.run(fill(journal))
        assert "can no longer be stored" in errors[0]
        assert written > 0
        assert all(journal.find(replace(REQUEST, sample=number).key("m"), 100) for number in range(written))
