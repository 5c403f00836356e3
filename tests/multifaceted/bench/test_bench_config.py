"""scripts/evaluate.py bench --config: a strict YAML file, overridden by options."""

import argparse
import json
import re
from pathlib import Path

import pytest
import yaml
from bench_runs import ROOT, bench_row, command, judging, write_lines
from scripted_server import served

from train.evaluation import bench
from train.evaluation.bench_config import BenchConfig
from train.evaluation.command_options import load_settings

GRADES = judging(lambda row, rubric, time: "[RESULT] 4")


def config_of(*arguments: str | Path) -> BenchConfig:
    """The settings of a command line."""
    parser = argparse.ArgumentParser()
    bench.add_to(parser.add_subparsers())
    return load_settings(parser.parse_args(["bench", *map(str, arguments)]), BenchConfig)


def test_a_run_from_a_file_equals_one_from_options(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(number) for number in range(2)])
    with served(GRADES, models=["judge"]) as server:
        settings = {
            "model": "m",
            "data": [str(data)],
            "server": [server.url],
            "judge": "judge",
            "judge_server": [server.url],
            "judge_top_p": None,
            "judge_extra": {"top_k": 5},
            "no_system": True,
            "runs": 2,
            "output_dir": str(tmp_path / "file"),
        }
        file = tmp_path / "bench.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        assert command("--config", file) == 0
        asked = [request.body for request in server.asked if request.body.get("model") == "judge"]
        options = ("--model", "m", "--data", data, "--server", server.url, "--judge", "judge", "--no-system")
        judge = ("--judge-server", server.url, "--judge-top-p", "null", "--judge-extra", '{"top_k": 5}', "--runs", "2")
        assert command(*options, *judge, "--output-dir", tmp_path / "options") == 0
    assert {body["top_k"] for body in asked} == {5}
    assert not any("top_p" in body for body in asked)
    files = [tmp_path / folder / "bench.json" for folder in ("file", "options")]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    assert records[0] == records[1]
    assert records[0]["judge"]["runs"] == 2


def test_an_option_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text("model: m\njudge: judge\nruns: 2\ntemperature: 0.5\nserver: [a, b]\n", encoding="utf-8")
    config = config_of("--config", file, "--runs", "5", "--temperature", "null", "--server", "c", "--server", "d", "e")
    assert (config.runs, config.temperature, config.server) == (5, None, ("c", "d", "e"))
    assert config_of("--config", file).runs == 2
    assert config_of("--config", file, "--wait-for-server", "1m").wait_for_server == 60


def test_defaults_are_the_papers() -> None:
    config = config_of("--model", "m", "--judge", "j")
    assert config.response_decoding().parameters(0) == {
        "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.03,
    }  # fmt: skip
    assert config.protocol().judge.decoding.parameters(0) == {"temperature": 1.0, "top_p": 0.9}
    assert (config.max_tokens, config.judge_max_tokens) == (1024, 1024)
    assert (config.runs, config.data) == (3, ("kaist-ai/Multifaceted-Bench",))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("jugde: j", "bench.yaml:2: jugde: unknown key. Did you mean `judge`?"),
        ("judge: j\nruns: 0", "bench.yaml:3: runs: found 0. Allowed: "),
        ("judge: j\njudge_extra: {api_key: x}", "bench.yaml:3: judge_extra.api_key: "),
        ("judge: j\njudge_extra: {top_k: .nan}", "--judge-extra: holds a number that JSON cannot represent"),
        ("judge: j\npick_by: first_run", "Did you mean `first-run`?"),
        ("judge: j\njudge: k", "judge: given twice"),
    ],
)
def test_an_error_names_line_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, message: str
) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text(f"model: m\n{lines}\n", encoding="utf-8")
    assert command("--config", file, "--judge-server", "http://localhost:1/v1", "--output-dir", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_without_a_file_an_error_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--model", "m") == 2
    assert capsys.readouterr().err.startswith("error: command line: --judge: missing. The judge's name on its server.")


def test_the_example_is_valid_and_follows_the_paper() -> None:
    config = config_of("--config", ROOT / "recipes" / "bench" / "qwen2.5-judge.yaml")
    config.refuse_contradictions()
    papers = config_of("--model", "m", "--judge", config.judge)
    assert (config.response_decoding(), config.protocol()) == (papers.response_decoding(), papers.protocol())
    assert all((ROOT / path).is_file() for path in config.data)


def test_paths_of_the_file_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/rows")
    file = tmp_path / "bench.yaml"
    file.write_text("model: ~/m\njudge: judge\ndata: [$PLACE/a.jsonl, b.jsonl]\n", encoding="utf-8")
    config = config_of("--config", file)
    assert config.data == ("/rows/a.jsonl", "b.jsonl")
    assert config.model == str(Path("~/m").expanduser())


def test_help_lists_common_options_and_names_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    text = " ".join(re.sub(r"-\n\s*", "-", capsys.readouterr().out).split())
    shown, _, others = text.partition("Less common options, documented as keys of the file of --config: ")
    assert "--judge-server" in shown
    assert "--judge-concurrency" not in shown
    for name in BenchConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    assert "--judge-concurrency" in others
