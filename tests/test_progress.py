"""Progress of long operations in a terminal and in a log file."""

import pytest

from train import progress
from train.progress import SECONDS_BETWEEN_LINES, progress_bar


def test_nested_bars_count_in_their_own_units(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich treat the output as a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("training", total=5, unit="steps") as training:
        training.part("evaluating", 7, "batches").advance(2)
    last = {
        name: line
        for line in capsys.readouterr().out.splitlines()
        for name in ("training", "evaluating")
        if name in line
    }
    assert "steps" in last["training"]
    assert "2/7" in last["evaluating"]
    assert "batches" in last["evaluating"]
    assert "steps" not in last["evaluating"]


def test_a_log_file_gets_a_line_per_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1_000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress_bar("training", total=100, unit="steps", done=40) as training:
        for step in range(41, 45):
            now += SECONDS_BETWEEN_LINES / 2
            training.advance()
            if step == 43:
                training.show("step 43/100")  # replaces a progress line
        shown = capsys.readouterr().out.splitlines()
        now += SECONDS_BETWEEN_LINES / 2
        training.advance()
    assert shown == ["training: 42 of 100 steps (42%), 7m15s left", "step 43/100"]
    assert capsys.readouterr().out == "training: 45 of 100 steps (45%), 6m52s left\n"
