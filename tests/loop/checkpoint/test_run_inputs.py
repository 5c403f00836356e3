"""Inputs of a run: a finished run is trained again if the contents of its input files have changed.

No run is trained here: outcome.json is written as at the end of training.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from train.loop.finished_run import find_finished_run, inputs_fingerprint
from train.loop.output_dir import OUTCOME
from train.loop.run_outcome import describe_results
from train.recipe import load_recipe
from train.sft import main

Why = Callable[..., str | None]
ROW = {"messages": [{"role": "user", "content": "river"}, {"role": "assistant", "content": "stone"}]}


def rows(path: Path, answer: str = "stone") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ROW).replace("stone", answer) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def base(tiny_chat_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_chat_model, tmp_path / "base"))


@pytest.fixture
def finish(recipe_file: Callable[..., Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Return a function that creates a finished run of a recipe, and one that returns why another start would train."""
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str, **sections: object) -> Why:
        recipe = recipe_file(**{"model": {"name_or_path": "base"}, **sections})
        recipe_now, run = load_recipe(recipe, overrides), tmp_path / "run"
        shutil.copytree(base, run, dirs_exist_ok=True)
        done = {
            "outcome": "finished",
            "step": 2,
            "time": 0.0,
            **inputs_fingerprint(recipe_now),
            **describe_results(run),
        }
        (run / OUTCOME).write_text(json.dumps(done), encoding="utf-8")

        def why(*more: str) -> str | None:
            finished, differences = find_finished_run(load_recipe(recipe, [*overrides, *more]))
            assert (finished is None) == (differences is not None)
            return differences

        assert why() is None
        return why

    return make


def sources(*paths: str, **more: object) -> dict[str, object]:
    return {"data": {"sources": [{"path": path, **more} for path in paths]}}


@pytest.mark.parametrize("path", ["dd/*.jsonl", "dd/**/*.jsonl", "dd", "./dd/"])
def test_every_file_that_rows_are_read_from_is_compared(path: str, finish: Callable[..., Why], tmp_path: Path) -> None:
    """Also below a symbolic link, which the reader follows."""
    rows(tmp_path / "elsewhere" / "c.jsonl")
    rows(tmp_path / "dd" / "b.jsonl")
    (tmp_path / "dd" / "linked").symlink_to(tmp_path / "elsewhere")
    why = finish(**sources(path))
    changes = [lambda: rows(tmp_path / "dd" / "b.jsonl", "cloud"), lambda: rows(tmp_path / "dd" / "a.jsonl")]
    if path != "dd/*.jsonl":
        changes.append(lambda: rows(tmp_path / "elsewhere" / "c.jsonl", "cloud"))
    for change in changes:
        change()
        assert f"{Path(path)} has changed since" in str(why())
        why = finish(**sources(path))


def test_validation_lists_and_saved_data_sets_are_compared(finish: Callable[..., Why], tmp_path: Path) -> None:
    from datasets import Dataset

    rows(tmp_path / "held.jsonl")
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "saved")
    why = finish(data={"sources": [{"path": "saved"}], "validation": [{"path": "held.jsonl"}]})
    rows(tmp_path / "held.jsonl", "cloud")
    assert "held.jsonl has changed since" in str(why())
    rows(tmp_path / "held.jsonl")
    (tmp_path / "saved" / "notes.md").write_text("new")
    assert why() is None
    shutil.rmtree(tmp_path / "saved")
    Dataset.from_list([json.loads(json.dumps(ROW).replace("stone", "cloud"))]).save_to_disk(tmp_path / "saved")
    assert "saved has changed since" in str(why())
    shutil.rmtree(tmp_path / "saved")
    assert "saved" in str(why())


def test_files_of_gains_are_compared(finish: Callable[..., Why], tmp_path: Path) -> None:
    """By their contents. The record of a run without the key is that of a version that had none."""
    rows(tmp_path / "a.jsonl")
    rows(tmp_path / "b.jsonl")
    file = rows(tmp_path / "gains.jsonl")
    why = finish(data={"sources": [{"path": "a.jsonl", "min_gain": "gains.jsonl"}, {"path": "b.jsonl"}]})
    shutil.copy(file, tmp_path / "copy.jsonl")
    assert why("data.sources.0.min_gain=copy.jsonl") is None
    assert "data.sources was " in str(why("data.sources.0.min_gain=null", "data.sources.1.min_gain=gains.jsonl"))
    rows(file, "cloud")
    assert str(why()).endswith(f"but {Path('gains.jsonl')} has changed since.")

    why = finish(**sources("a.jsonl"))
    assert "min_gain" not in (tmp_path / "run" / OUTCOME).read_text(encoding="utf-8")
    assert why() is None


