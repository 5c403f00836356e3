"""The quickstart over several seeds: each model is trained once and measured, and the table has the figures of all."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "smollm2-135m"
RECIPE = """
model: {{name_or_path: {folder}/before, dtype: float32}}
chat: {{template: chatml}}
data: {{sources: [{{path: {folder}/train.jsonl}}], max_length: 512, overlong: drop}}
training: {{max_steps: 1, learning_rate: 1.0e-3, save_strategy: "no"}}
output_dir: {folder}/after
seed: 42
"""
PREFERENCE = (
    RECIPE.replace("/before", "/after")
    .replace("train.jsonl", "pairs.jsonl")
    .replace("/after\nseed", "/preferred\nseed")
)
PREFERENCE += "preference: {{loss: dpo}}\n"


def copy_lines(name: str, to: Path, step: int) -> None:
    """Copy every `step`-th row of a file of the quickstart."""
    lines = (QUICKSTART / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
    to.write_text("".join(lines[::step]), encoding="utf-8")


@pytest.fixture
def seeds(tiny_chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return seeds.py with few rows and short answers, and write a recipe of a tiny model."""
    spec = importlib.util.spec_from_file_location("quickstart_seeds", QUICKSTART / "seeds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copytree(tiny_chat_model, tmp_path / "before")
    copy_lines("train.jsonl", tmp_path / "train.jsonl", 100)
    copy_lines("held_out.jsonl", tmp_path / "held_out.jsonl", 10)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path), encoding="utf-8")
    monkeypatch.setattr(module, "HELD_OUT", str(tmp_path / "held_out.jsonl"))
    monkeypatch.setattr(module, "LIMITS", ("--max-new-tokens", "4"))
    monkeypatch.setattr(module, "HIERARCHY", (*module.HIERARCHY[:5], "--rows", "6"))
    monkeypatch.setattr(module, "TURNS", (*module.TURNS[:1], "--conversations", "2", "--no-gain"))
    monkeypatch.chdir(ROOT)
    return module


def test_each_seed_is_trained_once_and_the_table_has_the_figures_of_all(
    seeds: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert seeds.main(["--recipe", str(recipe), "--seeds", "42", "43"]) == 0
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors")}
    assert {path.parent.name for path in weights} == {"before", "after", "after-seed-43"}
    seeds.train(recipe, 42, tmp_path / "before", tmp_path / "after")
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    assert (tmp_path / "after-seed-43" / "compare.json").is_file()
    table = (tmp_path / "after" / "seeds.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    lines = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]
    assert lines[2 : 2 + len(seeds.MEASURES)] == [*seeds.MEASURES]
    shares = {}
    for seed in ("", "-seed-43"):
        text = (tmp_path / f"after{seed}" / "answers.jsonl").read_text(encoding="utf-8")
        obeys = [row["obeys"] for row in map(json.loads, text.splitlines()) if row["held_out"] == "wording"]
        shares[seed] = [sum(column) / len(obeys) for column in zip(*obeys, strict=True)]
    (before, first), (_, second) = shares.values()
    assert f"| held-out wordings obeyed | {before:.1%} | {spread(first, second)} |" in table


def test_preference_training_starts_from_the_quickstart_of_its_seed(seeds: ModuleType, tmp_path: Path) -> None:
    rows = map(json.loads, (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines())
    pairs = [
        {"prompt": row["messages"][:-1], "chosen": row["messages"][-1]["content"], "rejected": "No."} for row in rows
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    recipe = tmp_path / "preference.yaml"
    recipe.write_text(PREFERENCE.format(folder=tmp_path), encoding="utf-8")
    assert seeds.main(["--recipe", str(tmp_path / "recipe.yaml"), "--seeds", "42", "43"]) == 0
    assert seeds.main(["--recipe", str(recipe), "--seeds", "42", "43"]) == 0
    for suffix in "", "-seed-43":
        resolved = yaml.safe_load((tmp_path / f"preferred{suffix}" / "recipe.yaml").read_text(encoding="utf-8"))
        assert resolved["model"]["name_or_path"] == f"{tmp_path}/after{suffix}"
    tables = [read_table(tmp_path / name / "seeds.md") for name in ("after", "preferred")]
    assert {line: cells[0] for line, cells in tables[1].items()} == {
        line: cells[1] for line, cells in tables[0].items()
    }
    adherence = [
        json.loads((tmp_path / f"preferred{suffix}" / "hierarchy.json").read_text(encoding="utf-8"))
        for suffix in ("", "-seed-43")
    ]
    held = [record["pressure"]["settings"]["conflict"]["held"]["value"] for record in adherence]
    assert tables[1]["conflict: message held"][1] == spread(*held)


def spread(first: float, second: float) -> str:
    """Return the mean and range of two shares as the table has them."""
    mean = f"{(first + second) / 2:.1%}"
    return mean if first == second else f"{mean} [{min(first, second):.1%}, {max(first, second):.1%}]"


def read_table(path: Path) -> dict[str, list[str]]:
    """Return the cells of a table by the line's name."""
    lines = [line.strip("| ").split(" | ") for line in path.read_text(encoding="utf-8").splitlines() if "|" in line]
    return {name: cells for name, *cells in lines[2:]}


def test_a_training_that_fails_is_one_error(
    seeds: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl").unlink()
    assert seeds.main(["--recipe", str(tmp_path / "recipe.yaml"), "--seeds", "7"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "error: seed 7: its training failed, see above"
