"""How a run ended, and how often it was started again: outcome.json, the last lines on the screen, report.md."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from train.errors import UserError
from train.loop.preemption import Preemption
from train.loop.saving import Saver
from train.recipe import SaveSection
from train.sft import main

SAVING = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": ..., "max_steps": 4}
KILLED_AT_STEP_4 = """
import os, sys
from train.loop.saving import Saver
from train.sft import main

save = Saver.save
Saver.save = lambda self, step, *a, **b: os.kill(os.getpid(), 9) if step == 4 else save(self, step, *a, **b)
main(sys.argv[1:])
"""


def outcome(run: Path) -> tuple[str, int, str | None]:
    said = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    return said["outcome"], said["step"], said["reason"]


def failing_at(step: int, fault: BaseException) -> Callable[..., bool]:
    """Saving that goes wrong at a step."""
    save = Saver.save

    def fail(self: Saver, at: int, *arguments: object, **more: object) -> bool:
        if at == step:
            raise fault
        return save(self, at, *arguments, **more)

    return fail


def test_a_crash_and_what_a_person_must_mend_are_told_apart_and_report_md_tells_the_restarts(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = str(recipe_file(training=SAVING)), tmp_path / "run"
    with monkeypatch.context() as broken:
        broken.setattr(Saver, "save", failing_at(4, RuntimeError("NCCL: a peer is gone\nand more")))
        with pytest.raises(RuntimeError):
            main(["--recipe", recipe])
    assert outcome(run) == ("crashed", 4, "NCCL: a peer is gone")
    with monkeypatch.context() as broken:
        broken.setattr(Saver, "save", failing_at(4, UserError("the disk is full")))
        assert main(["--recipe", recipe]) == 2
    assert outcome(run) == ("failed", 4, "the disk is full")
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_STEP_4, "--recipe", recipe], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (run / "outcome.json").exists()
    assert main(["--recipe", recipe]) == 0
    assert outcome(run)[:2] == ("finished", 4)
    report = (run / "report.md").read_text(encoding="utf-8")
    assert (
        "| restarts | 3: from step 2 (crashed at step 4: NCCL: a peer is gone), from step 2 (failed at step 4: the "
        "disk is full), from step 2 (killed) |" in report
    )
    assert "| training time since step 2 |" in report
    assert main(["--recipe", recipe, "--resume", "never"]) == 0
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "restarts" not in report
    assert "| training time |" in report


def test_a_run_that_stops_says_where_it_goes_on(
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where its last checkpoint could not be written: then from the one before."""
    recipe, run = str(recipe_file(training={**SAVING, "max_steps": 8})), tmp_path / "run"
    asked = Preemption.asked
    monkeypatch.setattr(Preemption, "asked", lambda self: self.step >= 1 or asked(self))
    assert main(["--recipe", recipe]) == 0
    assert capsys.readouterr().out.endswith(f"stopped; the same command goes on from {run / 'checkpoint-2'}\n")

    def no_room(self: Saver) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Preemption, "asked", lambda self: self.step >= 4 or asked(self))
    monkeypatch.setattr(Saver, "_room", no_room)
    assert main(["--recipe", recipe, "save.on_error=warn"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"checkpoint-5 couldn't be written: .* The run stops without it \(save.on_error: warn\)\.", shown)
    assert shown.endswith(f"stopped; the same command goes on from {run / 'checkpoint-2'}\n")


def test_a_time_limit_that_is_over_before_the_first_step_is_refused(
    recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    """Each attempt would save and stop after one step."""
    recipe = recipe_file(save={"time_limit": "2:00"})
    said = "save.time_limit: 2:00 is no more than save.seconds_before_end (120)"
    assert said in refused("--recipe", recipe)
    assert said in refused("--recipe", recipe, "--check")
    Preemption("run", SaveSection(time_limit="2:01"))