@pytest.mark.parametrize("path", ["./dd", "dd/", "{here}/dd", "copy", "dd/*.jsonl", "dd/train.jsonl"])
def test_the_same_rows_under_another_path_are_no_change(path: str, finish: Callable[..., Why], tmp_path: Path) -> None:
    rows(tmp_path / "dd" / "train.jsonl")
    why = finish(**sources("dd"))
    rows(tmp_path / "copy" / "part.jsonl")
    assert why(f"data.sources.0.path={path.format(here=tmp_path)}") is None
    rows(tmp_path / "other.jsonl", "cloud")
    assert "data.sources was " in str(why("data.sources.0.path=other.jsonl"))
    for weight in ("weight", "loss_weight"):
        source = f"data.sources=[{{path: {path.format(here=tmp_path)}, {weight}: 2.0}}]"
        assert "data.sources was " in str(why(source))


def test_records_without_loss_weights_are_those_of_earlier_versions(recipe_file: Callable[..., Path]) -> None:
    """A key with its default is in no record, so that runs of before it was there are found again."""
    recipe = load_recipe(recipe_file())
    for text in (json.dumps(inputs_fingerprint(recipe)), recipe.to_yaml()):
        assert "loss_weight" not in text
    weighted = load_recipe(recipe_file(), ["data.sources.0.loss_weight=2.0"])
    assert "loss_weight: 2.0" in weighted.to_yaml()


@pytest.mark.parametrize("name", ["README.md", ".DS_Store", "_SUCCESS", "dataset_infos.json", "test.jsonl", "note.txt"])
def test_files_without_rows_are_not_compared(name: str, finish: Callable[..., Why], tmp_path: Path) -> None:
    rows(tmp_path / "dd" / "train.jsonl")
    why = finish(**sources("dd"))
    if name == "test.jsonl":
        rows(tmp_path / "dd" / name, "cloud")
    else:
        (tmp_path / "dd" / name).write_text("{}" if name.endswith("json") else "text")
    assert why() is None


def test_templates_and_configurations_are_compared_by_the_text_of_their_files(
    finish: Callable[..., Why], tmp_path: Path
) -> None:
    template, settings = tmp_path / "own.jinja", tmp_path / "ds.json"
    template.write_text("{{ messages }}")
    settings.write_text('{"train_micro_batch_size_per_gpu": "auto"}')
    why = finish("training.deepspeed=ds.json", chat={"template": "own.jinja"})
    assert why("chat.template=./own.jinja", f"training.deepspeed={settings}") is None
    template.write_text("{{ messages[0] }}")
    assert "own.jinja has changed since" in str(why())
    assert "chat.template was 'own.jinja' and is 'chatml'" in str(why("chat.template=chatml"))
    template.write_text("{{ messages }}")
    settings.write_text('{"train_micro_batch_size_per_gpu": 1}')
    assert "ds.json has changed since" in str(why())


def retrain(file: Path) -> None:
    """Change every weight and keep the size, as another training does."""
    save_file({name: weight + np.float32(1e-3) for name, weight in load_file(file).items()}, file, {"format": "pt"})


