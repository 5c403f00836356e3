"""Best model: selection, a resumed run with another metric, a lost checkpoint."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.loop.checkpoint.manifest import read_checkpoint
from train.loop.checkpoint.writer import CheckpointWriter
from train.sft import main

TRAINING = {
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "num_train_epochs": ...,
    "max_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_system_gain",
    "bf16": False,
}


@pytest.fixture
def arguments_of(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that writes a recipe with validation rows under several system messages: the run's arguments."""
    path = tmp_path / "held_out.jsonl"
    systems = ["Speak like a river.", "Speak like a stone.", "Be a paper window."]
    with path.open("w", encoding="utf-8") as lines:
        for row in range(9):
            texts = {"system": systems[row % 3], "user": f"question {row // 3}", "assistant": f"river {row}"}
            messages = [{"role": role, "content": text} for role, text in texts.items()]
            lines.write(json.dumps({"messages": messages}) + "\n")

    def write(**sections: object) -> list[str]:
        training = TRAINING | sections.pop("training", {})  # type: ignore[operator]
        content = {"data": {"validation": [{"path": str(path)}]}, "system_gain": {"rows": 9}, **sections}
        return ["--recipe", str(recipe_file(training=training, **content))]

    return write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def measured(run: Path, metric: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[metric] for line in lines if metric in line}


def loaded(run: Path) -> int:
    return measured(run, "loaded_step").popitem()[1]


def assert_is_model_of(step: int, run: Path) -> None:
    saved, expected = (load_file(folder / "model.safetensors") for folder in (run, run / f"checkpoint-{step}"))
    assert all(torch.equal(saved[name], expected[name]) for name in saved.keys() | expected.keys())


def test_a_new_metric_selects_among_existing_checkpoints(
    arguments_of: Callable[..., list[str]], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gain is smaller than any loss: as a loss it would stay the best for good."""
    arguments = arguments_of()
    assert main(arguments) == 0
    gains = measured(run, "eval_system_gain")
    assert 0 < max(gains.values()) < min(measured(run, "eval_loss").values())
    later = ["--resume", str(run / "checkpoint-3"), "--resume-anyway", "training.metric_for_best_model"]
    capsys.readouterr()
    assert main([*arguments, *later, "training.metric_for_best_model=eval_loss"]) == 0
    losses = measured(run, "eval_loss")
    before = min((1, 2, 3), key=losses.__getitem__)
    assert (
        f"best model so far by eval_loss, of the existing checkpoints: checkpoint-{before}" in capsys.readouterr().out
    )
    assert loaded(run) == min(losses, key=losses.__getitem__)
    assert_is_model_of(loaded(run), run)


def test_other_rows_for_the_gain_are_refused_if_the_gain_selects_the_best_model(
    arguments_of: Callable[..., list[str]],
    run: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = arguments_of()
    assert main(arguments) == 0
    later = [*arguments, "--resume", str(run / "checkpoint-3"), "system_gain.rows=4"]
    assert "system_gain.rows was 9 and is 4" in refused(*later)
    capsys.readouterr()
    assert main([*later, "--resume-anyway", "system_gain.rows"]) == 0
    output = capsys.readouterr().out
    assert "the search for the best model begins again at step 3" in output
    assert "(system_gain.rows)" in output
    gains = measured(run, "eval_system_gain")
    assert loaded(run) == max((4, 5), key=gains.__getitem__)
    assert "| system gain in nats per token, after step 4" in (run / "report.md").read_text(encoding="utf-8")


def test_other_rows_for_the_gain_are_reported_if_the_gain_selects_nothing(
    arguments_of: Callable[..., list[str]], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments_of(training={"metric_for_best_model": "eval_loss"})
    assert main(arguments) == 0
    best = loaded(run)
    capsys.readouterr()
    assert main([*arguments, "--resume", str(run / "checkpoint-3"), "system_gain.rows=4"]) == 0
    assert "changed since checkpoint-3: system_gain.rows 9 -> 4 (in force from step 4)" in capsys.readouterr().out
    assert loaded(run) == best


@pytest.fixture(params=["before", "in the background"])
def no_room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the disk full for the checkpoints of these steps: before files are written, or when they are complete."""

    def take(*steps: int) -> None:
        save, now = CheckpointWriter.save, [0]
        name = "_check_room" if request.param == "before" else "_publish"
        act = getattr(CheckpointWriter, name)

        def of_step(self: CheckpointWriter, step: int, *args: object, **more: object) -> bool:
            now[0] = step
            return save(self, step, *args, **more)  # type: ignore[arg-type]

        def fail(self: CheckpointWriter, *args: object) -> None:
            if now[0] in steps:
                raise OSError(errno.ENOSPC, "no room")
            act(self, *args)

        monkeypatch.setattr(CheckpointWriter, "save", of_step)
        monkeypatch.setattr(CheckpointWriter, name, fail)

    return take


def test_a_run_ends_with_its_best_model_even_if_its_checkpoint_had_no_room(
    arguments_of: Callable[..., list[str]], run: Path, no_room: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The last step was the best, and is in memory."""
    arguments = arguments_of(save={"on_error": "warn"})
    assert main([*arguments, "--resume", "never"]) == 0
    gains = measured(run, "eval_system_gain")
    assert max(gains, key=gains.__getitem__) == 5
    expected = load_file(run / "checkpoint-5" / "model.safetensors")
    no_room(5)
    assert main([*arguments, "--resume", "never"]) == 0
    assert not (run / "checkpoint-5").exists()
    assert loaded(run) == 5
    weights = load_file(run / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert "validation loss of the saved model (step 5)" in (run / "report.md").read_text(encoding="utf-8")
    assert "this run ends with" not in capsys.readouterr().out


@pytest.mark.parametrize("others", [True, False], ids=["another", "none"])
def test_a_lost_best_model_is_reported(
    others: bool,
    arguments_of: Callable[..., list[str]],
    run: Path,
    no_room: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At a learning rate that ruins the model the first step is the best."""
    training = {"metric_for_best_model": "eval_loss", "learning_rate": 3.0}
    no_room(*([1] if others else range(1, 6)))
    assert main(arguments_of(training=training, save={"on_error": "warn"})) == 0
    losses = measured(run, "eval_loss")
    assert min(losses, key=losses.__getitem__) == 1
    second = min((2, 3, 4, 5), key=losses.__getitem__)
    instead = f"that of step {second} ({losses[second]:.4f})" if others else "the last one, as none was saved before"
    assert (
        f"warning: the model of step 1 was the best by eval_loss ({losses[1]:.4f}), but its checkpoint couldn't be "
        f"written: this run ends with {instead}."
    ) in capsys.readouterr().out
    if others:
        assert_is_model_of(second, run)
        state = json.loads((run / "checkpoint-5" / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["best_global_step"] == second
        assert math.isclose(state["best_metric"], losses[second])
        assert read_checkpoint(run / "checkpoint-5").step == 5
