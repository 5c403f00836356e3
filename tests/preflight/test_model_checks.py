"""Checks of the model that are remembered: a warm `--check` imports no modelling code, and a change is checked again."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from train.model.tokenizer import load_tokenizer
from train.preflight.model_checks import ModelFacts, checks_key, passed_checks
from train.recipe import ModelSection, Recipe, load_recipe
from train.sft import main

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "transformers.modeling_utils",
    "transformers.trainer_utils", "trl", "peft", "accelerate", "bitsandbytes", "torchao", "deepspeed", "datasets",
    "pandas", "scipy", "sympy", "matplotlib",
)  # fmt: skip


def test_a_second_check_imports_no_modelling_code_and_prints_the_same_page(
    recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--recipe", str(recipe_file(data={"validation": 0.25})), "--check"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    program = (
        "import sys; from train.sft import main; code = main(sys.argv[1:]); import torch; "
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); "
        "assert not torch.distributed.is_initialized()"
    )
    second = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert second.stderr.strip().endswith("0 []")
    assert second.stdout == first.replace("made now", "found")
    assert first.endswith("\nready\n")


def remembered(recipe: Recipe) -> ModelFacts | None:
    return passed_checks(recipe, checks_key(recipe))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def test_only_the_same_files_and_settings_are_not_checked_again(
    recipe_file: Callable[..., Path], refused: Callable[..., str], model: Path
) -> None:
    recipe = recipe_file(model={"name_or_path": str(model)})
    assert remembered(load_recipe(recipe)) is None
    assert main(["--recipe", str(recipe), "--check"]) == 0
    assert remembered(load_recipe(recipe)) is not None
    for override in ("training.optim=rmsprop", "adapter={r: 4}", "data.max_length=200", "chat.train_on=last"):
        assert remembered(load_recipe(recipe, [override])) is None
    assert remembered(load_recipe(recipe, ["output_dir=elsewhere", "seed=1"])) is not None
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert "weights of the model that its config.json leaves out" in refused("--recipe", recipe, "--check")


def test_a_refused_model_is_not_remembered(
    recipe_file: Callable[..., Path], refused: Callable[..., str], model: Path
) -> None:
    (model / "generation_config.json").write_text("{")
    recipe = recipe_file(model={"name_or_path": str(model)})
    for _ in range(2):
        assert "generation_config.json can't be read" in refused("--recipe", recipe, "--check")
    assert remembered(load_recipe(recipe)) is None


def test_a_blocked_output_file_is_found_although_the_model_was_checked(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    recipe = recipe_file()
    assert main(["--recipe", str(recipe), "--check"]) == 0
    (tmp_path / "run" / "model.safetensors").mkdir(parents=True)
    assert "model.safetensors is a folder, and the run writes a file there" in refused("--recipe", recipe, "--check")


def test_the_tokenizer_is_that_of_transformers_with_the_models_own_config(tiny_model: Path, model: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for kind in (settings["tokenizer_class"], "LlamaTokenizer", "GPT2TokenizerFast", None):
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": kind}))
        ours, theirs = load_tokenizer(ModelSection(name_or_path=str(model))), AutoTokenizer.from_pretrained(model)
        assert type(ours) is type(theirs)
        assert ours("Write in CAPITALS, äöü 123.").input_ids == theirs("Write in CAPITALS, äöü 123.").input_ids
