"""Figures by source in metrics.jsonl, compared with the loss of each row computed by itself."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_throughput import epoch_indices
from test_trainer import make_trainer, prepared
from transformers import AutoModelForCausalLM

from train.data.dataset import PackedDataset
from train.loop.batch_info import BatchInfo
from train.loop.source_figures import SourceFigures
from train.loop.throughput import TIMING_METRICS
from train.recipe import load_recipe
from train.sft import main

ROWS = {"river": range(14), "stone": range(14, 23), "cloud": range(23, 24)}


@pytest.fixture
def sources(rows_file: Path, tmp_path: Path) -> list[dict[str, str]]:
    """Divide 24 rows into sources of 14, 9 and 1."""
    lines = rows_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[row] for row in rows), encoding="utf-8")
    return [{"path": str(tmp_path / f"{name}.jsonl")} for name in ROWS]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def expected_figures(model: torch.nn.Module, sequences: PackedDataset, indices: list[int]) -> dict[str, list[float]]:
    """Return the losses of the trained tokens of these sequences, by source: the stem of the file in a row's place."""
    losses: dict[str, list[float]] = {name: [] for name in ROWS}
    for index in indices:
        item, places = sequences[index], sequences.places(index)
        ends = np.cumsum(item.get("seq_lengths") or [len(item["input_ids"])])[:-1]
        parts = (np.split(item[key], ends) for key in ("input_ids", "labels"))
        for place, ids, labels in zip(places, *parts, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor(ids)[None], use_cache=False).logits[0, :-1].double()
            wanted = torch.tensor(labels[1:])
            own = torch.nn.functional.cross_entropy(logits, wanted, reduction="none", ignore_index=-100)
            losses[Path(place.rpartition(":")[0]).stem] += own[wanted != -100].tolist()
    return {name: values for name, values in losses.items() if values}


def means(losses: dict[str, list[float]], prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}loss/{name}": pytest.approx(np.mean(values), rel=1e-5) for name, values in losses.items()}


def select(line: dict[str, Any]) -> dict[str, Any]:
    """Return the figures by source of a line."""
    return {key: value for key, value in line.items() if "/" in key}


@pytest.mark.parametrize(
    ("packing", "batch", "accumulation"), [(True, 2, 2), (True, 1, 1), (False, 2, 2), (False, 3, 1)]
)
def test_figures_are_those_of_each_row_computed_by_itself(
    recipe_file: Callable[..., Path], sources: list[dict[str, str]], tmp_path: Path, tiny_model: Path,
    packing: bool, batch: int, accumulation: int,
) -> None:  # fmt: skip
    """At a learning rate of 0 the model stays the same, so that losses can be computed afterwards."""
    training = {
        "learning_rate": 0.0,
        "logging_steps": 2,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": ...,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    data = {"sources": sources, "validation": sources[:2], "packing": packing}
    recipe = load_recipe(recipe_file(data=data, training=training, system_gain={"rows": 0}))
    trainer = make_trainer(recipe)
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., Any]:
        function = getattr(trainer.accelerator, name)
        return lambda *args, **kwargs: calls.update([name]) or function(*args, **kwargs)

    for name in ("gather", "reduce"):
        setattr(trainer.accelerator, name, count(name))
    trainer.train()
    evaluated = len(trainer.get_eval_dataloader())  # transformers gathers the loss of each batch
    assert calls["gather"] == 2 + packing + evaluated  # one a logging step; the self-test of packs has one, too
    assert calls["reduce"] == 4 + evaluated + 1  # one a step and batch, for requests to stop; one an evaluation

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    order = [index for epoch in range(4) for index in epoch_indices(trainer, epoch)]
    *lines, evaluation = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4]
    per_line = 2 * batch * accumulation
    for number, line in enumerate(lines):
        indices = order[number * per_line : (number + 1) * per_line]
        losses = expected_figures(model, trainer.train_dataset, indices)
        tokens = {f"trained_tokens/{name}": len(values) for name, values in losses.items()}
        assert select(line) == means(losses) | tokens
    validation = prepared(recipe)[1].validation.dataset
    losses = expected_figures(model, validation, [*range(len(validation))])
    assert select(evaluation) == means(losses, "eval_")
    assert len(losses) == 2
    weighted = sum(evaluation[f"eval_loss/{name}"] * len(values) for name, values in losses.items())
    assert evaluation["eval_loss"] == pytest.approx(weighted / sum(map(len, losses.values())), rel=1e-6)


