"""Complete runs of SYSGEN against a scripted model: rows, dropped rows, report, kills, and the command."""

import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from killed_processes import after_a_moment, kill_at_requests, killed_afterwards
from scripted_model import EIGHT, answer, expected, faulty, row_of, write_rows
from scripted_server import Asked, Reply, Script, error, served
from sysgen_runs import configuration, lines, question, run_file, run_with, saying

from train.data.sources.source import read_conversations
from train.errors import UserError
from train.recipe import Source
from train.sysgen.config import load_config
from train.sysgen.run import run

processes = multiprocessing.get_context("forkserver")  # its children begin with the slow imports done
processes.set_forkserver_preload(["train.sysgen.run"])

SCRIPT = Path(__file__).parents[2] / "scripts" / "sysgen.py"


@pytest.mark.parametrize(("script", "count"), [(answer, 300), (faulty, 90)])
def test_rows_and_report_equal_those_of_a_plain_loop(tmp_path: Path, script: Script, count: int) -> None:
    source = tmp_path / "source.jsonl"
    write_rows(source, count)
    with served(script) as server:
        run(load_config(configuration(tmp_path, server.url, source)))
    reference = expected(count)
    rows = lines(tmp_path / "out" / "data" / "rows.jsonl")
    assert [row["messages"] for row in rows] == [row["messages"] for row in reference.rows]
    assert [row["sysgen"]["tags"] for row in rows] == [row["tags"] for row in reference.rows]
    assert [row["sysgen"]["source"] for row in rows] == [f"{source}:{row['number'] + 1}" for row in reference.rows]
    left_out = [(row["source"], row["reason"]) for row in lines(tmp_path / "out" / "left_out.jsonl")]
    assert left_out == [(f"{source}:{number + 1}", reason) for number, reason in reference.left_out]

    facts = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert (facts["rows"], facts["rows_written"]) == (count, len(reference.rows))
    reasons = [reason for _, reason in reference.left_out]
    assert facts["left_out"] == {reason: reasons.count(reason) for reason in reasons}
    for tag in EIGHT:
        of = facts["tags"][tag]
        assert of["rows"] == reference.tags[tag]
        assert of["share"] == pytest.approx(reference.tags[tag] / len(reference.rows))
        assert of["verdicts"] == {name: reference.verdicts[tag, name] for name in ("Good", "Bad", "None", "missing")}
        assert of["phrases_removed"] == {
            name: n for (removed_from, name), n in reference.removed.items() if removed_from == tag
        }
    assert facts["repairs"] == reference.repairs
    assert facts["dropped"] == reference.dropped
    assert facts["unknown_tags"] == reference.unknown
    assert facts["characters"]["ratio"] == pytest.approx(reference.new_characters / reference.old_characters)
    assert {stage: of["requests"] for stage, of in facts["spent"].items()} == reference.requests
    assert {stage: of["completion_tokens"] for stage, of in facts["spent"].items()} == reference.completion_tokens
    assert len(facts["samples"]) == 20
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert f"{len(reference.rows)} of {count} rows written" in report
    for reason in set(reasons):
        assert f"| {reason} | {reasons.count(reason)} | {reasons.count(reason) / count:.1%} |" in report
    assert (tmp_path / "out" / "tags.png").read_bytes()[:4] == (tmp_path / "out" / "lengths.png").read_bytes()[:4]


def test_twenty_kills_over_500_rows_give_the_same_bytes_and_repeat_no_journaled_request(
    tmp_path: Path,
) -> None:
    count, rng = 500, random.Random(11)
    source = tmp_path / "source.jsonl"
    write_rows(source, count)
    requests = expected(count).requests.total()
    moments = sorted(rng.sample(range(1, requests), 20))
    whole = tmp_path / "whole"
    whole.mkdir()
    with served(answer) as server:
        run(load_config(configuration(whole, server.url, source)))

    with served(after_a_moment(answer)) as server, killed_afterwards(processes) as start:
        path = configuration(tmp_path, server.url, source)
        for _ in kill_at_requests(moments, server, partial(start, run_file, path)):
            written = tmp_path / "out" / "data" / "rows.jsonl"
            whole_lines = written.read_bytes().rpartition(b"\n")[0] if written.exists() else b""
            assert (whole / "out" / "data" / "rows.jsonl").read_bytes().startswith(whole_lines)
        run_file(path)
        again = len(server.asked)
        run_file(path)
        assert len(server.asked) == again
        repeated = server.answered.total() - requests
    for name in ("data/rows.jsonl", "left_out.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    facts, whole_facts = (
        json.loads((folder / "out" / "report.json").read_text("utf-8")) for folder in (tmp_path, whole)
    )
    for of in (*facts["spent"].values(), *whole_facts["spent"].values()):
        del of["seconds"]
    assert facts == whole_facts
    # Each kill may lose what the server had just answered and the journal had not yet written: no more than the client
    # promises, a quarter more than its places.
    assert repeated <= 20 * (16 + 4)
    print(f"answered twice over 20 kills: {repeated} of {requests}")


