"""Exit codes of runs that lost rows: 0 only if a setting accepts each loss."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Asked, Reply, Script, error, said, served
from sysgen_runs import configuration, good_everything, lines, question

SCRIPTS = Path(__file__).parents[2] / "scripts"

MIDDLE = {
    "messages": [
        {"role": "user", "content": "question [5]?"},
        {"role": "system", "content": "now in French"},
        {"role": "assistant", "content": "old answer"},
    ]
}
ROWS = [question("question [1]?"), {"messages": []}, question("refused [2]?"), MIDDLE, question("question [4]?")]


async def refuses_some(asked: Asked) -> Reply:
    return error(400, "can't be served") if "refused" in asked.prompt else said(good_everything(asked))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run scripts/sysgen.py in this process; return its exit code, standard output and standard error."""
    spec = importlib.util.spec_from_file_location("sysgen_script", SCRIPTS / "sysgen.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def act(answers: Script, rows: list[dict[str, Any]], **changes: Any) -> tuple[int, str, str]:
        source = tmp_path / "source.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        with served(answers) as server:
            path = configuration(tmp_path, server.url, source, gates={"language": False}, **changes)
            monkeypatch.setattr(sys, "argv", ["sysgen.py", "--config", str(path)])
            code = script.main()
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return act


LOSSES = {
    "no_answer": "1: no answer from the model",
    "unreadable": "1: can't be read: no assistant turn",
    "unsupported": "1: not supported: a system message in the middle of the conversation",
}


@pytest.mark.parametrize("accepted", [(), ("no_answer",), ("unreadable", "unsupported"), tuple(LOSSES)])
def test_losses_that_no_setting_accepts_are_an_error_that_names_each_reason_and_the_key(
    run: Callable[..., Any], tmp_path: Path, accepted: tuple[str, ...]
) -> None:
    code, shown, errors = run(refuses_some, ROWS, accept_losses=list(accepted))
    assert "2 of 5 rows written" in shown
    assert len(lines(tmp_path / "out" / "data" / "rows.jsonl")) == 2
    assert (code, errors == "") == ((0, True) if accepted == tuple(LOSSES) else (2, False))
    for loss, reason in LOSSES.items():
        assert (reason in errors) == (code == 2 and loss not in accepted)
    if code:
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert f"the dropped ones are in {tmp_path / 'out' / 'left_out.jsonl'}." in errors
        assert "write `accept_losses: [no_answer, unreadable, unsupported]`." in errors
        assert ("asks again for those without an answer" in errors) == ("no_answer" not in accepted)


def test_a_row_dropped_by_a_rule_of_the_configuration_is_no_loss(run: Callable[..., Any]) -> None:
    async def script(asked: Asked) -> Reply:
        return said("no tags" if "[2]" in asked.prompt else good_everything(asked))

    code, shown, errors = run(script, [question("question [1]?"), question("question [2]?")])
    assert (code, errors) == (0, "")
    assert "dropped: 1 (50.0%): no valid phrase" in shown


def test_the_same_command_requests_only_the_lost_rows_again(run: Callable[..., Any], tmp_path: Path) -> None:
    prompts: list[str] = []

    async def healthy(asked: Asked) -> Reply:
        prompts.append(asked.prompt)
        return said(good_everything(asked))

    rows = [ROWS[0], ROWS[2], ROWS[4]]
    assert run(refuses_some, rows)[0] == 2
    code, shown, errors = run(healthy, rows)
    assert (code, errors) == (0, "")
    assert "3 of 3 rows written" in shown
    assert lines(tmp_path / "out" / "left_out.jsonl") == []
    assert prompts
    assert all("[2]" in prompt for prompt in prompts)


def test_no_row_is_dropped_when_credit_runs_out(run: Callable[..., Any], tmp_path: Path) -> None:
    async def expires(asked: Asked) -> Reply:
        if asked.number >= 30:
            return error(402, "Insufficient Balance")
        return said(good_everything(asked))

    async def healthy(asked: Asked) -> Reply:
        return said(good_everything(asked))

    rows = [question(f"question [{number}]?") for number in range(40)]
    code, _, errors = run(expires, rows)
    assert code == 2
    assert "402 Said: Insufficient Balance. Add credit, raise the limit" in errors
    assert lines(tmp_path / "out" / "left_out.jsonl") == []
    code, shown, errors = run(healthy, rows)
    assert (code, errors) == (0, "")
    assert "40 of 40 rows written" in shown


def test_the_error_for_rows_that_are_all_too_long_gives_advice(run: Callable[..., Any], tmp_path: Path) -> None:
    async def short(asked: Asked) -> Reply:
        return error(400, "This model's maximum context length is 16 tokens.")

    rows = [question(f"question [{number}]?") for number in range(60)]
    code, _, errors = run(short, rows)
    assert code == 2
    assert errors.startswith("error: no row was written: all 60 were dropped (60: no answer from the model).")
    assert "60 times: 400 Said: This model's maximum context length is 16 tokens" in errors
    assert "Serve the model with a longer context, lower `max_tokens` of the stages" in errors
    places = [row["source"].rpartition(":")[2] for row in lines(tmp_path / "out" / "left_out.jsonl")]
    assert places == [str(number + 1) for number in range(60)]


def test_an_unknown_loss_is_an_error(run: Callable[..., Any]) -> None:
    code, _, errors = run(refuses_some, ROWS, accept_losses=["no_anser"])
    assert code == 2
    assert "accept_losses" in errors
    assert "no_answer, unreadable, unsupported" in errors
