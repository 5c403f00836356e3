"""Empty answers in each stage of SYSGEN: a restart writes the same rows, and a row dropped for one is a loss."""

import functools
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Asked, Reply, Script, said
from sysgen_runs import good_everything, lines, question, run_with
from test_sysgen_losses import run as run  # a fixture

from train.llm.client import Client
from train.llm.concurrency import Backoff

GENERATE, VERIFY, JUDGE = "The next conversation", "Below is a system message", "An assistant was given"


@pytest.fixture(autouse=True)
def _two_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the backoff; with that of a run, six attempts take eleven seconds."""
    impatient = functools.partial(Client, attempts=2, backoff=Backoff(initial=0.001, longest=0.002))
    monkeypatch.setattr("train.datagen.run.Client", impatient)


def empty_in(beginning: str, times: int = 2, text: str = "") -> Script:
    async def script(asked: Asked) -> Reply:
        is_meant = asked.prompt.startswith(beginning) and asked.times < times
        return said(text if is_meant else good_everything(asked))

    return script


async def differently(asked: Asked) -> Reply:
    """Reply without errors, in other words than the first run."""
    return said(good_everything(asked).replace("tester", "pilot").replace("Role>>: Good", "Role>>: Bad"))


WRITTEN: dict[str, tuple[Script, dict[str, Any]]] = {
    "generate, and the next try": (empty_in(GENERATE), {}),
    "generate, and no message": (empty_in(GENERATE), {"on_empty": "keep_without_system"}),
    "verify, and the next try": (empty_in(VERIFY), {}),
    "verify, kept": (empty_in(VERIFY), {"on_unfinished_verification": "keep"}),
    "answer, and the original": (empty_in("question [1]?"), {"on_unfinished_answer": "original"}),
    "judge": (empty_in(JUDGE), {"gates": {"language": False, "judge": True}}),
    "empty but for reasoning": (empty_in(GENERATE, text="<think>hm</think>\n"), {}),
}


@pytest.mark.parametrize(("script", "settings"), WRITTEN.values(), ids=WRITTEN)
def test_a_written_row_stays_the_same_after_a_restart(tmp_path: Path, script: Script, settings: dict[str, Any]) -> None:
    rows = [question("question [1]?")]
    settings = {"gates": {"language": False}} | settings
    run_with(script, tmp_path, rows, **settings)
    files = sorted(path for path in (tmp_path / "out").rglob("*.jsonl"))
    before = [path.read_bytes() for path in files]
    assert before[0]
    _, asked = run_with(differently, tmp_path, rows, **settings)
    assert [path.read_bytes() for path in files] == before
    assert asked == []


LOST: dict[str, tuple[Script, dict[str, Any], str]] = {
    "answer, blank once read": (empty_in("question [1]?", 99, "<|im_end|>"), {}, "new answer empty"),
    "answer, if unfinished ones are kept": (
        empty_in("question [1]?", 99),
        {"on_unfinished_answer": "keep"},
        "new answer empty",
    ),
    "verify": (empty_in(VERIFY, 99), {}, "verification empty"),
    "generate": (empty_in(GENERATE, 99), {}, "system message empty"),
}


@pytest.mark.parametrize(("script", "settings", "reason"), LOST.values(), ids=LOST)
def test_a_row_dropped_for_an_empty_answer_is_a_loss_and_is_requested_again(
    run: Any, tmp_path: Path, script: Script, settings: dict[str, Any], reason: str
) -> None:
    kept = {"messages": [{"role": "system", "content": "x"}, *question("question [2]?")["messages"]]}
    rows = [question("question [1]?"), kept]
    settings = settings | {"existing_system": "keep"}
    code, shown, errors = run(script, rows, **settings)
    assert f"dropped: 1 (50.0%): {reason}" in shown
    assert (code, errors.startswith("error: rows are missing for reasons that no setting accepts")) == (2, True)
    assert f"(1: {reason})" in errors
    assert "write `accept_losses: [no_answer]`" in errors
    if reason == "verification empty":
        assert run(script, rows, accept_losses=["no_answer"], **settings)[::2] == (0, "")

    async def healthy(asked: Asked) -> Reply:
        return said(good_everything(asked))

    assert run(healthy, rows, **settings)[::2] == (0, "")
    assert len(lines(tmp_path / "out" / "data" / "rows.jsonl")) == 2


def test_a_row_with_a_withheld_answer_follows_the_rule_for_unfinished_answers(run: Any) -> None:
    async def withheld(asked: Asked) -> Reply:
        text = good_everything(asked)
        return said("", "content_filter") if asked.prompt == "question [1]?" else said(text)

    code, shown, errors = run(withheld, [question("question [1]?"), question("question [2]?")])
    assert (code, errors) == (0, "")
    assert "dropped: 1 (50.0%): new answer refused" in shown
