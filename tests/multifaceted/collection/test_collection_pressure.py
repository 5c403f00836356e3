"""The collection's rows under pressure: rows, counts and pairs against a plain loop over the requests, and kills."""

import json
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from collection_runs import (
    check_same_rows,
    configuration,
    run_file,
    run_to_the_end,
    run_with,
    stage_of,
    write_rows,
    written,
)
from killed_processes import after_a_moment, kill_at_requests, killed_afterwards
from pressured_answers import Log, question
from scripted_author import SEED, asked_for, description, message, number_in, preference, set_in
from scripted_server import Asked, Reply, Script, error, said, served

from train.data.sources.source import read_conversations
from train.multifaceted.collection.config import load_config
from train.multifaceted.collection.hierarchy import PreferencePlan, load_hierarchy
from train.multifaceted.collection.run import run
from train.recipe import Source

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train.multifaceted.collection.run"])

SETS = 2


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": question(number)} for number in range(count)]


def author(log: Log, count: int) -> Script:
    """Return a script that writes messages without errors, and answers by the log."""
    plan = PreferencePlan(load_hierarchy(), SETS, 42)
    set_of = {
        (number, (draw.sub.dimension, draw.sub.name)): which
        for number in range(count)
        for which, planned in enumerate(plan.sets_of(number))
        for draw in planned
    }

    async def script(asked: Asked) -> Reply:
        prompt, stage = asked.prompt, stage_of(asked)
        if stage == "propose":
            number, wanted = number_in(prompt), asked_for(prompt)
            return said("\n".join(f"{name}: {preference(number, set_of[number, (name, sub)], name)}"
                                  for name, sub in wanted))  # fmt: skip
        if stage in ("describe", "message"):
            number, which = number_in(prompt), set_in(prompt)
            names = [name for name, _ in asked_for(prompt)]
            lines = [f"{name}: {description(number, which, name)}" for name in names]
            return said("\n".join(lines) if stage == "describe" else message(number, which))
        system = asked.body["messages"][0]["content"]
        row = number_in(system), set_in(system)
        number = number_in(prompt) if "[" in prompt else row[0]
        if system == message(*row):
            return log.plain(row, asked, number, ("River", "The river", "It is the river")[row[1]])
        return log.answer(row, asked, number, asked.body["seed"] - SEED)

    return script


def conversation_of(row: dict[str, Any]) -> list[str]:
    return [row["system"], *(text for pair in row["history"] for text in pair), row["prompt"], row["output"]]


@pytest.mark.parametrize("setting", ["conflict", "permitted", "turns"])
def test_rows_counts_and_pairs_equal_those_of_a_plain_loop_over_the_requests(tmp_path: Path, setting: str) -> None:
    count, log = 16, Log()
    changes: dict[str, Any] = {"sets_per_instruction": SETS, "pairs": "all"}
    run_with(author(log, count), tmp_path, rows(count), pressure={setting: 1.0}, **changes)
    expected: list[tuple[list[str], str | None]] = []
    refused: Counter[str] = Counter()
    plain_answers: dict[tuple[int, int], str] = {}
    for row in sorted(log.requests):
        conversations, bad = log.conversations(row)
        refused += bad
        texts = [[turn["content"] for turn in conversation] for conversation in conversations]
        plain_answers[row] = texts[0][2]
        under_pressure = [conversation for conversation in texts if conversation[0] != message(*row)]
        expected += list(zip(under_pressure, (setting, "aligned"), strict=False)) or [(texts[0], None)]
    read = written(tmp_path)
    assert [(conversation_of(row), (row["pressure"] or {}).get("setting")) for row in read] == expected
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["sets_written"] == count * SETS
    assert report["rows_written"] == len(read)
    assert f"\n{len(read)} rows (system message" in (tmp_path / "out" / "report.md").read_text("utf-8")
    for name, lengths in report["characters"].items():  # the texts that are written
        assert (lengths["count"], lengths["mean"]) == (len(read), sum(len(row[name]) for row in read) / len(read))
    facts = report["pressure"]["settings"]
    kept = Counter(name for _, name in expected)
    assert facts[setting]["rows"] == count * SETS
    assert facts[setting]["kept"] == kept[setting] > 0
    assert sum(facts[setting]["given_up"].values()) == kept[None] > 0
    twins = facts.get("aligned", {"kept": 0, "refused_answers": {}})
    assert twins["kept"] == kept["aligned"]
    assert Counter(facts[setting]["refused_answers"]) + Counter(twins["refused_answers"]) == refused

    pairs = written(tmp_path, "pairs/rows.jsonl")
    assert [(pair["system"], pair["chosen"][1]["content"], pair["rejected"][1]["content"]) for pair in pairs] == [
        (message(number, own), plain_answers[number, own], plain_answers[number, 1 - own])
        for number in range(count)
        for own in range(SETS)
    ]
    assert all(
        pair["chosen"][0] == pair["rejected"][0] == {"content": pair["prompt"], "role": "user"} for pair in pairs
    )


