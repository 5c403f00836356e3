"""Complete runs of the collection against a scripted model: rows, pairs, dropped sets, report, kills, the command."""

import asyncio
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from collection_runs import (
    OUTPUTS,
    author_of,
    check_same_rows,
    configuration,
    good_everything,
    lines,
    run_file,
    run_to_the_end,
    run_with,
    saying,
    write_rows,
)
from killed_processes import after_a_moment, kill_at_requests, killed_afterwards
from scripted_author import FOUR, description, expected, message, number_in, output, preference, row_of
from scripted_server import Asked, Reply, error, served

from train.data.sources.source import read_conversations
from train.multifaceted.collection.config import load_config
from train.multifaceted.collection.run import run
from train.recipe import Source
from train.system_gain.variants import read_labels

processes = multiprocessing.get_context("forkserver")  # its children begin with the slow imports done
processes.set_forkserver_preload(["train.multifaceted.collection.pipeline"])

SCRIPT = Path(__file__).parents[3] / "scripts" / "collection.py"
COLUMNS = ["main_source", "original_source", "preference_set", "system", "prompt", "output"]


def instruction_of(row: int) -> str:
    return next(turn["content"] for turn in row_of(row)["messages"] if turn["role"] == "user")


@pytest.mark.parametrize(("faulty", "count"), [(False, 70), (True, 20)])
def test_rows_pairs_and_report_equal_those_of_a_plain_loop(tmp_path: Path, faulty: bool, count: int) -> None:
    author, wanted = author_of(count), expected(count)
    run_with(author.faulty if faulty else author.answer, tmp_path, [row_of(number) for number in range(count)])
    out, source = tmp_path / "out", tmp_path / "source.jsonl"
    rows = lines(out / "data" / "rows.jsonl")
    assert [list(row) for row in rows] == [COLUMNS] * len(wanted.rows)
    for row, (place, which) in zip(rows, wanted.rows, strict=True):
        number = number_in(instruction_of(place))
        assert (row["main_source"], row["original_source"]) == (str(source), f"{source}:{place + 1}")
        assert [preference["dimension"] for preference in row["preference_set"]] == list(FOUR)
        assert [preference["preference"] for preference in row["preference_set"]] == [
            preference(number, which, name) for name in FOUR
        ]
        assert [preference["description"] for preference in row["preference_set"]] == [
            description(number, which, name) for name in FOUR
        ]
        assert (row["system"], row["prompt"]) == (message(number, which), instruction_of(place))
        assert row["output"] == output(number, which)

    left_out = [
        (int(row["place"].rpartition(":")[2]) - 1, row["set"], row["reason"]) for row in lines(out / "left_out.jsonl")
    ]
    assert left_out == wanted.left_out
    assert faulty or {reason.partition(":")[0] for _, _, reason in left_out} == {
        "preferences", "descriptions", "system message", "answer", "duplicate", "states a length already"
    }  # fmt: skip
    facts = json.loads((out / "report.json").read_text("utf-8"))
    assert (facts["rows"], facts["instructions"]) == (count, len(wanted.kept))
    assert (facts["sets"], facts["sets_written"]) == (3 * len(wanted.kept), len(rows))
    for key, of_sets in (("left_out", False), ("sets_left_out", True)):
        reasons = Counter(reason for _, which, reason in wanted.left_out if (which is not None) == of_sets)
        assert facts[key] == reasons
    assert facts["events"] == wanted.events
    assert {stage: of["requests"] for stage, of in facts["spent"].items()} == wanted.requests
    assert {stage: of["completion_tokens"] for stage, of in facts["spent"].items()} == wanted.completion_tokens
    assert len(facts["samples"]) == 5
    compare_coverage(facts, rows)
    compare_lengths(facts, rows)
    compare_similarity(facts["similarity"], rows)
    compare_pairs(facts, rows, lines(out / "pairs" / "rows.jsonl"))
    report = (out / "report.md").read_text("utf-8")
    assert (
        f"{len(rows)} rows (system message, instruction, answer) and {facts['pairs']} preference pairs, by m." in report
    )
    assert "could not be confirmed" in report
    assert (out / "coverage.png").read_bytes()[:4] == b"\x89PNG"


