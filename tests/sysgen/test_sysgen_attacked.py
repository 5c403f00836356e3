"""Unusual models and settings: reasoning in the text, a run that reads its own output, a full disk."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted_model import EIGHT
from scripted_server import Asked, Reply, Script, said, served

from train.errors import UserError
from train.sysgen.config import load_config
from train.sysgen.run import RunResult, run

GENERATED = "<<Role>>You are a tester.<</Role>>"
QUESTION = {"role": "user", "content": "question [1] of the same kind?"}
OLD = {"role": "assistant", "content": "Tea is made of leaves and water, and nothing else. " * 4}


def stage_of(asked: Asked) -> str:
    if asked.prompt.startswith("The next conversation"):
        return "generate"
    return "verify" if "Judge for each of the eight" in asked.prompt else "answer"


def answers(**by_stage: Reply) -> Script:
    given = {
        "generate": said(GENERATED),
        "verify": said("\n".join(f"<<{tag}>>: Good" for tag in EIGHT)),
        "answer": said("A new one."),
    } | by_stage

    async def script(asked: Asked) -> Reply:
        return given[stage_of(asked)]

    return script


def run_with(script: Script, folder: Path, count: int = 1, **changes: Any) -> RunResult:
    source = folder / "source.jsonl"
    source.write_text(json.dumps({"messages": [QUESTION, OLD]}) + "\n", encoding="utf-8")
    source.write_text(source.read_text("utf-8") * count, encoding="utf-8")
    with served(script) as server:
        return run(load_config(configuration(folder, server.url, source, **changes)))


def configuration(folder: Path, url: str, source: Path, **changes: Any) -> Path:
    path = folder / "config.yaml"
    settings = {
        "model": "m",
        "servers": [{"base_url": url, "concurrency": 4}],
        "data": {"sources": [{"path": str(source)}]},
        "output_dir": str(folder / "out"),
    } | changes
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("opener", ["<think>\n", ""])
def test_reasoning_is_no_part_of_message_verdict_and_answer(tmp_path: Path, opener: str) -> None:
    reasoned = f"{opener}Perhaps <<Style>>be rude<</Style>> or <<Role>>: Bad\n</think>\n\n"
    script = answers(
        generate=said(reasoned + GENERATED),
        verify=said(reasoned + "<<Role>>: Good"),
        answer=said(reasoned + "A new one."),
    )
    done = run_with(script, tmp_path)
    (row,) = lines(tmp_path / "out" / "data" / "rows.jsonl")
    assert [turn["content"] for turn in row["messages"]] == ["You are a tester.", QUESTION["content"], "A new one."]
    assert row["sysgen"]["written_by_model"] == GENERATED
    for stage in ("generate", "verify", "answer"):
        assert done.stats.events[f"{stage}: reasoning taken out"] == 1
        assert f"| {stage}: reasoning taken out | 1 |" in done.report.read_text("utf-8")


@pytest.mark.parametrize(
    ("before", "after", "event"),
    [
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>", "<|return|>", ""),
        ("Hm, as <<Role>>: Bad.</think>", "", "reasoning taken out"),
        ("◁think▷Hm.◁/think▷", "", "reasoning taken out"),
        ("", "<|im_end|>\n", "control tokens taken off the end"),
        ("", "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nMore!", "ran on after its end, and was cut there"),
    ],
)
def test_control_tokens_and_reasoning_of_servers_are_in_no_row(
    tmp_path: Path, before: str, after: str, event: str
) -> None:
    replies = {"generate": GENERATED, "verify": "<<Role>>: Good", "answer": "A new one."}
    done = run_with(answers(**{stage: said(before + text + after) for stage, text in replies.items()}), tmp_path)
    (row,) = lines(tmp_path / "out" / "data" / "rows.jsonl")
    assert [turn["content"] for turn in row["messages"]] == ["You are a tester.", QUESTION["content"], "A new one."]
    assert row["sysgen"]["written_by_model"] == GENERATED
    for stage in replies:
        assert done.stats.events[f"{stage}: {event or 'reasoning taken out'}"] == 1


def test_an_answer_without_an_end_to_its_reasoning_is_not_written(tmp_path: Path) -> None:
    done = run_with(answers(answer=said("Tea.<|START_THINKING|>Or coffee.<|END_THINKING|>Coffee.")), tmp_path)
    assert done.stats.events["answer: reasoning without an end, and nothing said"] == 1
    (row,) = lines(tmp_path / "out" / "left_out.jsonl")
    assert row["reason"] == "new answer without an end to its reasoning"
    assert row["detail"] == "its reasoning has no end, finish_reason stop"


@pytest.mark.parametrize("stage", ["generate", "verify"])
def test_a_message_or_verdict_of_nothing_but_reasoning_is_requested_again(tmp_path: Path, stage: str) -> None:
    done = run_with(answers(**{stage: said("<think>Perhaps <<Role>>: Good")}), tmp_path, retries=1)
    (row,) = lines(tmp_path / "out" / "left_out.jsonl")
    what = {"generate": "system message", "verify": "verification"}[stage]
    assert row["reason"] == f"{what} without an end to its reasoning"
    assert done.stats.events[f"{stage}: reasoning without an end, and nothing said"] == 2


@pytest.mark.parametrize("choice", ["drop", "keep"])
def test_an_answer_of_nothing_but_reasoning_is_not_written(tmp_path: Path, choice: str) -> None:
    script = answers(answer=said("<think>Perhaps, or perhaps", "length"))
    done = run_with(script, tmp_path, on_unfinished_answer=choice)
    (row,) = lines(tmp_path / "out" / "left_out.jsonl")
    assert row["reason"] == "new answer cut at the token limit"
    assert done.stats.events["answer: reasoning without an end, and nothing said"] == 1


def test_a_tool_call_as_text_is_not_written(tmp_path: Path) -> None:
    run_with(answers(answer=said('I look it up.\n<tool_call>\n{"name": "search"}\n</tool_call>')), tmp_path)
    (row,) = lines(tmp_path / "out" / "left_out.jsonl")
    assert row["reason"] == "new answer calls a tool"


def test_reasoning_tags_in_the_middle_of_an_answer_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_with(answers(answer=said("First <think>hm</think> then")), tmp_path)
    assert done.stats.events["answer: tags of reasoning left in the text"] == 1
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    from sysgen import main

    monkeypatch.setattr(sys, "argv", ["sysgen.py", "--config", str(tmp_path / "config.yaml")])
    assert main() == 0  # from the journal
    assert capsys.readouterr().out.splitlines()[-1] == (
        "warning: tags of reasoning left in the text: 1 answer (answer 1); the text may speak of them, or hold "
        "reasoning: read some before you use it"
    )


def test_original_answers_get_no_unchecked_constraints(tmp_path: Path) -> None:
    script = answers(answer=said("CUT.", "length"))
    constraints = {"share": 1.0, "at_most": 1, "attempts": 1}
    done = run_with(script, tmp_path, 40, constraints=constraints, on_unfinished_answer="original")
    rows = lines(tmp_path / "out" / "data" / "rows.jsonl")
    assert len(rows) == 40
    for row in rows:
        assert row["messages"] == [{"role": "system", "content": "You are a tester."}, QUESTION, OLD]
        assert row["sysgen"]["constraints"] == []
    assert done.stats.constraints == {}


def test_a_message_with_a_format_gets_no_second_one(tmp_path: Path) -> None:
    systems = []

    async def script(asked: Asked) -> Reply:
        if stage_of(asked) == "answer":
            systems.append(asked.body["messages"][0]["content"])
        return await answers(generate=said("<<Format>>Write one short paragraph.<</Format>>"))(asked)

    run_with(script, tmp_path, 60, constraints={"share": 1.0, "attempts": 1})
    asked_for = [text.casefold() for text in systems]
    assert len(set(asked_for)) > 20
    words = ("json", "paragraphs", "bullet", "numbered", "headline", "heading", "quotes", "quoted")
    assert not [text for text in asked_for if any(word in text for word in words)]


def test_a_run_that_would_overwrite_its_source_is_an_error(tmp_path: Path) -> None:
    run_with(answers(), tmp_path)
    before = (tmp_path / "out" / "data" / "rows.jsonl").read_bytes()
    for source in ("out/data", "out/data/rows.jsonl", "out/../out/data/*.jsonl"):
        config = configuration(tmp_path, "http://127.0.0.1:9/v1", tmp_path / source)
        with pytest.raises(UserError, match=r"is in the output_dir of this run, .* name another output_dir"):
            run(load_config(config))
    assert (tmp_path / "out" / "data" / "rows.jsonl").read_bytes() == before


def test_the_report_on_a_common_message_has_no_skipped_phases(tmp_path: Path) -> None:
    done = run_with(answers(), tmp_path, 3, message="common")
    facts = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert facts["rows_through_phase"] == {"read": 3, "answered": 3}
    assert "a system message was written" not in done.report.read_text("utf-8")


def test_a_sample_without_a_system_message_is_shown_completely(tmp_path: Path) -> None:
    done = run_with(answers(generate=said("no tags")), tmp_path, on_empty="keep_without_system")
    assert f"**user**\n\n```text\n{QUESTION['content']}" in done.report.read_text("utf-8")


@pytest.mark.parametrize("stage", ["generate", "verify", "answer", "judge"])
def test_setting_one_key_of_a_stage_keeps_the_defaults_of_the_others(tmp_path: Path, stage: str) -> None:
    config = configuration(tmp_path, "http://127.0.0.1:9/v1", tmp_path / "source.jsonl")
    plain, changed = getattr(load_config(config), stage), getattr(load_config(config, [f"{stage}.top_p=0.5"]), stage)
    assert changed.model_dump() == plain.model_dump() | {"top_p": 0.5}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("{model: other}", "generate.extra.model: set by the run itself"),
        ("{stream: true}", "generate.extra.stream: not supported: each answer is read in one piece"),
        ("{temperature: 1.0}", "generate.extra.temperature: not set here: write `generate.temperature`."),
        ("{bias: .inf}", "generate.extra: holds a number that JSON can't"),
    ],
)
def test_invalid_fields_in_extra_are_an_error(tmp_path: Path, extra: str, message: str) -> None:
    config = configuration(tmp_path, "http://127.0.0.1:9/v1", tmp_path / "source.jsonl")
    with pytest.raises(UserError) as failure:
        load_config(config, [f"generate.extra={extra}"])
    assert message in str(failure.value)


def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "sysgen.py"
    source = tmp_path / "source.jsonl"
    rows = ({"messages": [QUESTION | {"content": f"question [{number}]?"}, OLD]} for number in range(40))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # No file may grow beyond so many bytes: the journal's, and then that of the rows.
    for limit in (200_000, 40_000):
        with served(answers(answer=said("A new one. " * 100))) as server:
            folder = str(tmp_path / str(limit))
            config = configuration(tmp_path, server.url, source, output_dir=folder, gates={"language": False})
            if limit == 40_000:
                run(load_config(config))
                (tmp_path / str(limit) / "data" / "rows.jsonl").unlink()
            code = (
                "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
                f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.argv = sys.argv[1:];"
                "runpy.run_path(sys.argv[0], run_name='__main__')"
            )
            command = [sys.executable, "-c", code, str(script), "--config", str(config)]
            failed = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert failed.returncode == 2, failed.stderr
        assert failed.stderr.startswith("error: ")
        assert len(failed.stderr.splitlines()) == 1
