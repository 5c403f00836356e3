"""A row with a NaN loss on one of two processes: both skip the step, and the first one reports the row."""

from collections.abc import Callable
from pathlib import Path

import pytest
from broken_steps import poison, rows, suspects
from ranks import launch
from safetensors.torch import load_file
from small_runs import read_metrics

pytest.importorskip("deepspeed")


@pytest.mark.parametrize("config", [None, "zero1.yaml", "zero2.yaml", "zero3.yaml"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_both_processes_skip_the_step(
    recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path, config: str | None, bf16: bool
) -> None:
    bad = rows(tmp_path / "bad.jsonl", {4})
    recipe = recipe_file(
        model={
            "name_or_path": str(poison(tiny_model, tmp_path / "poisoned")),
            "dtype": "bfloat16" if bf16 and config else "float32",  # DDP keeps no float32 copies
        },
        data={"sources": [{"path": str(bad)}], "packing": False},
        training={"bf16": bf16, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    )
    outcome = launch(2, config, "--recipe", recipe, logs=tmp_path / "logs").succeeded()
    (suspect,) = [line for line in suspects(tmp_path / "run") if line["loss"] == "nan"]
    assert [row["place"] for row in suspect["rows"]] == [f"{bad}:5"]
    assert f"step {suspect['step']}: the gradients are not finite, so no weight was changed" in outcome.output[0]
    assert f"{bad}:5 (nan)" in outcome.output[0]
    assert "not finite" not in outcome.output[1]
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics if line["grad_norm"] == "nan"] == [suspect["step"]]
    rates = [line["learning_rate"] for line in metrics]  # linear to 0, whether a step was left out or not
    assert rates == pytest.approx([1e-3 * (1 - step / len(rates)) for step in range(len(rates))])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    saved.pop("model.embed_tokens.weight")
    assert all(weight.isfinite().all() for weight in saved.values())