def families(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["prompt"], []).append(row)
    return list(families.values())


def compare_coverage(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    for place, dimension in enumerate(FOUR):
        of = facts["coverage"][dimension]
        names = Counter(row["preference_set"][place]["subdimension"] for row in rows)
        assert {name: counts["written"] for name, counts in of["subdimensions"].items() if counts["written"]} == names
        drawn = [counts["drawn"] for counts in of["subdimensions"].values()]
        assert sum(drawn) == facts["sets"]
        assert max(drawn) - min(drawn) <= 1
        shares = [times / len(rows) for times in names.values()]
        entropy = sum(share * math.log2(1 / share) for share in shares)
        assert of["entropy_bits"] == pytest.approx(entropy)
        assert of["evenness"] == pytest.approx(entropy / math.log2(5))
        assert of["distinct_preferences"] == len({row["preference_set"][place]["preference"] for row in rows})
        assert of["preference_evenness"] == pytest.approx(1)  # no preference comes twice


def compare_lengths(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    for name in ("system", "prompt", "output"):
        lengths = [len(row[name]) for row in rows]
        twentieths = statistics.quantiles(lengths, n=20, method="inclusive")
        of = facts["characters"][name]
        assert (of["count"], of["median"]) == (len(rows), statistics.median(lengths))
        assert (of["p5"], of["p95"]) == pytest.approx((twentieths[0], twentieths[-1]))
        assert of["mean"] == pytest.approx(statistics.mean(lengths))


def rouge(first: str, second: str) -> float:
    """Return the F1 of the longest common subsequence of words, by its recursive definition."""
    left, right = (re.findall(r"\w+", text.lower()) for text in (first, second))
    row = [0] * (len(right) + 1)
    for word in left:
        above = row[:]
        for place, other in enumerate(right, 1):
            row[place] = above[place - 1] + 1 if word == other else max(above[place], row[place - 1])
    return 2 * row[-1] / (len(left) + len(right))


def compare_similarity(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    texts = [[row["system"] for row in family] for family in families(rows) if len(family) > 1]
    assert facts["instructions"] == len(texts)
    siblings = [
        rouge(messages[a], messages[b])
        for messages in texts
        for a in range(len(messages))
        for b in range(a + 1, len(messages))
    ]
    assert facts["siblings"]["count"] == len(siblings)
    assert facts["siblings"]["mean"] == pytest.approx(statistics.mean(siblings))
    assert facts["siblings"]["median"] == pytest.approx(statistics.median(siblings))
    strangers = []
    for place, messages in enumerate(texts):
        after = [other for other in texts[place + 1 :] + texts[:place] if len(other) == len(messages)]
        strangers += [
            rouge(messages[a], after[0][b]) for a in range(len(messages)) for b in range(a + 1, len(messages)) if after
        ]
    assert facts["strangers"]["count"] == len(strangers)
    assert facts["strangers"]["mean"] == pytest.approx(statistics.mean(strangers))


def compare_pairs(facts: dict[str, Any], rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> None:
    able = [family for family in families(rows) if len({row["output"] for row in family}) > 1]
    assert facts["pairs"] == len(pairs) == len(able)
    places = []
    for pair, family in zip(pairs, able, strict=True):
        assert list(pair) == ["main_source", "original_source", "system", "prompt", "chosen", "rejected"]
        asked = {"content": pair["prompt"], "role": "user"}
        assert [pair["chosen"][0], pair["rejected"][0]] == [asked, asked]
        (own,) = [row for row in family if row["system"] == pair["system"]]
        assert pair["chosen"][1] == {"content": own["output"], "role": "assistant"}
        others = [row["output"] for row in family if row is not own]
        assert pair["rejected"][1]["role"] == "assistant"
        assert pair["rejected"][1]["content"] in others
        assert pair["rejected"][1]["content"] != own["output"]
        places.append(family.index(own))
    assert len(set(places)) == 3  # no place among the siblings is preferred


def test_kills_give_the_same_bytes_and_repeat_no_journaled_request(tmp_path: Path) -> None:
    count, kills, rng = 45, 6, random.Random(11)
    author, wanted = author_of(count), expected(count)
    source = write_rows(tmp_path / "source.jsonl", [row_of(number) for number in range(count)])
    requests = wanted.requests.total()
    moments = sorted(rng.sample(range(1, requests), kills))
    whole = tmp_path / "whole"
    whole.mkdir()
    with served(author.answer) as server:
        run(load_config(configuration(whole, server.url, source)))
        assert len(server.asked) == requests

    with served(after_a_moment(author.answer)) as server, killed_afterwards(processes) as start:
        path = configuration(tmp_path, server.url, source)
        for _ in kill_at_requests(moments, server, partial(start, run_file, path)):
            for name in OUTPUTS:
                written = tmp_path / "out" / name
                whole_lines = written.read_bytes().rpartition(b"\n")[0] if written.exists() else b""
                assert (whole / "out" / name).read_bytes().startswith(whole_lines)
        run_to_the_end(path, server)
        repeated = server.answered.total() - requests
    check_same_rows(tmp_path, whole)
    facts, whole_facts = (
        json.loads((folder / "out" / "report.json").read_text("utf-8")) for folder in (tmp_path, whole)
    )
    for of in (*facts["spent"].values(), *whole_facts["spent"].values()):
        del of["seconds"]
    assert facts == whole_facts
    # Each kill may lose what the server had just answered and the journal had not yet written: no more than the client
    # promises, a quarter more than its places.
    assert repeated <= kills * (16 + 4)
    print(f"answered twice over {kills} kills: {repeated} of {requests}")


def test_the_trainer_reads_the_rows_of_both_formats_and_finds_their_dimensions(tmp_path: Path) -> None:
    count = 40
    read, labels, pairs = [], [], []
    for format in ("jsonl", "parquet"):
        folder = tmp_path / format
        folder.mkdir()
        source = [row_of(number) for number in range(count)]
        run_with(author_of(count).answer, folder, source, output={"format": format, "rows_per_file": 16})
        read.append([row.messages for _, row in read_conversations(Source(path=str(folder / "out" / "data")))])
        from datasets import load_dataset

        files = [str(file) for file in sorted((folder / "out" / "data").iterdir())]
        data = load_dataset(
            "json" if format == "jsonl" else "parquet", data_files=files, split="train", cache_dir=str(tmp_path)
        )
        assert data.column_names == COLUMNS
        labels.append([[label for label in read_labels(row) if label[0] in FOUR] for row in data])
        files = [str(file) for file in sorted((folder / "out" / "pairs").iterdir())]
        pairs.append(
            load_dataset(
                "json" if format == "jsonl" else "parquet", data_files=files, split="train", cache_dir=str(tmp_path)
            ).to_list()
        )
    wanted = [
        [
            {"role": "system", "content": message(number_in(instruction_of(place)), which)},
            {"role": "user", "content": instruction_of(place)},
            {"role": "assistant", "content": output(number_in(instruction_of(place)), which)},
        ]
        for place, which in expected(count).rows
    ]
    assert read == [wanted, wanted]
    assert labels[0] == labels[1]
    assert {dimension for row in labels[0] for dimension, _ in row} == set(FOUR)
    assert all(len(row) == 4 for row in labels[0])
    strip = [
        [
            {key: value for key, value in pair.items() if key != "original_source" and key != "main_source"}
            for pair in pairs_of_format
        ]
        for pairs_of_format in pairs
    ]
    assert strip[0] == strip[1]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_the_check_reads_all_rows_and_asks_each_server_for_one_token(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "source.jsonl", [row_of(number) for number in range(20)])
    with source.open("a") as file:
        file.write('{"messages": []}\n')
    with served(saying(), models=["another name of m"]) as server:
        checked = command("--config", str(configuration(tmp_path, server.url, source)), "--check")
        assert {asked.body["max_tokens"] for asked in server.asked} == {1}  # the list alone refuses no name
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.splitlines() == [
        "hierarchy: 4 dimensions, 20 sub-dimensions, 89 preferences",
        "21 rows, 18 instructions",
        "2 times: row with a system message, which was ignored",
        "2 times: row of several turns, of which the first was taken",
        f"dropped: 1 (4.8%): duplicate: the same as an instruction before; the first: {source}:11",
        f"dropped: 1 (4.8%): states a length already; the first: {source}:13: length: in 3 bullet points",
        f"dropped: 1 (4.8%): not supported: no user turn at the start; the first: {source}:21",
        "about 216 requests to m, 16 at once, for 54 sets, if every first try passes",
        f"{server.url} answers as m",
    ]
    assert not (tmp_path / "out").exists()


def answers_in(folder: Path) -> int:
    """Count the answers in the journal."""
    with sqlite3.connect(folder / "answers.sqlite") as connection:
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0]


def test_the_command_prints_a_summary_and_ctrl_c_keeps_the_answers(tmp_path: Path) -> None:
    count = 25
    author = author_of(count)
    source = write_rows(tmp_path / "source.jsonl", [row_of(number) for number in range(count)])
    stuck = True

    async def script(asked: Asked) -> Reply:
        if stuck and asked.number >= 60:
            await asyncio.Event().wait()
        return await author.answer(asked)

    with served(script) as server:
        path = configuration(tmp_path, server.url, source)
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--config", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while len(server.asked) < 70 or answers_in(tmp_path / "out") < 60:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert (
            errors.strip() == "stopped; the answers so far are in the journal, and the same command continues from here"
        )
        stuck = False
        done = command("--config", str(path))
    assert done.returncode == 0, done.stderr
    wanted = expected(count)
    last = done.stdout.splitlines()
    assert f"{len(wanted.rows)} rows and " in done.stdout
    assert f"of {len(wanted.kept)} instructions ({count} rows read) after" in done.stdout
    for reason, times in Counter(reason for _, which, reason in wanted.left_out if which is not None).items():
        assert f"dropped sets: {times} ({times / (3 * len(wanted.kept)):.1%}): {reason}" in last
    assert f"{wanted.requests.total()} answers (60 from the journal), 0 retries" in last
    assert last[-2] == f"read {tmp_path / 'out' / 'report.md'}"
    assert last[-1].startswith("warning: reasoning without an end, and nothing said: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("propose.max_tokns=5", "propose.max_tokns: unknown key. Did you mean `propose.max_tokens`?"),
        ("sets_per_instruction=0", "sets_per_instruction: found 0. Allowed:"),
        ("filter.rules=[tone]", "filter.rules.0: found 'tone'. Allowed: length, format, style, audience, role."),
        ("pairs=two", "pairs: found 'two'. Allowed: one, all, none."),
        ("leak=2", "leak: found 2. Allowed: a number > 0 and <= 1; or null."),
        ("hierarchy.ours=false", "hierarchy.ours: found false without a `hierarchy.file` to replace it. Name one."),
        ("hierarchy.file=nowhere.yaml", "nowhere.yaml: there is no such"),
        ("sets_per_instruction=20 preferences=hierarchy", ""),
        ("answer.extra={messages: []}", "answer.extra.messages: set by the run itself."),
        ("api_key=x", "Set them in the environment"),
        ("data.sources.0.path=nowhere.jsonl", "nowhere.jsonl: there is no nowhere.jsonl in"),
        ("servers.0.base_url=localhost", "base_url 'localhost' is not a URL: write it like http://localhost:8000/v1."),
    ],
)
def test_invalid_configurations_are_one_error(
    tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    from collection import main

    source = write_rows(tmp_path / "source.jsonl", [row_of(0)])
    arguments = sys.argv
    try:
        with served(saying(), models=["m"]) as server:
            path = configuration(tmp_path, server.url, source)
            sys.argv = ["collection.py", "--config", str(path), *(change.split() if "=20" in change else [change])]
            if not message:
                sys.argv.append("--check")
                assert main() == 0  # twenty sets of five sub-dimensions are four preferences of each, which there are
                return
            assert main() == 2
    finally:
        sys.argv = arguments
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err


@pytest.mark.parametrize("screened", [False, True])
def test_the_servers_errors_are_shown_if_it_refused_everything(tmp_path: Path, screened: bool) -> None:
    """Each set fails, or with `filter.model` the instruction before its sets."""

    async def script(asked: Asked) -> Reply:
        return error(400, f"request {asked.number}: no number | that this model takes " + "and so on " * 60)

    source = write_rows(tmp_path / "source.jsonl", [row_of(0), row_of(1)])
    with served(script) as server:
        path = configuration(tmp_path, server.url, source, filter={"model": screened}, sets_per_instruction=2)
        ended = command("--config", str(path))
    assert ended.returncode == 2, ended.stderr
    details = [row["detail"] for row in lines(tmp_path / "out" / "left_out.jsonl")]
    assert len(details) == (2 if screened else 4)
    shown = f"{details[0][:200]}..."
    failures = [line for line in ended.stdout.splitlines() if line.startswith("no answer from the model, ")]
    assert failures == [f"no answer from the model, {len(details)} times: {shown}"]
    assert ended.stderr.count("\n") == 1
    assert f"Errors of the server: {len(details)} times: {shown.rstrip('.')}. The dropped rows are in " in ended.stderr
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    cell = shown.replace("|", "\\|")
    assert (
        f"### Failed requests\n\n| error of the server | times |\n| --- | ---: |\n| `{cell}` | {len(details)} |"
        in report
    )


@pytest.mark.parametrize("said_of_message", [None, "<think>hm"])
def test_a_run_without_a_written_row_is_an_error_with_the_reasons(tmp_path: Path, said_of_message: str | None) -> None:
    """With unreadable rows, and with instructions all of whose sets are dropped; at every start."""
    unreadable = said_of_message is None
    rows = [{"messages": []}, {"text": "x"}] if unreadable else [row_of(0), row_of(1)]
    source = write_rows(tmp_path / "source.jsonl", rows)
    folder = tmp_path / "out"
    with served(saying(message=said_of_message or "")) as server:
        path = str(configuration(tmp_path, server.url, source))
        first = command("--config", path)
        asked = len(server.asked)
        second = command("--config", path)
        assert len(server.asked) == asked
        checked = command("--config", path, "--check")
    reasons = Counter(row["reason"] for row in lines(folder / "left_out.jsonl"))
    assert reasons.total() == (2 if unreadable else 6)
    for ended in (first, second):
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.startswith("error: no row was written: ")
        assert ended.stderr.count("\n") == 1
        for reason, count in reasons.items():
            assert f"{count}: {reason}" in ended.stderr
        assert f"{folder / 'left_out.jsonl'}" in ended.stderr
        assert ended.stdout.startswith("0 rows and 0 pairs of ")
    assert (folder / "report.md").is_file()
    assert checked.returncode == (2 if unreadable else 0)
    assert "2 rows, " in checked.stdout
    assert ("error: no row becomes an instruction: all 2" in checked.stderr) == unreadable


@pytest.mark.parametrize("accepted", [[], ["no_answer"], ["no_answer", "unsupported"]])
def test_unaccepted_losses_of_sets_and_rows_end_the_run_with_2(
    tmp_path: Path, accepted: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from collection import main

    def answer(asked: Asked) -> Reply | str:
        return error(400, "not this one") if "[2]" in asked.prompt else good_everything(asked)

    turns = [[{"role": "user", "content": f"What is [{number}]?"}] for number in (1, 2)]
    turns.append([{"role": "assistant", "content": "No question."}])
    source = write_rows(tmp_path / "source.jsonl", [{"messages": turn} for turn in turns])
    with served(saying(answer=answer)) as server:
        path = configuration(tmp_path, server.url, source, sets_per_instruction=1, accept_losses=accepted)
        monkeypatch.setattr(sys, "argv", ["collection.py", "--config", str(path)])
        code = main()
    errors = capsys.readouterr().err
    assert len(lines(tmp_path / "out" / "data" / "rows.jsonl")) == 1
    assert (code, "error: " in errors) == ((0, False) if "unsupported" in accepted else (2, True))
    assert ("1: no answer from the model (sets)" in errors) == (not accepted)
    assert ("1: not supported: no user turn at the start" in errors) == ("unsupported" not in accepted)
