"""Local paths: expansion of `~` and variables in all keys and options, and the distinction from hub ids."""

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from train.cli import CommandLine
from train.errors import UserError
from train.multifaceted.collection.config import CollectionConfig
from train.multifaceted.collection.config import load_config as load_collection
from train.recipe import Recipe, load_recipe
from train.recipe.sft_config import training_model
from train.sft import main, parse_options
from train.storage.local_paths import LocalPath, expand_path, looks_like_hub_id
from train.sysgen.config import SysgenConfig
from train.sysgen.config import load_config as load_sysgen


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("IN_HOME", "~/deep")
    monkeypatch.delenv("UNSET", raising=False)
    return tmp_path / "home"


def test_only_home_and_variables_are_expanded(home: Path) -> None:
    assert expand_path("~/a") == f"{home}/a"
    assert expand_path("~") == str(home)
    assert expand_path("$SCRATCH/a/${SCRATCH}b") == "/scratch/me/a//scratch/meb"
    assert expand_path("$IN_HOME/a") == f"{home}/deep/a"
    for plain in ("a/~/b", "./~a", "cost$5", "100%", "%SCRATCH%", "{SCRATCH}", "a$", "run-%a", "x{}y", "a\\b"):
        assert expand_path(plain) == plain


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$UNSET/a", "the environment variable UNSET in `$UNSET/a` is not set"),
        ("a/${UNSET}", "the environment variable UNSET in `a/${UNSET}` is not set"),
        ("$EMPTY/a", "is empty"),  # an empty value would give a path below the root
        ("${UNSET:-/tmp}/a", "Only $NAME and ${NAME} are expanded"),
        ("${}", "Only $NAME and ${NAME} are expanded"),
        (
            "~no_such_user/a",
            "there is no user no_such_user. For a file whose name starts with ~ write ./~no_such_user/a",
        ),
    ],
)
def test_texts_that_cannot_be_expanded_are_errors(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        expand_path(text)


RECIPE = """\
model: {name_or_path: ~/model}
chat: {template: $SCRATCH/chat.jinja}
data:
  sources: [{path: ~/rows.jsonl}, {path: "${SCRATCH}/*.jsonl"}]
  validation: [{path: $SCRATCH/held.jsonl}]
  cache_dir: ~/cache
  max_length: 512
training: {deepspeed: ~/ds.json, fsdp_config: "${SCRATCH}/fsdp.json", accelerator_config: $SCRATCH/acc.json}
save: {mirror_dir: $SCRATCH/mirror}
output_dir: $SCRATCH/run-%a
"""


def test_all_paths_of_a_recipe_are_expanded_and_round_trip(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    monkeypatch.setenv("SCRATCH", str(scratch))
    for folder, names in (home, ["ds.json"]), (scratch, ["fsdp.json", "acc.json", "chat.jinja"]):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    recipe = load_recipe(file)
    assert isinstance(recipe.data.validation, tuple)
    assert [recipe.model.name_or_path, recipe.chat.template] == [f"{home}/model", f"{scratch}/chat.jinja"]
    assert [source.path for source in recipe.data.sources] == [f"{home}/rows.jsonl", f"{scratch}/*.jsonl"]
    assert recipe.data.validation[0].path == f"{scratch}/held.jsonl"
    assert [recipe.data.cache_dir, recipe.save.mirror_dir] == [f"{home}/cache", f"{scratch}/mirror"]
    assert recipe.output_dir == f"{scratch}/run-%a"
    configs = {"deepspeed": home / "ds.json", "fsdp_config": scratch / "fsdp.json"}
    assert recipe.training == {key: str(path) for key, path in configs.items()} | {
        "accelerator_config": str(scratch / "acc.json")
    }
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe
    assert load_recipe(file, ["output_dir=~/elsewhere"]).output_dir == f"{home}/elsewhere"
    as_json = '{"min_lr": "$UNSET"}'  # not a path
    assert load_recipe(file, [f"training.fsdp_config='{as_json}'"]).training["fsdp_config"] == as_json


def test_unset_variables_are_errors_of_their_keys(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("SCRATCH", "UNSET"))
    with pytest.raises(UserError) as caught:
        load_recipe(file, ["output_dir=$EMPTY/x"])
    lines = str(caught.value).splitlines()
    keys = ("chat.template", "data.sources.1.path", "data.validation.0.path", "training.fsdp_config")
    for key in (*keys, "training.accelerator_config", "save.mirror_dir"):
        assert [line for line in lines if f" {key}: the environment variable UNSET" in line], key
    assert "override `output_dir=$EMPTY/x`: output_dir: the environment variable EMPTY" in lines[-1]


SYSGEN = """\
model: m
servers: [{base_url: "http://localhost:1/v1"}]
data: {sources: [{path: ~/rows.jsonl}]}
output_dir: $SCRATCH/out
"""


@pytest.mark.parametrize("load", [load_sysgen, load_collection])
def test_paths_in_configurations_of_other_commands_are_expanded(
    load: Callable[..., Any], tmp_path: Path, home: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(SYSGEN)
    config = load(file)
    assert (config.data.sources[0].path, config.output_dir) == (f"{home}/rows.jsonl", "/scratch/me/out")
    with pytest.raises(UserError, match=r"override `.*`: output_dir: the environment variable UNSET"):
        load(file, ["output_dir=$UNSET/x"])


def text_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """Yield keys that hold text, with their description and whether they are marked as paths."""

    def marks(annotation: Any) -> Iterator[Any]:
        yield annotation
        for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ())):
            yield from marks(part)

    for name, field in model.model_fields.items():
        types = [*marks(field.annotation), *field.metadata]
        if str in types:
            yield prefix + name, field.description or "", any(isinstance(mark, LocalPath) for mark in types)
        for section in types:
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from text_keys(section, f"{prefix}{name}.")


@pytest.mark.parametrize("model", [Recipe, SysgenConfig, CollectionConfig, training_model()])
def test_all_keys_described_as_files_or_folders_are_marked_as_paths(model: type[BaseModel]) -> None:
    keys = {
        key: marked
        for key, description, marked in text_keys(model)
        if {"file", "folder"} & set(description.lower().split())
    }
    expected = {"tracking.wandb.mode": False}
    assert [key for key, marked in keys.items() if not marked and key not in expected] == []
    names = {key: marked for key, _, marked in text_keys(model) if key.endswith(("path", "_dir", "_file", "_folder"))}
    assert [key for key, marked in names.items() if not marked] == []


def test_paths_in_options_are_expanded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_options(
        ["--recipe", "~/r.yaml", "--check", "--json=~/report.json", "--resume=$SCRATCH/checkpoint-1"]
    )
    assert options.recipe == home / "r.yaml"
    assert (options.json, options.resume) == (f"{home}/report.json", "/scratch/me/checkpoint-1")
    parser = CommandLine()
    group = parser.add_argument_group("more")
    group.add_argument("--output-dir", type=Path, default=Path("x"))
    group.add_argument("--files", type=Path, nargs="+")
    assert parser.parse_args(["--files", "a", "~/b"]) == argparse.Namespace(
        output_dir=Path("x"), files=[Path("a"), home / "b"]
    )
    for option in ("--recipe=$UNSET/r.yaml", "--resume=$UNSET/x"):
        with pytest.raises(SystemExit) as ended:
            main(["--recipe", "r.yaml", option])
        assert ended.value.code == 2
        error = capsys.readouterr().err.partition("\nerror: ")[2]
        assert error.startswith(f"argument {option.partition('=')[0]}: the environment variable UNSET")


def test_hub_ids_are_distinguished_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    for hub_id in ("gpt2", "mistralai/Mistral-7B-v0.1", "Qwen/Qwen2.5-14B", "org/data_set", "01-ai/Yi.1"):
        assert looks_like_hub_id(hub_id), hub_id
    for path in (
        *(
            "./gpt2",
            "/gpt2",
            "~/gpt2",
            "../a",
            ".hidden",
            "a/b/c",
            "outputs/model",
            "outputs/run.2",
            "a/",
            "rows.jsonl",
        ),
        *("org/rows.jsonl", "rows.jsonl.gz", "a b", "a\\b", "C:\\models\\x", "data/*.csv", "org/..", "$X/a", "ä/b", ""),
    ):
        assert not looks_like_hub_id(path), path


@pytest.mark.parametrize(
    "words",
    [
        ("gain", "--data", "x.jsonl", "--model=$UNSET/m"),
        ("gain", "--model", "m", "--data", "x.jsonl", "$UNSET/y.jsonl"),
        ("rules", "--rules", "r.py", "--data", "x.jsonl", "--before", "m", "--after=$UNSET/m"),
        ("ifeval", "--model", "m", "--data=$UNSET/x.jsonl"),
        ("harness", "--tasks", "sysgen", "--model=$UNSET/m"),
        ("compare", "a", "$UNSET/b"),
    ],
)
def test_paths_in_options_of_evaluations_are_expanded(
    words: tuple[str, ...], command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the environment variable UNSET" in line