def test_a_step_without_a_token_of_a_source_has_no_figure_of_it(
    recipe_file: Callable[..., Path], sources: list[dict[str, str]], tmp_path: Path
) -> None:
    training = {"per_device_train_batch_size": 1}
    recipe = recipe_file(data={"sources": sources, "packing": False}, training=training)
    assert main(["--recipe", str(recipe)]) == 0
    lines = metrics_of(tmp_path / "run")
    assert len(lines) == 24
    for name, rows in ROWS.items():
        logged = [line for line in lines if f"loss/{name}" in line]
        assert len(logged) == len(rows)
        assert all(line[f"loss/{name}"] == pytest.approx(line["loss"], rel=1e-6) for line in logged)
        assert [line for line in lines if f"trained_tokens/{name}" in line] == logged


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [({}, slice(1)), ({"label_smoothing_factor": 0.1}, slice(3))],
    ids=["one source", "label smoothing"],
)
def test_one_source_and_losses_that_trl_computes_have_no_figures(
    recipe_file: Callable[..., Path], sources: list[dict[str, str]], tmp_path: Path, settings: dict, chosen: slice
) -> None:
    training = {"num_train_epochs": ..., "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **settings}
    data = {"sources": sources[chosen], "validation": 0.3}
    assert main(["--recipe", str(recipe_file(data=data, training=training, system_gain={"rows": 0}))]) == 0
    lines = metrics_of(tmp_path / "run")
    assert sum("loss" in line for line in lines) == 2
    assert [select(line) for line in lines] == [{}] * 3


def test_a_dft_loss_is_the_one_that_is_trained(
    recipe_file: Callable[..., Path], sources: list[dict[str, str]], tmp_path: Path
) -> None:
    training = {"per_device_train_batch_size": 1, "num_train_epochs": ..., "max_steps": 3, "loss_type": "dft"}
    recipe = recipe_file(data={"sources": sources, "packing": False}, training=training)
    assert main(["--recipe", str(recipe)]) == 0
    for line in metrics_of(tmp_path / "run"):
        [key] = [key for key in line if key.startswith("loss/")]
        assert line[key] == pytest.approx(line["loss"], rel=1e-6)


def test_a_resumed_run_logs_the_figures_of_an_uninterrupted_one(
    recipe_file: Callable[..., Path], sources: list[dict[str, str]], tmp_path: Path
) -> None:
    """The checkpoint lies between two lines."""
    training = {
        "logging_steps": 3,
        "num_train_epochs": ...,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 1,
    }
    recipe = recipe_file(data={"sources": sources, "packing": False}, training=training)
    assert main(["--recipe", str(recipe)]) == 0
    run = tmp_path / "run"
    expected = metrics_of(run)
    for step in (4, 6):
        (run / f"checkpoint-{step}" / "COMPLETE.json").unlink()
    assert main(["--recipe", str(recipe)]) == 0
    for line, other in zip(metrics_of(run), expected, strict=True):
        assert {key: value for key, value in line.items() if key not in TIMING_METRICS} == {
            key: value for key, value in other.items() if key not in TIMING_METRICS
        }


def test_sums_of_an_older_version_or_other_sources_are_left_out(
    recipe_file: Callable[..., Path], sources: list[dict[str, str]]
) -> None:
    data = prepared(load_recipe(recipe_file(data={"sources": sources})))[1]
    figures = SourceFigures(data.train.dataset, Accelerator(cpu=True).device)
    sums = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
    figures.load([{}, {"by_source": [[1.0], [2.0]]}, {"by_source": sums}, {"by_source": sums}])
    assert figures.state() == {"by_source": [[2.0, 4.0, 6.0], [8.0, 10.0, 12.0], [14.0, 16.0, 18.0]]}
    assert data.train.dataset.rows_by_source == {name: len(rows) for name, rows in ROWS.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_micro_batch_does_not_wait_for_the_device(
    recipe_file: Callable[..., Path], sources: list[dict[str, str]]
) -> None:
    data = prepared(load_recipe(recipe_file(data={"sources": sources, "packing": False})))[1]
    figures = SourceFigures(data.train.dataset, torch.device("cuda"))
    batch = BatchInfo((0, 1, 2), np.array([8, 8, 8]), 21)
    losses = torch.ones(3, 7, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures.add(batch, losses, losses > 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert figures.sums.sum(1).tolist() == [21, 21, 21]