def test_weights_of_the_base_model_are_compared_by_content(finish: Callable[..., Why], base: Path) -> None:
    """In each layout that transformers reads. Files that it doesn't read and modification times don't count."""
    single, index = base / "model.safetensors", base / "model.safetensors.index.json"
    why, size = finish(), single.stat().st_size
    os.utime(single, (0, 0))
    (base / "consolidated.safetensors").write_bytes(b"x")
    (base / "pytorch_model.bin").write_bytes(b"x")
    assert why() is None
    retrain(single)
    assert single.stat().st_size == size
    assert f"base/{single.name} has changed since" in str(why())

    weights = load_file(single)
    half = len(weights) // 2
    for number, part in enumerate((sorted(weights)[:half], sorted(weights)[half:])):
        save_file({name: weights[name] for name in part}, base / f"model-{number}.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}))
    single.unlink()
    why = finish()
    retrain(base / "model-1.safetensors")
    assert str(why()).endswith("but base/model-1.safetensors has changed since.")

    for file in base.glob("*.safetensors*"):
        file.unlink()
    why = finish("model.allow_pickle=true")
    (base / "pytorch_model.bin").write_bytes(b"y")
    assert "base/pytorch_model.bin has changed since" in str(why())


def test_large_weights_are_compared_by_samples(finish: Callable[..., Why], base: Path) -> None:
    weights = {"weight": np.random.default_rng(0).standard_normal((5 << 20), dtype=np.float32)}
    save_file(weights, base / "model.safetensors")
    why = finish()
    shutil.copyfile(base / "model.safetensors", base / "copy")
    (base / "copy").replace(base / "model.safetensors")
    assert why() is None
    retrain(base / "model.safetensors")
    assert "base/model.safetensors has changed since" in str(why())


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_files_beside_the_weights_of_the_base_model_are_compared_by_content(
    name: str, finish: Callable[..., Why], base: Path
) -> None:
    why, text = finish(), (base / name).read_bytes()
    (base / name).write_bytes(text + b" ")
    assert f"base/{name} has changed since" in str(why())
    (base / name).unlink()
    assert f"base/{name} is missing" in str(why())
    (base / name).write_bytes(text)
    (base / "README.md").write_text("text")
    (base / "checkpoint-2").mkdir()
    (base / "trainer_state.json").write_text("{}")
    assert why() is None
    (base / "added_tokens.json").write_text("{}")
    assert "base/added_tokens.json has changed since" in str(why())


def test_code_of_the_base_model_is_compared_if_it_runs(finish: Callable[..., Why], base: Path) -> None:
    (base / "modeling_own.py").write_text("a = 1\n")
    why = finish()
    (base / "modeling_own.py").write_text("a = 2\n")
    assert why() is None
    why = finish("model.trust_remote_code=true")
    (base / "modeling_own.py").write_text("a = 3\n")
    assert "base/modeling_own.py has changed since" in str(why())


def test_another_spelling_of_the_base_models_path_is_no_change(
    finish: Callable[..., Why], base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    why = finish()
    assert why("model.name_or_path=./base") is None
    assert why("model.name_or_path=base/") is None
    assert why(f"model.name_or_path={base}") is None
    shutil.copytree(base, tmp_path / "another")
    assert "model.name_or_path was 'base' and is 'another'" in str(why("model.name_or_path=another"))
    shutil.copytree(base, tmp_path / "moved" / "base")
    monkeypatch.chdir(tmp_path / "moved")
    assert why() is None


def test_settings_of_the_evaluation_are_compared_if_they_select_the_model(finish: Callable[..., Why]) -> None:
    training = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    rarer = ["training.eval_steps=2", "training.save_steps=4"]
    why = finish(data={"validation": 0.2}, training=training)
    assert why(*rarer, "training.eval_strategy=epoch") is None
    assert why("system_gain.rows=3") is None
    best = {**training, "load_best_model_at_end": True}
    why = finish(data={"validation": 0.2}, training=best)
    assert "training.eval_steps was 1 and is 2" in str(why(*rarer))
    assert "training.save_steps was 2 and is 4" in str(why(*rarer))
    assert why("system_gain.rows=3", "training.logging_steps=3") is None
    why = finish(data={"validation": 0.2}, training={**best, "metric_for_best_model": "system_gain"})
    assert "system_gain.rows was " in str(why("system_gain.rows=3"))
    plateau = {**training, "lr_scheduler_type": "reduce_lr_on_plateau"}
    why = finish(data={"validation": 0.2}, training=plateau)
    assert "training.eval_steps was 1 and is 2" in str(why("training.eval_steps=2"))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["config.json"], "but its config.json is missing"),
        (["tokenizer.json"], "but its tokenizer.json is missing"),
        (["config.json", "tokenizer_config.json"], "but its config.json, tokenizer_config.json are missing"),
        (["chat_template.jinja"], "but its chat_template.jinja is missing"),
        (["generation_config.json"], "but its generation_config.json is missing"),
    ],
)
@pytest.mark.parametrize("when", ["before the end", "after it", "emptied"])
def test_a_finished_model_without_side_files_names_the_command_that_writes_them(
    lost: list[str],
    message: str,
    when: str,
    finish: Callable[..., Why],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also if it never had them, as the last save couldn't write them."""
    recipe, run = tmp_path / "recipe-0.yaml", tmp_path / "run"
    why = finish()
    for name in lost:
        (run / name).write_text("") if when == "emptied" else (run / name).unlink()
    if when == "before the end":
        done = json.loads((run / OUTCOME).read_text(encoding="utf-8"))
        (run / OUTCOME).write_text(json.dumps({**done, **describe_results(run)}), encoding="utf-8")
    assert why() is None
    assert main(["--recipe", str(recipe)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    them = "them" if len(lost) > 1 else "it"
    assert shown.startswith("already finished (2 steps, 19")
    assert f"{message} (`python -m train.loop.side_files {run}` writes {them} again): the model of this recipe" in shown


def test_a_finished_adapter_lacks_its_own_configuration_and_no_model(
    finish: Callable[..., Why], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    finish(adapter={"r": 4})
    finished, _ = find_finished_run(load_recipe(tmp_path / "recipe-0.yaml"))
    assert finished is not None
    assert finished.missing == ("adapter_config.json",)
    (run / "adapter_config.json").write_text("{}")
    (run / "config.json").unlink()
    done = json.loads((run / OUTCOME).read_text(encoding="utf-8"))
    (run / OUTCOME).write_text(json.dumps({**done, **describe_results(run)}), encoding="utf-8")
    finished, _ = find_finished_run(load_recipe(tmp_path / "recipe-0.yaml"))
    assert finished is not None
    assert finished.missing == ()


def test_saved_weights_are_compared_by_content(finish: Callable[..., Why], tmp_path: Path) -> None:
    why = finish()
    file = tmp_path / "run" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    assert "its model.safetensors is damaged" in str(why())
