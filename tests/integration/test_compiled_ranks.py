"""training.torch_compile on two processes, replicated and partitioned: losses and files of uncompiled ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file
from small_runs import read_metrics, write_recipe, write_rows

pytest.importorskip("deepspeed")

FIGURES = ("loss", "grad_norm", "eval_loss", "eval_system_gain", "num_tokens")


def counted_sft(*arguments: str) -> int:
    """Run train/sft.py as a rank does, and print what was compiled."""
    from torch._dynamo.utils import counters

    from train.sft import main

    code = main(list(arguments))
    breaks = [reason for reason in counters["graph_break"] if "requires_grad_()" not in reason]  # in the embedding
    print("GRAPHS", json.dumps([counters["stats"]["unique_graphs"], breaks]), flush=True)
    return code


@pytest.fixture(scope="module")
def train(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list]]:
    """Return a function that trains two steps with a configuration: the run's folder, and the first rank's graphs."""
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root / "rows.jsonl", 32, seed=5)

    def run(config: str | None, name: str, **training: object) -> tuple[Path, list]:
        folder = root / name
        settings = {"max_steps": 2, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, **training}
        settings |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
        data = {"validation": [{"path": str(rows)}]}
        recipe = write_recipe(root / f"{name}.yaml", tiny_model, rows, folder, data=data, training=settings)
        launched = launch(2, config, "--recipe", recipe, logs=root / f"{name}-logs", job=counted_sft).succeeded()
        return folder, json.loads(launched.output[0].partition("GRAPHS ")[2])

    return run


@pytest.fixture(scope="module")
def plain(train: Callable[..., tuple[Path, list]]) -> Path:
    """Train without compilation."""
    folder, graphs = train(None, "plain")
    assert graphs == [0, []]
    return folder


def figures(run: Path) -> list[dict[str, float]]:
    lines = read_metrics(run)
    return [{name: line[name] for name in FIGURES if name in line} for line in lines]


@pytest.mark.parametrize("config", [None, "zero2.yaml", "zero3.yaml", "fsdp2.yaml"])
def test_compiled_ranks_train_as_others_do(
    train: Callable[..., tuple[Path, list]], plain: Path, config: str | None
) -> None:
    compiled, (graphs, breaks) = train(config, f"compiled-{config}", torch_compile=True, torch_compile_backend="eager")
    assert graphs > 0
    # DeepSpeed's hooks are not traced. Under ZeRO-3 every module has one, so that a layer is several graphs.
    assert all("DeepSpeed" in reason or "instrument_w_nvtx" in reason for reason in breaks)
    assert bool(breaks) == (config == "zero3.yaml")
    assert {name for line in figures(plain) for name in line} == set(FIGURES)
    for line, right in zip(figures(compiled), figures(plain), strict=True):
        assert line == pytest.approx(right, rel=1e-4, abs=1e-5)
    for folder in "", "checkpoint-2":
        weights, others = (load_file(run / folder / "model.safetensors") for run in (compiled, plain))
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-5)