def test_the_trainer_reads_the_rows_of_both_formats(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(60)]
    read = []
    for format in ("jsonl", "parquet"):
        folder = tmp_path / format
        folder.mkdir()
        run_with(answer, folder, rows, output={"format": format, "rows_per_file": 7})
        read.append([row.messages for _, row in read_conversations(Source(path=str(folder / "out" / "data")))])
    assert read[0] == read[1] == [row["messages"] for row in expected(60).rows]
    files = sorted((tmp_path / "parquet" / "out" / "data").iterdir())
    assert [pyarrow.parquet.read_metadata(file).num_rows for file in files] == [7] * (len(files) - 1) + [
        len(read[0]) - 7 * (len(files) - 1)
    ]


def test_a_changed_setting_rewrites_the_rows_and_repeats_only_dependent_requests(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(40)]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with served(answer) as server:
        run(load_config(configuration(tmp_path, server.url, source)))
        first = (tmp_path / "out" / "data" / "rows.jsonl").read_bytes()
        asked = len(server.asked)
        longer = configuration(tmp_path, server.url, source, answer={"max_tokens": 2048})
        run(load_config(longer))
        cut = [asked.body for asked in server.asked[asked:]]
        assert all(body["max_tokens"] == 2048 for body in cut)  # what was cut, and that alone
        assert len(cut) == sum(reason == "new answer cut at the token limit" for _, reason in expected(40).left_out)
        asked = len(server.asked)
        run(load_config(configuration(tmp_path, server.url, source, answer={"max_tokens": 1024, "temperature": 0.1})))
        assert {body["temperature"] for body in (asked.body for asked in server.asked[asked:])} == {0.1}
        run(
            load_config(
                configuration(tmp_path, server.url, source, data={"sources": [{"path": str(source)}], "limit": 20})
            )
        )
        assert (tmp_path / "out" / "data" / "rows.jsonl").read_bytes() == b"".join(
            line for line in first.splitlines(keepends=True) if int(json.loads(line)["sysgen"]["source"].rpartition(":")[2]) <= 20
        )  # fmt: skip


