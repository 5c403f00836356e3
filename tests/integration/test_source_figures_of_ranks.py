"""Figures by source on several processes: those of one process, replicated, partitioned, or sharing each sequence."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ranks import launch
from small_runs import read_metrics, write_recipe, write_rows
from test_sharded_training import EPSILON

pytest.importorskip("deepspeed")

STEPS, SEQUENCES = 4, 4
NAMES = ("long", "short", "rare")


@dataclass(frozen=True)
class Setting:
    """Processes, of which `shared` train each sequence together."""

    processes: int = 1
    config: str | None = None
    packed: bool = True
    shared: int = 1


@pytest.fixture(scope="module")
def figures(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setting], list[dict[str, Any]]]:
    """Return a function that trains a setting once and returns its figures by source, line by line."""
    root = tmp_path_factory.mktemp("runs")
    answers = {"long": (40, 90), "short": (1, 5), "rare": (20,)}
    rows = {
        name: write_rows(root / f"{name}.jsonl", count, seed=3 + count, answers=answers[name])
        for name, count in zip(NAMES, (24, 16, 2), strict=True)
    }
    lines: dict[Setting, list[dict[str, Any]]] = {}

    def train(setting: Setting) -> list[dict[str, Any]]:
        if setting in lines:
            return lines[setting]
        folder = root / f"run-{len(lines)}"
        sources = [{"path": str(path)} for path in rows.values()]
        recipe = write_recipe(
            root / f"{folder.name}.yaml",
            tiny_model,
            rows["long"],
            folder,
            data={"sources": sources, "validation": 0.3, "packing": setting.packed},
            training={
                "adam_epsilon": EPSILON,  # larger than the rounding of small gradients
                "gradient_accumulation_steps": SEQUENCES * setting.shared // setting.processes,
                "per_device_eval_batch_size": 1,
                "max_steps": STEPS,
                "logging_steps": 2,
                "save_strategy": "no",
                "eval_strategy": "steps",
                "eval_steps": STEPS,
            },
            system_gain={"rows": 12},
        )
        arguments = ["--recipe", recipe, f"model.sequence_parallel={setting.shared}"]
        launch(setting.processes, setting.config, *arguments, logs=root / f"{folder.name}-logs").succeeded()
        lines[setting] = [
            {key: value for key, value in line.items() if "/" in key} for line in read_metrics(folder)
        ]  # fmt: skip
        return lines[setting]

    return train


SETTINGS = [
    Setting(2),
    Setting(2, packed=False),
    Setting(2, "zero3.yaml"),
    Setting(2, shared=2),
    Setting(2, packed=False, shared=2),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_figures_by_source_are_those_of_one_process(
    setting: Setting, figures: Callable[[Setting], list[dict[str, Any]]]
) -> None:
    expected, actual = figures(Setting(packed=setting.packed)), figures(setting)
    assert len(actual) == len(expected) == 3
    assert {*expected[-1]} >= {f"eval_{name}/{source}" for name in ("loss", "system_gain") for source in NAMES[:2]}
    assert {*expected[0]} >= {f"{name}/{source}" for name in ("loss", "trained_tokens") for source in NAMES[:2]}
    for line, other in zip(actual, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
