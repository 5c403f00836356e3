"""Anomaly guards: steps that are not finite change no weight and are reported, as are loss spikes."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from broken_steps import poison, rows, suspects
from safetensors.torch import load_file

from train.loop.batch_info import BatchInfo
from train.loop.guards.anomalies import Guards, Suspect
from train.loop.output_dir import SUSPECTS
from train.recipe import GuardsSection
from train.sft import main


@pytest.fixture
def poisoned(tiny_model: Path, tmp_path: Path) -> Path:
    return poison(tiny_model, tmp_path / "poisoned")


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("adapter", [None, {"r": 2}], ids=["full", "lora"])
def test_a_step_that_is_not_finite_changes_no_weight_and_its_row_is_reported(
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    poisoned: Path,
    capsys: pytest.CaptureFixture[str],
    packing: bool,
    adapter: dict | None,
) -> None:
    bad = rows(tmp_path / "bad.jsonl", {4})
    sections = {
        "model": {"name_or_path": str(poisoned)},
        "data": {"sources": [{"path": str(bad)}], "packing": packing, "max_length": 256},
        "adapter": adapter,
        "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "weight_decay": 0.1},
    }
    assert main(["--recipe", str(recipe_file(**sections))]) == 0
    (suspect,) = suspects(tmp_path / "run")
    assert suspect["kind"] == "not finite"
    assert suspect["loss"] == "nan"
    places = [row["place"] for row in suspect["rows"] if row["loss"] == "nan"]
    assert len(places) == len(suspect["rows"])
    # sdpa multiplies what is masked by 0, so all documents of the pack are not numbers
    assert f"{bad}:5" in places if packing else places == [f"{bad}:5"]
    shown = capsys.readouterr().out
    assert f"step {suspect['step']}: the gradients are not finite, so no weight was changed" in shown
    assert f"{bad}:5 (nan)" in shown
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if line["loss"] == "nan"] == [suspect["step"]]
    assert [line["step"] for line in metrics if line["grad_norm"] == "nan"] == [suspect["step"]]
    name = "adapter_model" if adapter else "model"
    saved = load_file(tmp_path / "run" / f"{name}.safetensors")
    saved.pop("model.embed_tokens.weight", None)
    assert all(weight.isfinite().all() for weight in saved.values())


def test_documents_without_losses_are_no_suspects(tmp_path: Path) -> None:
    """Rejected answers, whose pairs have their losses at the chosen ones."""
    places = ["chosen 1", "rejected 1", "chosen 2", "rejected 2"]
    guards = Guards(GuardsSection(), Accelerator(cpu=True), lambda sequence: places, str(tmp_path))
    losses, has_loss = torch.zeros(1, 15), torch.zeros(1, 15, dtype=torch.bool)
    for position, loss in ((2, 0.5), (9, float("nan"))):
        losses[0, position], has_loss[0, position] = loss, True
    guards.add(BatchInfo((0,), np.array([4, 4, 5, 3]), 2), losses, has_loss)
    guards._spikes.append(Suspect(1, "spike", 1.0, 0.5, guards._rank_rows(only_broken=False)))
    guards.report_spikes()
    (suspect,) = suspects(tmp_path)
    assert [row["place"] for row in suspect["rows"]] == ["chosen 2", "chosen 1"]


def test_a_skipped_step_leaves_no_decay_and_no_momentum(
    recipe_file: Callable[..., Path], tmp_path: Path, poisoned: Path
) -> None:
    """A good step followed by a skipped one gives the same weights as the good one alone."""
    bad = rows(tmp_path / "bad.jsonl", set(range(12)))
    good = rows(tmp_path / "good.jsonl", set())
    saved = {}
    for name, steps in (("one", 1), ("two", 2)):
        lines = good.read_text().splitlines()[:1] + bad.read_text().splitlines()[1:2]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for seed in range(20):  # an order in which the good row comes first
            training = {
                "per_device_train_batch_size": 1,
                "max_steps": steps,
                "num_train_epochs": ...,
                "weight_decay": 0.1,
            }
            recipe = recipe_file(
                model={"name_or_path": str(poisoned)},
                data={"sources": [{"path": str(path)}], "packing": False},
                training={**training, "lr_scheduler_type": "constant"},
                output_dir=str(tmp_path / f"{name}-{seed}"),
                seed=seed,
            )
            assert main(["--recipe", str(recipe)]) == 0
            lines = suspects(tmp_path / f"{name}-{seed}") if (tmp_path / f"{name}-{seed}" / SUSPECTS).exists() else []
            if [line["step"] for line in lines] == [2] * (steps - 1):
                saved[name] = load_file(tmp_path / f"{name}-{seed}" / "model.safetensors"), seed
                break
    assert saved["one"][1] == saved["two"][1]
    before = load_file(poisoned / "model.safetensors")
    one_step, two_steps = saved["one"][0], saved["two"][0]
    for name, weight in one_step.items():
        torch.testing.assert_close(two_steps[name], weight, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(one_step["lm_head.weight"], before["lm_head.weight"])


def test_too_many_consecutive_skipped_steps_end_the_run(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, poisoned: Path
) -> None:
    bad = rows(tmp_path / "bad.jsonl", set(range(12)))
    sections = {"model": {"name_or_path": str(poisoned)}, "data": {"sources": [{"path": str(bad)}]}}
    error = refused(
        "--recipe", recipe_file(**sections, training={"per_device_train_batch_size": 1}), "guards.non_finite_steps=2"
    )
    assert "the gradients of 2 consecutive steps were not finite; the last was step 2" in error
    assert str(tmp_path / "run" / SUSPECTS) in error
    assert "guards.non_finite_steps" in error
    assert [line["step"] for line in suspects(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def guards(tmp_path: Path, **settings: float | None) -> Guards:
    places = lambda sequence: [f"rows.jsonl:{sequence * 2 + 1}", f"rows.jsonl:{sequence * 2 + 2}"]  # noqa: E731
    return Guards(GuardsSection(**settings), Accelerator(cpu=True), places, str(tmp_path))


@pytest.mark.parametrize(("first_token", "rows"), [(0, [1, 2]), (6, [2])])
def test_processes_that_share_a_sequence_report_the_rows_of_their_tokens(
    tmp_path: Path, first_token: int, rows: list[int]
) -> None:
    """Documents of 4 and 8 tokens on two processes: the first has the end of row 1, and the border cuts row 2."""
    watched = guards(tmp_path, non_finite_steps=9)
    losses = torch.zeros(12).index_put((torch.tensor([1, 5, 7]),), torch.tensor([1.0, 2.0, 4.0]))
    part = losses[None, first_token : first_token + 6]
    watched.add(BatchInfo((0,), np.array([4, 8]), 3, first_token), part, part > 0)
    assert watched.check_step(1, float("nan"), float(watched.loss_sum())) is False
    (suspect,) = suspects(tmp_path)
    assert suspect["loss"] == pytest.approx(float(part.sum()) / 3)
    means = {"rows.jsonl:1": 1.0, "rows.jsonl:2": 4.0 if first_token else 2.0}
    reported = {row["place"]: row["loss"] for row in suspect["rows"]}
    assert reported == {place: loss for place, loss in means.items() if int(place[-1]) in rows}


def test_a_loss_spike_is_reported_with_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = guards(tmp_path, loss_spike=8.0)
    rng = np.random.default_rng(3)
    means = []
    for step in range(1, 41):
        losses = torch.tensor(rng.normal(2.0, 0.1, (1, 9)))
        losses[0, 3] = 0.0  # between the two documents of 4 and 6 tokens
        if step == 30:
            losses[0, 4:] += 20
        counted = losses != 0
        watched.add(BatchInfo((step,), np.array([4, 6]), 8), losses, counted)
        assert watched.check_step(step, 1.0, float(watched.loss_sum()))
        means.append(float(losses.sum() / 8))
    assert watched.unreported_spikes == 1
    watched.report_spikes()
    (suspect,) = suspects(tmp_path)
    usual = statistics.median(means[:29])
    spread = statistics.median(abs(mean - usual) for mean in means[:29])
    assert suspect["step"] == 30
    assert suspect["kind"] == "spike"
    assert suspect["loss"] == pytest.approx(means[29])
    assert suspect["loss"] > usual + 8 * 1.4826 * spread
    assert suspect["usual"] == pytest.approx(usual)
    assert [row["place"] for row in suspect["rows"]] == ["rows.jsonl:62", "rows.jsonl:61"]
    assert "step 30: the loss jumped to" in capsys.readouterr().out
    assert watched.unreported_spikes == 0


def test_no_spike_is_reported_if_the_guard_is_off(tmp_path: Path) -> None:
    watched = guards(tmp_path, loss_spike=None)
    for step, loss in enumerate([2.0, 2.1] * 20 + [99.0]):
        watched.add(BatchInfo((0,), np.array([2]), 1), torch.tensor([[loss]]), torch.tensor([[True]]))
        watched.check_step(step, 1.0, float(watched.loss_sum()))
    assert watched.unreported_spikes == 0