def test_ctrl_c_keeps_the_answers(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if asked.number >= 30:
            await asyncio.Event().wait()
        return await answer(asked)

    source = tmp_path / "source.jsonl"
    write_rows(source, 100)
    with served(script) as server:
        command = [sys.executable, str(SCRIPT), "--config", str(configuration(tmp_path, server.url, source))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(server.asked) < 46:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "stopped; the answers so far are in the journal, and the same command continues from here"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_the_check_reads_all_rows_and_asks_each_server_for_one_token(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    write_rows(source, 20)
    with source.open("a") as file:
        file.write('{"messages": []}\n')
    with served(saying(), models=["m", "n"]) as server:
        checked = command("--config", str(configuration(tmp_path, server.url, source)), "--check")
        assert {asked.body["max_tokens"] for asked in server.asked} == {1}  # the list alone refuses no parameter
    assert checked.returncode == 0, checked.stderr
    turns = sum(len(row_of(number)["messages"]) // 2 for number in range(20))
    assert checked.stdout.splitlines() == [
        "21 rows, 0 with a system message (existing_system: replace)",
        "warning: 1 rows can't be read: no assistant turn",
        f"about {20 + 2 * turns} requests to m, 16 at once, if every first try passes",
        f"{server.url} answers as m",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("generate.max_tokns=5", "generate.max_tokns: unknown key. Did you mean `generate.max_tokens`?"),
        ("tags.target_share.Toll=0.1", "tags.target_share.Toll: unknown key. Did you mean `tags.target_share.Tool`?"),
        ("on_empty=skip", "on_empty: found 'skip'. Allowed: retry, drop, keep_without_system."),
        ("gates.leak=2", "gates.leak: found 2. Allowed: a number > 0 and <= 1; or null."),
        ("api_key=x", "Set them in the environment"),
        ("data.sources.0.path=nowhere.jsonl", "nowhere.jsonl: there is no nowhere.jsonl in"),
        ("servers.0.base_url=localhost", "base_url 'localhost' is not a URL: write it like http://localhost:8000/v1."),
    ],
)
def test_invalid_configurations_are_one_error(tmp_path: Path, change: str, message: str) -> None:
    source = tmp_path / "source.jsonl"
    write_rows(source, 1)
    path = configuration(tmp_path, "http://127.0.0.1:9/v1", source)
    failed = command("--config", str(path), change)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr


def test_another_format_in_the_same_folder_is_an_error(tmp_path: Path) -> None:
    run_with(saying(), tmp_path, [question()])
    with pytest.raises(UserError, match=r"rows.jsonl is of an earlier run with another output.format"):
        run_with(saying(), tmp_path, [question()], output={"format": "parquet"})


UNREADABLE = [{"messages": []}, {"text": "x"}, {"messages": [{"role": "user", "content": "x"}]}]


@pytest.mark.parametrize("rows", [UNREADABLE, [question(), question("another [2] question?")]])
def test_a_run_without_a_written_row_is_an_error_with_the_reasons(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """With unreadable rows, and with rows without a valid message; at every start."""
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = tmp_path / "out"
    with served(saying(generate="no tags at all")) as server:
        path = str(configuration(tmp_path, server.url, source))
        first, second = command("--config", path), command("--config", path)
        asked = len(server.asked)
        third = command("--config", path)
        assert len(server.asked) == asked
        checked = command("--config", path, "--check")
    reasons = Counter(row["reason"] for row in lines(folder / "left_out.jsonl"))
    assert reasons.total() == len(rows)
    for ended in (first, second, third):
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.startswith(f"error: no row was written: all {len(rows)} were dropped (")
        assert ended.stderr.count("\n") == 1
        for reason, count in reasons.items():
            assert f"{count}: {reason}" in ended.stderr
        assert f"{folder / 'left_out.jsonl'}" in ended.stderr
        assert f"0 of {len(rows)} rows written after" in ended.stdout
    assert (folder / "report.md").read_text("utf-8").startswith(f"# out\n\n0 of {len(rows)} rows written")
    assert checked.returncode == (2 if rows is UNREADABLE else 0)
    assert checked.stdout.startswith(f"{len(rows)} rows")
    assert ("error: no row can be read: all 3" in checked.stderr) == (rows is UNREADABLE)


def test_the_servers_errors_are_shown_if_it_refused_rows(tmp_path: Path) -> None:
    """For some rows: in the last lines and in the report. For all rows: in the final error too."""

    good = saying()

    async def script(asked: Asked) -> Reply:
        if "[2]" in asked.prompt:
            return error(400, f"request {asked.number}: top_k is\nno parameter")
        return error(400, "too long") if "[3]" in asked.prompt else await good(asked)

    rows = [question(f"question [{number}]?") for number in (2, 3, 2, 1)]
    source = tmp_path / "source.jsonl"
    changes = {"answers": "original", "gates": {"language": False}}
    for count in (4, 3):
        source.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")
        with served(script) as server:
            ended = command("--config", str(configuration(tmp_path, server.url, source, **changes)))
        assert ended.returncode == 2, ended.stderr
        details = [row["detail"] for row in lines(tmp_path / "out" / "left_out.jsonl")]
        assert re.fullmatch(r"400 Said: request \d: top_k is no parameter", details[0])
        failures = [line for line in ended.stdout.splitlines() if line.startswith("no answer from the model, ")]
        assert failures == [
            f"no answer from the model, 2 times: {details[0]}",
            "no answer from the model, 1 times: 400 Said: too long",
        ]
        report = (tmp_path / "out" / "report.md").read_text("utf-8")
        assert f"| `{details[0]}` | 2 |\n| `400 Said: too long` | 1 |" in report
    assert (
        f"Errors of the server: 2 times: {details[0]}; 1 times: 400 Said: too long. The dropped rows are in"
        in ended.stderr
    )
