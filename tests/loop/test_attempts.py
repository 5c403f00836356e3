"""Outcomes and attempts of a run: outcome.json, attempts.jsonl, the last printed lines, report.md."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import main_thread

import pytest
from ranks import launch, sft
from transformers import TrainerState

from train.errors import UserError
from train.loop import run_outcome
from train.loop.checkpoint.writer import CheckpointWriter
from train.loop.finished_run import find_finished_run
from train.loop.preemption import Preemption
from train.loop.preemption_callback import PreemptionCallback
from train.recipe import SaveSection, load_recipe
from train.sft import main

SAVING = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": ..., "max_steps": 4}


def killed_at_step_4(*arguments: str) -> int:
    """Train, and kill the process with SIGKILL when checkpoint 4 is to be saved."""
    save = CheckpointWriter.save

    def save_or_die(self: CheckpointWriter, step: int, *others: object, **more: object) -> bool:
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(self, step, *others, **more)

    CheckpointWriter.save = save_or_die
    return sft(*arguments)


def outcome(run: Path) -> tuple[str, int, str | None]:
    record = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    return record["outcome"], record["step"], record["reason"]


def failing_at(step: int, error: BaseException) -> Callable[..., bool]:
    """Return a `save` that raises `error` at a step."""
    save = CheckpointWriter.save

    def fail(self: CheckpointWriter, at: int, *arguments: object, **more: object) -> bool:
        if at == step:
            raise error
        return save(self, at, *arguments, **more)

    return fail


def test_crashes_and_user_errors_are_distinguished_and_the_report_lists_restarts(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = str(recipe_file(training=SAVING)), tmp_path / "run"
    with monkeypatch.context() as broken:
        broken.setattr(CheckpointWriter, "save", failing_at(4, RuntimeError("NCCL: a peer is gone\nand more")))
        with pytest.raises(RuntimeError):
            main(["--recipe", recipe])
    assert outcome(run) == ("crashed", 4, "NCCL: a peer is gone")
    with monkeypatch.context() as broken:
        broken.setattr(CheckpointWriter, "save", failing_at(4, UserError("the disk is full")))
        assert main(["--recipe", recipe]) == 2
    assert outcome(run) == ("failed", 4, "the disk is full")
    killed = launch(1, None, "--recipe", recipe, logs=tmp_path / "logs", job=killed_at_step_4)
    assert killed.exit_codes == [-signal.SIGKILL]
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


def test_a_finished_run_is_not_trained_again_unless_it_has_changed(
    recipe_file: Callable[..., Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(rows_file, data)
    training = {"num_train_epochs": ..., "max_steps": 2}
    recipe, run = recipe_file(data={"sources": [{"path": str(data)}]}, training=training), tmp_path / "run"
    assert main(["--recipe", str(recipe)]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    screen = capsys.readouterr().out.partition("\nmodel ")[2].partition("\npacked documents")[0].splitlines()
    assert [line.split()[0] for line in screen if line[:1].strip()][-2:] == ["steps", "output"]
    # A path that is wider than a line is kept whole, behind the name of its line too.
    assert all(len(line) <= 80 or len(line[12:].split()) == 1 for line in screen), screen
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["--recipe", str(recipe), "training.logging_steps=2", "data.processes=1"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.startswith("already finished (2 steps, 2") if rank == "0" else shown == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["--recipe", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in lines), lines
    shown = " ".join(" ".join(lines).split())
    assert "`--resume never` replaces the model, another output_dir keeps it." in shown
    assert "a larger training.max_steps trains from the beginning, as no checkpoint was kept" in shown
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    assert main(["--recipe", str(recipe), "--check", "--json", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr().out
    assert f"output {run}, already finished (2 steps, " in " ".join(shown.split())
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["finished"] in " ".join(shown.split())

    def difference(*overrides: str) -> str | None:
        finished, why = find_finished_run(load_recipe(recipe, overrides))
        assert (finished is None) == (why is not None)
        return why

    assert difference() is None
    assert "training.max_steps was 2 and is 3" in str(difference("training.max_steps=3"))
    assert "training.learning_rate was 0.001 and is 0.5" in str(difference("training.learning_rate=0.5"))
    assert "seed was 42 and is 1" in str(difference("seed=1"))
    assert "training.push_to_hub was " in str(difference("training.push_to_hub=true"))
    assert "sequences per step" in str(difference("training.gradient_accumulation_steps=2"))
    assert difference("training.gradient_accumulation_steps=2", "training.per_device_train_batch_size=1") is None
    model, base = run / "model.safetensors", load_recipe(recipe).model.name_or_path
    for path, change, why in (
        (model, lambda: model.write_bytes(before[model][:-100]), "its model.safetensors is damaged"),
        (model, model.unlink, "its model.safetensors is missing"),
        (data, lambda: data.write_bytes(data.read_bytes().replace(b"a", b"b", 1)), f"{data} has changed since"),
        (data, data.unlink, f"{data} is missing"),
    ):
        held = path.read_bytes()
        change()
        assert why in str(difference())
        path.write_bytes(held)
        assert difference() is None
    assert f"model.name_or_path was '{base}' and is '{run}'" in str(difference(f"model.name_or_path={run}"))
    (run / "outcome.json").write_text((run / "outcome.json").read_text(encoding="utf-8").replace("finished", "failed"))
    assert find_finished_run(load_recipe(recipe)) == (None, None)
    (run / "outcome.json").write_text('{"outcome": "finished", "step": 2}')  # as an earlier version wrote it
    assert find_finished_run(load_recipe(recipe)) == (None, None)


def test_a_finished_run_with_checkpoints_explains_how_to_train_longer(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = str(recipe_file(training=SAVING)), tmp_path / "run"
    assert main(["--recipe", recipe]) == 0
    capsys.readouterr()
    assert main(["--recipe", recipe]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    longer = "a larger training.max_steps and --resume-anyway training.max_steps continue from"
    assert f"{longer} {run / 'checkpoint-4'}." in shown
    finished = load_recipe(recipe)
    (run / "checkpoint-4").rename(tmp_path / "moved")
    assert "its checkpoint-4 is missing or damaged" in str(find_finished_run(finished))
    shutil.move(run / "checkpoint-2", tmp_path)
    assert find_finished_run(finished)[0] is not None  # all are gone: somebody made room
    (tmp_path / "moved").rename(run / "checkpoint-4")
    assert find_finished_run(finished)[0] is not None
    assert main(["--recipe", recipe, "training.max_steps=5"]) == 2
    assert "training.max_steps was 4 and is 5" in capsys.readouterr().err
    assert main(["--recipe", recipe, "training.max_steps=5", "--resume-anyway", "training.max_steps"]) == 0
    assert outcome(run)[:2] == ("finished", 5)


LONGER = {**SAVING, "max_steps": 6}


def interrupting(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send Ctrl-C at the end of step 2, again during the save of step 3, and while outcome.json is written."""
    step_end, save, write = PreemptionCallback.on_step_end, CheckpointWriter.save, run_outcome.write_text
    finish, sync = CheckpointWriter.finish, CheckpointWriter._sync

    def first(self: PreemptionCallback, args: object, state: TrainerState, *others: object, **more: object) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        step_end(self, args, state, *others, **more)

    def second(self: CheckpointWriter, step: int, put: Callable[[], None], *others: object, **more: object) -> bool:
        def half() -> None:
            put()
            if moment == "half-way":
                os.kill(os.getpid(), signal.SIGINT)

        return save(self, step, half if step == 3 else put, *others, **more)

    def second_after(self: CheckpointWriter, **more: bool) -> bool:
        step, finished = self.step_under_way, finish(self, **more)
        if moment == "after" and step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return finished

    def second_in_background(self: CheckpointWriter, folder: Path, names: list[str]) -> object:
        if moment == "in the background" and folder.name == "checkpoint-3":
            # a signal between the last look for one and the blocking call would be handled after the call
            while sys._current_frames()[main_thread().ident].f_code.co_name != "wait" or self._abandoned.wait(0.05):
                pass
            os.kill(os.getpid(), signal.SIGINT)
            assert self._abandoned.wait(60)
        return sync(self, folder, names)

    def third(path: Path, text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(path, text)

    monkeypatch.setattr(PreemptionCallback, "on_step_end", first)
    monkeypatch.setattr(CheckpointWriter, "save", second)
    monkeypatch.setattr(CheckpointWriter, "finish", second_after)
    monkeypatch.setattr(CheckpointWriter, "_sync", second_in_background)
    monkeypatch.setattr(run_outcome, "write_text", third)  # that of outcome.json


MOMENTS = [("half-way", "checkpoint-2"), ("in the background", "checkpoint-2"), ("after", "checkpoint-3")]


@pytest.mark.parametrize(("moment", "newest"), MOMENTS)
def test_a_second_ctrl_c_leaves_a_true_outcome(
    moment: str,
    newest: str,
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, run = str(recipe_file(training=LONGER)), tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupting(moment, patch)
        assert main(["--recipe", recipe]) == 130
    assert "stopping after this step, with a checkpoint; Ctrl-C again stops now" in capsys.readouterr().out
    assert outcome(run) == ("interrupted", 3, f"Ctrl-C; the newest complete checkpoint is {newest}")
    whole = [path.name for path in run.glob("checkpoint-*") if (path / "COMPLETE.json").is_file()]
    assert sorted(whole)[-1] == newest
    if newest == "checkpoint-2":
        assert main(["--recipe", recipe]) == 0
        assert f"resuming from {run / newest}" in capsys.readouterr().out
        assert outcome(run)[:2] == ("finished", 6)


def interrupted_twice(*arguments: str) -> int:
    """Train, and send Ctrl-C twice."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    interrupting("half-way", pytest.MonkeyPatch())
    return sft(*arguments)


def test_a_second_ctrl_c_ends_the_process_with_130_and_no_traceback(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_file(training=LONGER)
    result = launch(1, None, "--recipe", recipe, logs=tmp_path / "logs", job=interrupted_twice)
    assert result.exit_codes == [130]
    assert "Traceback" not in result.output[0]
    assert result.output[0].endswith("stopped\n")
    assert outcome(tmp_path / "run")[0] == "interrupted"


def test_a_stopped_run_reports_where_it_continues(
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also if its last checkpoint could not be written: then from the one before it."""
    recipe, run = str(recipe_file(training={**SAVING, "max_steps": 8})), tmp_path / "run"
    is_requested = Preemption.is_requested
    monkeypatch.setattr(Preemption, "is_requested", lambda self: self.step >= 1 or is_requested(self))
    assert main(["--recipe", recipe]) == 0
    assert capsys.readouterr().out.endswith(f"stopped; the same command continues from {run / 'checkpoint-2'}\n")

    def no_room(self: CheckpointWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Preemption, "is_requested", lambda self: self.step >= 4 or is_requested(self))
    monkeypatch.setattr(CheckpointWriter, "_check_room", no_room)
    assert main(["--recipe", recipe, "save.on_error=warn"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"checkpoint-5 couldn't be written: .* The run stops without it \(save.on_error: warn\)\.", shown)
    assert shown.endswith(f"stopped; the same command continues from {run / 'checkpoint-2'}\n")


def test_a_time_limit_that_is_over_before_the_first_step_is_refused(
    recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    """Each attempt would save and stop after one step."""
    recipe = recipe_file(save={"time_limit": "2:00"})
    message = "save.time_limit: 2:00 must be longer than save.seconds_before_end (120)"
    assert message in refused("--recipe", recipe)
    assert message in refused("--recipe", recipe, "--check")
    Preemption("run", SaveSection(time_limit="2:01"))
