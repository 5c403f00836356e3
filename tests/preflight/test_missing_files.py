"""Tests of missing files: named with the folder looked in, before anything heavy is imported."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from train.errors import UserError
from train.preflight.missing_files import check_files_exist
from train.recipe import load_recipe
from train.storage.local_paths import hub_unreachable_reason

ROOT = Path(__file__).parents[2]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return the error for a recipe in a folder of its own, `recipes/`, when started from the folder above."""
    monkeypatch.chdir(tmp_path)
    for folder in ("recipes", "outputs/first-model", "data/seen"):
        Path(folder).mkdir(parents=True)
    Path("data/seen/rows.jsonl").write_text('{"prompt": "a", "output": "b"}\n')
    shutil.copytree("data", "recipes/beside")
    Path("data/seen/cut.json").write_text('{"zero_optimization": ')
    Path("data/seen/list.json").write_text("[1]")
    recipe = {"model": {"name_or_path": "outputs/first-model"}, "output_dir": "outputs/run"}
    recipe["data"] = {"sources": [{"path": "data/seen/rows.jsonl"}], "max_length": 64}
    Path("recipes/recipe.yaml").write_text(yaml.safe_dump(recipe))

    def run(*overrides: str) -> str:
        try:
            check_files_exist(load_recipe("recipes/recipe.yaml", overrides))
        except UserError as error:
            return str(error)
        return ""

    return run


def test_files_that_exist_are_accepted(says: Callable[..., str]) -> None:
    assert says() == ""
    assert says("data.sources.0.path=data/seen/rows.jsonl", "data.validation=[{path: data/*/*.jsonl}]") == ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.name_or_path=outputs/frist-model",
            ["no folder outputs/frist-model in {}", "mean outputs/first-model?"],
        ),
        ("model.name_or_path=output/first-model", ["can't be loaded", "in {}", "mean outputs/first-model?"]),
        ("model.name_or_path=./first-model", ["no folder first-model in {}"]),
        ("model.name_or_path=a/b/c", ["no folder a/b/c in {}"]),
        ("model.name_or_path=/no/where", ["there is no folder /no/where."]),
        ("model.name_or_path=beside/seen", ["no folder of that name in {}", "did you mean recipes/beside/seen?"]),
        ("model.name_or_path=./beside/seen", ["not from the recipe's: did you mean recipes/beside/seen?"]),
        ("model.name_or_path=data/seen/rows.jsonl", ["is a file", "Name the folder that it is in: {}/data/seen"]),
        ("model.name_or_path=nobody/nothing", ["cache of the Hugging Face hub", "HF_HUB_OFFLINE is set"]),
        ("data.sources.0.path=data/sen/rows.jsonl", ["there is no sen in {}/data", "mean data/seen/rows.jsonl?"]),
        ("data.sources.0.path=rows.jsonl", ["there is no rows.jsonl in {}"]),
        ("data.sources.0.path=beside/seen/rows.jsonl", ["there is no beside in {}", "recipes/beside/seen/rows.jsonl?"]),
        ("data.sources.0.path=data/*.csv", ["no file matches this pattern in {}"]),
        ("data.sources.0.path=outputs/first-model", ["no data file in this folder"]),
        ("data.sources.0.path=nobody/nothing", ["cache of the Hugging Face hub", "HF_HUB_OFFLINE is set"]),
        ("data.validation=[{path: data/seen/held.jsonl}]", ["data.validation.0.path", "no held.jsonl in {}/data/seen"]),
        ("training.optim=galore_adamw", ["training.optim_target_modules", "required by galore_adamw"]),
        (
            "training.optim=grokadamw",
            ["training.optim: grokadamw needs the package grokadamw", "pip install grokadamw"],
        ),
        ("training.deepspeed=ds/zero.json", ["training.deepspeed: there is no file ds/zero.json in {}"]),
        ("training.deepspeed=data/seen/cut.json", ["training.deepspeed: data/seen/cut.json is not valid JSON"]),
        ("training.fsdp_config=data/seen/list.json", ["data/seen/list.json must hold a JSON object"]),
        ("training.fsdp_config=fsdp.json", ["training.fsdp_config: there is no file fsdp.json in {}"]),
        ("chat.template=mine.jinja", ["chat.template: there is no file mine.jinja in {}"]),
        ("data.sources.0.min_gain=data/seen", ["data.sources.0.min_gain: data/seen is a folder. Name a file in it."]),
        ("data.sources.0.min_gain=.", ["data.sources.0.min_gain: . is a folder"]),
        ("evaluation.prompts.path=/", ["evaluation.prompts.path: / is a folder"]),
        ('data.sources.0.min_gain=""', ["data.sources.0.min_gain: found an empty text"]),
        ("data.sources.0.min_gain=0", ["found 0. Allowed: text such as 'outputs/base/gain_rows.jsonl'; or null."]),
    ],
)
def test_a_missing_file_is_named_with_the_folder_that_was_searched(
    says: Callable[..., str], override: str, words: list[str]
) -> None:
    error = says(override)
    for word in words:
        assert word.format(Path.cwd()) in error
    assert override.partition("=")[0].partition(".")[0] in error


def test_one_error_names_all_missing_files(says: Callable[..., str]) -> None:
    lines = says("model.name_or_path=./x", "data.sources.0.path=x.csv", "training.optim=stable_adamw").splitlines()
    assert lines[0] == "recipes/recipe.yaml names 3 that are not there:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        *("model.name_or_path", "data.sources.0.path", "training.optim")
    ]


def test_a_hub_id_in_the_cache_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    for kind, folder in ("model", "models--a--b"), ("dataset", "datasets--a--b"), ("dataset", "prepared/c___d"):
        hub_id = "c/d" if "___" in folder else "a/b"
        assert hub_unreachable_reason(hub_id, kind)
        (tmp_path / folder).mkdir(parents=True)
        assert hub_unreachable_reason(hub_id, kind) is None
    # not asked at all where the hub's name is not known to the network
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for proxy in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    assert "hub.invalid can't be resolved from this machine" in (hub_unreachable_reason("e/f", "model") or "")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    assert hub_unreachable_reason("e/f", "model") is None


def test_the_search_for_missing_files_imports_nothing_heavy(tmp_path: Path, tiny_model: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name_or_path: outputs/nothing-here}\ndata: {sources: [{path: no/rows.jsonl}], max_length: 64}\n"
        "output_dir: x\n"
    )
    program = "import sys; from train.sft import main; code = main(sys.argv[1:]); "
    program += "print(code, [name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    present = [f"model.name_or_path={tiny_model}", "data.sources.0.path=recipes/smollm2-135m/data/train.jsonl"]
    for arguments in ([], [*present, "--resume", "nowhere/checkpoint-1"]):
        done = subprocess.run(
            [sys.executable, "-c", program, "--recipe", recipe, *arguments],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "2 []", done.stderr
        assert done.stderr.startswith("error: ")
    assert "nowhere/checkpoint-1 does not exist" in done.stderr
