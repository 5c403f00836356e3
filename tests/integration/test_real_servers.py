"""SYSGEN, the collection, the bench and IFEval end to end against real servers of a small model."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from real_servers import ROOT, RealServer, free_port, running
from transformers import AutoTokenizer

from train.data.sources.source import read_conversations
from train.multifaceted.judge import parse_score
from train.recipe import Source

DATA = ROOT / "recipes" / "smollm2-135m" / "data"
TRANSFORMERS = "transformers"


@pytest.fixture(scope="module", params=[TRANSFORMERS, "llama.cpp"])
def server(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """Start one server of each kind for all tests of this file."""
    with running(request.param, smollm2, tmp_path_factory.mktemp("server") / "log") as started:
        yield started


def script(name: str) -> ModuleType:
    """Return a command of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_command", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, settings: dict[str, Any], folder: Path, *options: str) -> int:
    """Run scripts/NAME.py with these settings in this process; return its exit code."""
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({**settings, "output_dir": str(folder / "out")}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", "--config", str(config), *options])
        return script(name).main()


def settings_for(server: RealServer, limit: int, **more: Any) -> dict[str, Any]:
    """Return the settings that SYSGEN and the collection share: the first of our questions."""
    return {
        "model": server.model,
        "servers": [{"base_url": server.url, "concurrency": 2}],
        "data": {"sources": [{"path": str(ROOT / "train" / "pressure" / "questions.jsonl")}], "limit": limit},
        "retries": 0,
        **more,
    }


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "report.json").read_text("utf-8"))


def written(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the messages of each written row."""
    return [row.messages for _, row in read_conversations(Source(path=str(folder / "out" / "data")))]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_sysgen_writes_rows_with_a_common_message(
    server: RealServer, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"max_tokens": 12, "temperature": 0.0}
    settings = settings_for(server, 2, message="common", on_unfinished_answer="keep", answer=answer)
    assert run_script("sysgen", settings, tmp_path) == 0
    assert "2 answers (0 from the journal)" in capsys.readouterr().out
    rows = written(tmp_path)
    assert [[message["role"] for message in row] for row in rows] == [["system", "user", "assistant"]] * 2
    assert all(row[2]["content"] for row in rows)
    spent = report(tmp_path)["spent"]["answer"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer.apply_chat_template(row[:2], tokenize=False, add_generation_prompt=True) for row in rows]
    assert spent["prompt_tokens"] == sum(len(tokenizer(prompt).input_ids) for prompt in prompts)
    assert (spent["requests"], spent["completion_tokens"] <= 24) == (2, True)
    assert run_script("sysgen", settings, tmp_path) == 0
    assert "2 answers (2 from the journal)" in capsys.readouterr().out


def test_sysgen_counts_rows_that_a_small_model_gets_wrong(
    server: RealServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight tokens hold no phrase with both of its tags: the row is dropped with a reason, and the run reports it."""
    settings = settings_for(server, 1, generate={"max_tokens": 8, "temperature": 0.0})
    assert run_script("sysgen", settings, tmp_path) == 2
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.startswith("no row was written: all 1 were dropped (1: ")
    facts = report(tmp_path)
    assert (facts["rows"], facts["rows_written"], sum(facts["left_out"].values())) == (1, 0, 1)
    assert {stage: spent["requests"] for stage, spent in facts["spent"].items()} == {"generate": 1}


def test_a_collection_repeats_no_request(
    server: RealServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((ROOT / "recipes" / "collection" / "smollm2-135m.yaml").read_text("utf-8"))
    settings |= settings_for(server, 1, sets_per_instruction=1)
    for stage, limit in (("describe", 48), ("message", 48), ("answer", 12)):
        settings[stage] = {"max_tokens": limit, "temperature": 0.0}
    code = run_script("collection", settings, tmp_path)
    facts = report(tmp_path)
    assert (facts["rows"], facts["instructions"], facts["sets"]) == (1, 1, 1)
    assert facts["sets_written"] + sum(facts["sets_left_out"].values()) == 1
    assert code == (0 if facts["sets_written"] else 2)
    if facts["sets_written"]:
        (row,) = written(tmp_path)
        assert [message["role"] for message in row] == ["system", "user", "assistant"]
    requests = sum(of["requests"] for of in facts["spent"].values())
    assert requests >= 1
    assert all(of["completion_tokens"] > 0 for of in facts["spent"].values())
    assert f"{requests} answers (0 from the journal)" in capsys.readouterr().out
    assert run_script("collection", settings, tmp_path) == code
    assert f"{requests} answers ({requests} from the journal)" in capsys.readouterr().out


def test_the_bench_keeps_each_answer_and_scores_only_answers_with_a_score(
    server: RealServer, command: Callable[..., int], tmp_path: Path
) -> None:
    asked = ("bench", "--data", DATA / "bench.jsonl", "--limit", "1", "--output-dir", tmp_path / "out")
    model = ("--model", server.model, "--server", server.url, "--concurrency", "2", "--max-tokens", "12")
    drawn = ("--temperature", "0", "--top-p", "1", "--repetition-penalty", "1")
    judge = (
        "--judge",
        server.model,
        "--judge-server",
        server.url,
        "--judge-concurrency",
        "2",
        "--judge-max-tokens",
        "12",
    )
    code = command(*asked, *model, *drawn, *judge, "--judge-temperature", "0", "--runs", "1", "--retries", "0")
    (row,) = lines(tmp_path / "out" / "bench_rows.jsonl")
    record = json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))
    assert row["response"]
    assert row["answers"][0]["finish_reason"] in ("length", "stop")
    judgements = [judgement for (judgement,) in row["answers"][0]["judgements"]]
    assert [len(judgement["texts"]) for judgement in judgements] == [1] * 4
    assert [parse_score(judgement["texts"][0]) for judgement in judgements] == [
        judgement["score"] for judgement in judgements
    ]
    unread = sum(judgement["score"] is None for judgement in judgements)
    missing = record["missing"]["judgements_missing"]
    assert missing["unparsable"] + missing.get("unfinished", 0) == unread
    assert code == (2 if missing.get("unfinished", 0) == 4 else 0)  # all cut: nothing was measured
    assert (record["score"]["mean"] is None) == (unread == 4)