def test_a_second_start_asks_nothing_and_both_formats_are_read_as_the_same_conversations(tmp_path: Path) -> None:
    count = 10
    read = []
    for format in ("jsonl", "parquet"):
        folder = tmp_path / format
        folder.mkdir()
        (folder / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)), encoding="utf-8")
        with served(author(Log(), count)) as server:
            path = configuration(
                folder,
                server.url,
                folder / "source.jsonl",
                sets_per_instruction=SETS,
                pressure={"conflict": 0.4, "turns": 0.5},
                output={"format": format},
            )
            run(load_config(path))
            asked = [json.dumps(request.body) for request in server.asked]
            assert len(set(asked)) == len(asked)
            (data,) = (folder / "out" / "data").iterdir()
            first = data.read_bytes()
            data.unlink()
            run(load_config(path))
            assert len(server.asked) == len(asked)
            assert data.read_bytes() == first
        read.append([row.messages for _, row in read_conversations(Source(path=str(folder / "out" / "data")))])
    assert read[0] == read[1]
    assert [[turn["content"] for turn in messages] for messages in read[0]] == [
        conversation_of(row) for row in written(tmp_path / "jsonl")
    ]
    assert max(map(len, read[0])) > 3


def is_under_pressure(asked: Asked) -> bool:
    system = asked.body["messages"][0]["content"]
    return stage_of(asked) == "answer" and system != message(number_in(system), set_in(system))


def test_kills_under_pressure_give_the_same_bytes_and_repeat_no_journaled_request(tmp_path: Path) -> None:
    count, kills, rng = 20, 3, random.Random(5)
    shares = {"conflict": 0.3, "injected": 0.1, "extraction": 0.2, "permitted": 0.2, "turns": 0.2}
    changes: dict[str, Any] = {"pressure": shares, "sets_per_instruction": SETS, "pairs": "all"}
    source = write_rows(tmp_path / "source.jsonl", rows(count))
    whole = tmp_path / "whole"
    whole.mkdir()
    with served(author(Log(), count)) as server:
        run(load_config(configuration(whole, server.url, source, **changes)))
        requests, pressed = len(server.asked), sum(map(is_under_pressure, server.asked))
        bodies = Counter(json.dumps(asked.body) for asked in server.asked)
        assert max(bodies.values()) == 1  # nothing is asked twice
    facts = json.loads((whole / "out" / "report.json").read_text("utf-8"))["pressure"]["settings"]
    assert facts.keys() == {*shares, "aligned"}

    with served(after_a_moment(author(Log(), count))) as server, killed_afterwards(processes) as start:
        path = configuration(tmp_path, server.url, source, **changes)
        moments = sorted(rng.sample(range(requests // 2, requests - 32), kills))
        for _ in kill_at_requests(moments, server, partial(start, run_file, path)):
            assert 0 < sum(map(is_under_pressure, server.asked)) < pressed
        run_to_the_end(path, server)
        repeated = server.answered.total() - requests
    check_same_rows(tmp_path, whole)
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["pressure"]["settings"] == facts
    assert repeated <= kills * (16 + 4)  # as in the test of runs without pressure


def test_a_prompt_that_the_server_refuses_leaves_the_plain_row(tmp_path: Path) -> None:
    count, answer = 10, author(Log(), 10)

    async def filters(asked: Asked) -> Reply:
        if is_under_pressure(asked) and number_in(asked.body["messages"][0]["content"]) % 2:
            return error(400, "The prompt was filtered.", code="content_filter")
        if len(asked.body["messages"]) == 2 and stage_of(asked) == "answer" and asked.prompt == question(4):
            system = asked.body["messages"][0]["content"]  # instruction 4 is refused as a further one alone
            if number_in(system) != 4:
                return error(400, "The prompt was filtered.", code="content_filter")
        return await answer(asked)

    done, _ = run_with(filters, tmp_path, rows(count), pressure={"turns": 1.0}, sets_per_instruction=SETS)
    read = written(tmp_path)
    assert len(read) == count * SETS
    assert written(tmp_path, "left_out.jsonl") == []
    assert not any(row["pressure"] for row in read if number_in(row["system"]) % 2)
    assert any(row["pressure"] for row in read)
    given_up = done.stats.facts()["pressure"]["settings"]["turns"]["given_up"]
    assert given_up["the server refuses the prompt, as too long or by a filter"] == count // 2 * SETS


@pytest.mark.parametrize(
    ("pressure", "requests"),  # of a set: three for its message, its plain answer, and those under pressure
    [
        ({}, 4),
        ({"permitted": 1.0}, 4 + 1),
        ({"conflict": 0.5, "injected": 0.5}, 4 + 1 + 0.5),  # half of the sets have a twin
        ({"turns": 1.0}, 4 + 2.5 + 1 + 2.5),  # plain answers to the further instructions, then all turns
    ],
)
def test_the_check_counts_requests_under_pressure(
    load_script: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pressure: dict[str, float],
    requests: float,
) -> None:
    source = write_rows(tmp_path / "source.jsonl", rows(10))
    path = configuration(tmp_path, "http://127.0.0.1:9/v1", source, sets_per_instruction=SETS, pressure=pressure)
    load_script("collection").check(load_config(path))
    assert f"about {10 * SETS * requests:.0f} requests to m, 16 at once, for 20 sets" in capsys.readouterr().out
