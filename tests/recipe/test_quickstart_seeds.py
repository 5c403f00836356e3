"""The quickstart's table over seeds: means and ranges, from the comparisons of the seeds."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPT = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "seeds.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_seeds", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SEEDS = load_script()


def measure(kind: str, name: str, before: float, after: float) -> dict[str, Any]:
    return {"kind": kind, "measure": name, "a": {"value": before}, "b": {"value": after}}


def test_figures_are_those_of_both_sides_and_other_measures_are_left_out(tmp_path: Path) -> None:
    measures = [
        measure("rules", "held-out wordings", 0.0, 0.9),
        measure("rules", "held-out wordings: bold", 0.5, 0.6),
        measure("hierarchy", "conflict: held", 0.25, 0.8),
        measure("gain", "conflict: held", 0.1, 0.2),
    ]
    file = tmp_path / "compare.json"
    file.write_text(json.dumps({"measures": measures}))
    assert SEEDS.read_figures(file) == (
        {"held-out wordings": 0.0, "conflict": 0.25},
        {"held-out wordings": 0.9, "conflict": 0.8},
    )


def test_the_table_has_mean_range_and_each_seed() -> None:
    after = {
        42: {"conflict": 0.8, "permitted": 1.0},
        7: {"conflict": 0.9, "permitted": 0.5},
        8: {"conflict": 0.7, "permitted": 0.6},
    }
    assert SEEDS.make_table({"conflict": 0.25, "permitted": 0.0}, after).splitlines() == [
        "| | before | mean | range | seed 42 | seed 7 | seed 8 |",
        "|---|---|---|---|---|---|---|",
        "| conflict | 25.0 % | 80.0 % | 70.0 to 90.0 | 80.0 % | 90.0 % | 70.0 % |",
        "| permitted | 0.0 % | 70.0 % | 50.0 to 100.0 | 100.0 % | 50.0 % | 60.0 % |",
    ]