def test_ifeval_checks_the_servers_answers(
    server: RealServer, smollm2: Path, command: Callable[..., int], tmp_path: Path
) -> None:
    asked = ("ifeval", "--data", DATA / "system_ifeval.jsonl", "--limit", "2", "--max-new-tokens", "12")
    model = ("--model", server.model, "--server", server.url, "--concurrency", "2", "--output-dir", tmp_path / "out")
    assert command(*asked, *model) == 0
    answers = lines(tmp_path / "out" / "ifeval_answers.jsonl")
    assert all(answer["answer"] and answer["why"] is None for answer in answers)
    record = json.loads((tmp_path / "out" / "ifeval.json").read_text("utf-8"))
    assert sum(record["system"]["endings"].values()) == len(answers) == 2
    followed = [verdict for answer in answers for verdict in answer["strict"]]
    assert record["system"]["constraint_strict"]["value"] == sum(followed) / len(followed)


def check(
    server: RealServer, folder: Path, capsys: pytest.CaptureFixture[str], url: str = "", model: str = ""
) -> tuple[int, str]:
    """Run `sysgen.py --check` with another address or model; return its exit code and its error."""
    settings = settings_for(server, 1)
    settings |= {"model": model or server.model, "servers": [{"base_url": url or server.url}]}
    code = run_script("sysgen", settings, folder, "--check")
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert shown.err.count("error: ") == (code != 0)
    return code, shown.err.partition("error: ")[2]


def test_a_check_finds_the_server_the_model_and_the_address(
    server: RealServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(server, tmp_path, capsys) == (0, "")
    code, error = check(server, tmp_path, capsys, model="no/such-model")
    assert (code, "'no/such-model'" in error) == (2, True)  # llama.cpp would answer, as the model that it has
    nothing = f"http://127.0.0.1:{free_port()}/v1"
    code, error = check(server, tmp_path, capsys, url=nothing)
    assert (code, error.startswith(f"{nothing} can't be reached (connection refused")) == (2, True)
    code, error = check(server, tmp_path, capsys, url=server.url.removesuffix("/v1"))
    if server.kind == TRANSFORMERS:
        assert (code, f"Write {server.url} as base_url" in error) == (2, True)
    else:
        assert code == 0  # llama.cpp serves both paths
