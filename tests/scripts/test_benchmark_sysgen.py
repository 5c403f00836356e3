"""scripts/benchmark.py sysgen: the server counts four calls per row, and the table has its figures."""

import http.client
import json
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
ROWS, LATENCY, SLOTS = 30, 0.02, 8


@pytest.fixture
def run(benchmark: Callable[..., CompletedProcess[str]]) -> Callable[..., CompletedProcess[str]]:
    return partial(benchmark, "sysgen")


def cells(table: str) -> dict[str, list[str]]:
    """Return the cells of a table's lines by their first cell."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmarks import sysgen as benchmark_sysgen
    from benchmarks import sysgen_bare as benchmark_sysgen_bare
    from benchmarks import sysgen_server as benchmark_sysgen_server
    from benchmarks import sysgen_table as benchmark_sysgen_table

    return SimpleNamespace(
        sysgen=benchmark_sysgen,
        bare=benchmark_sysgen_bare,
        server=benchmark_sysgen_server,
        table=benchmark_sysgen_table,
    )


def test_every_row_takes_four_calls_and_the_table_has_the_servers_figures(
    run: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    file = tmp_path / "sysgen.json"
    result = run("--rows", ROWS, "--latency", LATENCY, "--concurrency", SLOTS, "--json", file)
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text(encoding="utf-8"))

    ideal = 4 * ROWS * LATENCY / SLOTS
    assert record["ideal_seconds"] == {str(ROWS): pytest.approx(ideal)}
    assert [run["contender"] for run in record["measurements"]] == ["bare", "ours"]
    for figures in record["measurements"]:
        assert figures["answered"] == dict.fromkeys(("generate", "verify", "answer", "judge"), ROWS)
        assert figures["rows"] == ROWS
        assert figures["most_at_once"] == SLOTS  # all slots in use, and never one more
        assert figures["too_many"] == 0
        assert figures["process_seconds"] > figures["seconds"] > ideal  # no server can be faster
        assert figures["cpu_seconds"] > 0
    bare, ours = record["measurements"]
    assert ours["peak_memory"] > 2 * bare["peak_memory"]  # each its own, not that of the common parent

    table = cells(result.stdout)
    assert table[f"the ideal: 4 x {ROWS} x {LATENCY} s / {SLOTS}"][1:3] == [f"{ideal:.2f}", "1.000"]
    for name, figures in (("the server's limit, asked by a bare client", bare), ("janus-sft, scripts/sysgen.py", ours)):
        assert table[name][0] == f"{ROWS} of {ROWS}"
        assert table[name][2:4] == [f"{figures['seconds'] / ideal:.3f}", f"{4 * ROWS / figures['seconds']:,.0f}"]
    assert "distilabel: skipped" in result.stdout
    assert "pip install 'distilabel[openai]==1.5.3'" in result.stdout
    assert record["failures"].keys() == {"distilabel"}


def test_memory_is_compared_between_numbers_of_rows(run: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    result = run("--memory", 5, 40, "--concurrency", SLOTS, "--json", file)
    assert result.returncode == 0, result.stderr
    few, many = json.loads(file.read_text(encoding="utf-8"))["measurements"]
    assert (few["rows"], many["rows"]) == (5, 40)
    grown = many["peak_memory"] - few["peak_memory"]
    assert f"from 5 to 40 rows: {grown / 1e6:+,.1f} MB ({grown / few['peak_memory']:+.1%})" in result.stdout
    assert cells(result.stdout)["40"][0].startswith(f"{many['peak_memory'] / 1e6:,.1f} MB")


def test_the_table_has_medians(scripts: SimpleNamespace) -> None:
    def figures(contender: str, seconds: float) -> dict[str, Any]:
        counts = dict.fromkeys(("process_seconds", "cpu_seconds", "server_cpu_seconds", "peak_memory"), 1.0)
        answered = {"generate": 10, "verify": 10, "answer": 10, "judge": 10}
        return {"contender": contender, "rows_in": 10, "rows": 10, "seconds": seconds, "most_at_once": 4, "too_many": 2,
                "answered": answered, **counts}  # fmt: skip

    runs = [figures("ours", 2.0), figures("bare", 1.0), figures("ours", 8.0), figures("ours", 4.0)]
    ours, bare = scripts.table.compute_medians(runs, {10: 2.0})
    assert (ours["contender"], ours["seconds"], ours["least_seconds"], ours["most_seconds"]) == ("ours", 4.0, 2.0, 8.0)
    assert (ours["times_the_ideal"], ours["requests_per_second"]) == (2.0, 10.0)
    assert bare["times_the_ideal"] == 0.5
    assert scripts.table.compute_medians(runs, {10: 0.0})[0]["times_the_ideal"] is None


@contextmanager
def served(scripts: SimpleNamespace, latency: float, at_once: int) -> Iterator[tuple[str, Any]]:
    with scripts.sysgen.serving(latency, at_once) as server:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1/chat/completions", server


def ask(url: str, messages: list[dict[str, str]]) -> str:
    """Return the content of the answer."""
    request = urllib.request.Request(url, json.dumps({"messages": messages}, ensure_ascii=False).encode())
    with urllib.request.urlopen(request) as response:
        return str(json.loads(response.read())["choices"][0]["message"]["content"])


def test_the_server_gives_the_answers_that_the_bare_client_assumes(scripts: SimpleNamespace) -> None:
    from train.sysgen.tags import parse, parse_verdicts

    question = f"Question {scripts.server.ROW_MARK}17: why does the row-number not count?"
    calls = [messages for messages, _ in scripts.bare.build_requests(question, "An answer.")]
    with served(scripts, 0.0, 1) as (url, server):
        written, verdicts, answer, verdict = (ask(url, messages) for messages in calls)
        seen = json.loads(server.communicate()[0])
    message = parse(written)
    assert not message.dropped
    assert "row-number-17" in message.text
    assert calls[2][0]["content"] == message.text  # the next request is built from the answer
    by_tag = parse_verdicts(verdicts).of
    assert {tag for tag, judged in by_tag.items() if judged == "Good"} == set(message.tags)
    assert answer in calls[3][0]["content"]
    assert verdict == "Yes"
    assert seen["answered"] == dict.fromkeys(scripts.server.STAGES, 1)


def test_requests_above_the_limit_get_429(scripts: SimpleNamespace) -> None:
    slots = 3
    with served(scripts, 0.5, slots) as (url, server):
        clients = [http.client.HTTPConnection(urlsplit(url).netloc) for _ in range(slots + 2)]
        for client in clients:
            client.connect()
        for client in clients:  # all are sent before the first is answered
            client.request("POST", urlsplit(url).path, b"{}")
        statuses = [client.getresponse().status for client in clients]
        for client in clients:
            client.close()
        seen = json.loads(server.communicate()[0])
    assert sorted(statuses) == [200] * slots + [429] * 2
    assert (seen["answered"]["answer"], seen["too_many"], seen["most_at_once"]) == (slots, 2, slots)


def test_repeated_conversations_have_their_own_row_numbers(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts.sysgen, "CONVERSATIONS", 3)
    file = scripts.sysgen.write_rows(tmp_path / "rows.jsonl", 7, 5)
    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    questions = [question["content"] for question, _ in rows]
    assert len(set(questions)) == 7
    assert [text.split(":")[0] for text in questions] == [f"Question row-number-{index}" for index in range(7)]
    assert len({answer["content"] for _, answer in rows}) == 3


def fake_distilabel(tmp_path: Path, does: str) -> Path:
    """Return a Python that can import `distilabel`; the pipeline itself runs the statement `does`."""
    packages = tmp_path / "packages"
    for name in ("distilabel", "openai"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text("", encoding="utf-8")
    (packages / "distilabel" / "models.py").write_text(
        f"import sys\nif sys.argv[0].endswith('sysgen_distilabel.py'):\n    {does}\n", encoding="utf-8"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("does", "limit", "reason"),
    [
        ("raise RuntimeError('no batch came back')", 60, "RuntimeError: no batch came back"),
        ("__import__('threading').Event().wait()", 1, "was ended after 1 s (--limit)"),
    ],
)
def test_a_failure_or_hang_of_distilabel_is_recorded(
    run: Callable[..., CompletedProcess[str]], tmp_path: Path, does: str, limit: int, reason: str
) -> None:
    python = fake_distilabel(tmp_path, does)
    options = ("--rows", 4, "--latency", 0, "--only", "distilabel", "--distilabel", python, "--limit", limit)
    result = run(*options, "--json", tmp_path / "sysgen.json")
    assert result.returncode == 0, result.stderr
    assert reason in result.stdout
    record = json.loads((tmp_path / "sysgen.json").read_text(encoding="utf-8"))
    assert reason in record["failures"]["distilabel"]
    assert record["measurements"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "ours,curator"], "--only: there is no 'curator'. Choose from bare, ours, distilabel."),
        (["--only", "distilabel"], "--distilabel: name the Python that has it."),
        (["--distilabel", "/no/such/python"], "--distilabel /no/such/python: no Python with distilabel (No such file"),
        (["--json", "/no/such/folder/sysgen.json"], "--json /no/such/folder/sysgen.json: there is no folder"),
    ],
)
def test_invalid_options_are_errors(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    error = refused("sysgen", "--rows", 4, *arguments)
    assert error.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.skipif("DISTILABEL_PYTHON" not in os.environ, reason="DISTILABEL_PYTHON names no Python with distilabel")
def test_distilabel_does_the_same_four_calls(run: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    file = tmp_path / "sysgen.json"
    result = run("--rows", ROWS, "--latency", LATENCY, "--only", "distilabel", "--distilabel",
                 os.environ["DISTILABEL_PYTHON"], "--input-batch-size", 16, "--json", file)  # fmt: skip
    assert result.returncode == 0, result.stderr
    (measured,) = json.loads(file.read_text(encoding="utf-8"))["measurements"]
    assert measured["rows"] == ROWS
    assert measured["answered"] == dict.fromkeys(("generate", "verify", "answer", "judge"), ROWS)
