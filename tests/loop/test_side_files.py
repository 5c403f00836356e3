"""Saves: the weights come first; a file beside them that fails is an error before training or a warning after it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_trainer import make_trainer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from train.errors import UserError
from train.loop import side_files
from train.loop.checkpoint import weights
from train.loop.checkpoint.manifest import COMPLETE
from train.loop.checkpoint.weights import check_savable, save_weights
from train.loop.metrics_log import StepLog
from train.loop.report import write_report
from train.loop.trainer import JanusTrainer
from train.model.tokenizer import load_tokenizer
from train.recipe import load_recipe
from train.sft import main

ONE_STEP = {"num_train_epochs": ..., "max_steps": 1}


class Unwritable:
    """A pre-tokenizer in Python, which tokenizer.json can't hold."""


def spoil(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer fail only when it is saved."""
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Unwritable())


def with_base(tiny_model: Path, folder: Path, **files: Any) -> Path:
    """Return the tiny model with other files: JSON or text under `config`, `generation_config` and so on."""
    shutil.copytree(tiny_model, folder)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


# The weights are those that transformers and peft write.


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_written_alike(model: PreTrainedModel | PeftModel, folder: Path, shard: str = "50GB") -> None:
    folder.mkdir()
    model.save_pretrained(folder / "theirs", **({} if isinstance(model, PeftModel) else {"max_shard_size": shard}))
    save_weights(model, folder / "ours", None)
    theirs, ours = tensors_of(folder / "theirs"), tensors_of(folder / "ours")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    files = [{path.name for path in (folder / who).glob("*.safetensors*")} for who in ("theirs", "ours")]
    assert files[0] == files[1]
    assert {path.name for path in (folder / "ours").iterdir()} == files[1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_weights_are_written_as_transformers_writes_them(
    tiny_model: Path, tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().T.contiguous().T)
    assert_written_alike(model, tmp_path / "one")
    monkeypatch.setattr(weights, "_SHARD", "60KB")
    assert_written_alike(model, tmp_path / "many", "60KB")
    save_weights(model, tmp_path / "one" / "ours", None)  # over an earlier save of another form
    assert tensors_of(tmp_path / "one" / "ours").keys() == tensors_of(tmp_path / "one" / "theirs").keys()
    assert not (tmp_path / "one" / "ours" / "model.safetensors").exists()


def test_names_that_transformers_changes_on_saving_are_changed(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, head_dim=8,
    )  # fmt: skip
    assert_written_alike(MixtralForCausalLM(config), tmp_path / "mixtral")


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_an_adapters_weights_and_settings_are_written_as_peft_writes_them(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, **settings))
    assert_written_alike(model, tmp_path / "adapter")
    errors = side_files.write_side_files(
        side_files.list_side_files(model, AutoTokenizer.from_pretrained(tiny_model)), tmp_path / "adapter" / "ours"
    )
    assert errors == {}
    theirs, ours = (
        json.loads((tmp_path / "adapter" / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")
    )
    assert ours == theirs
    assert not model.peft_config["default"].inference_mode


def test_weights_that_cannot_be_saved_are_an_error_before_training(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Two names of one tensor that the model doesn't declare as tied: transformers loads them and can't save them."""
    trainer = make_trainer(load_recipe(recipe_file()))
    check_savable(trainer.model)
    first, second = (trainer.model.model.layers[layer].mlp.up_proj for layer in (0, 1))
    second.weight = first.weight
    with pytest.raises(RuntimeError):
        trainer.model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="can be loaded but not saved"):
        trainer.train()
    assert trainer.state.global_step == 0


# Published generation settings.

PUBLISHED: dict[str, Any] = {
    "sampling without do_sample": {"temperature": 0.9, "top_p": 0.6, "do_sample": False},
    "beams without num_beams": {"early_stopping": True, "length_penalty": 2.0},
    "a list of stop tokens": {"eos_token_id": [2, 5], "top_k": 20},
    "no padding": {"pad_token_id": -1, "do_sample": True},
    "keys of other programs": {"chat_format": "chatml", "thinking": {"budget": [1, 2]}, "min_p": 0.1},
    "scores that nobody gets": {"output_scores": True, "use_cache": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_generation_settings_are_kept(
    kind: str, tiny_model: Path, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Settings that transformers would save unchanged are also saved with other stop tokens."""
    base = with_base(tiny_model, tmp_path / "base", generation_config={"eos_token_id": 2, **PUBLISHED[kind]})
    GenerationConfig.from_pretrained(base).save_pretrained(tmp_path / "theirs")
    recipe = load_recipe(recipe_file(model={"name_or_path": str(base)}))
    assert list(side_files.side_file_errors(recipe, load_tokenizer(recipe.model))) == []
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = [2, 7]
    writers = side_files.list_side_files(model, load_tokenizer(recipe.model))
    (tmp_path / "ours").mkdir()
    assert side_files.write_side_files(writers, tmp_path / "ours") == {}
    theirs, ours = (json.loads((tmp_path / who / "generation_config.json").read_text()) for who in ("theirs", "ours"))
    assert ours == {**theirs, "eos_token_id": [2, 7]}


def test_settings_that_transformers_would_refuse_to_save_are_saved(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"eos_token_id": 0, "do_sample": False, "temperature": 0.9, "top_p": 0.6}
    base = with_base(tiny_model, tmp_path / "base", generation_config=settings)
    training = {**ONE_STEP, "save_strategy": "steps", "save_steps": 1}
    assert main(["--recipe", str(recipe_file(model={"name_or_path": str(base)}, training=training))]) == 0
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        saved = AutoModelForCausalLM.from_pretrained(folder).generation_config
        assert (saved.do_sample, saved.temperature, saved.top_p) == (False, 0.9, 0.6)
        assert set(saved.eos_token_id) == {0, AutoTokenizer.from_pretrained(folder).eos_token_id}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": 2,', "can't be read"),  # transformers takes its defaults instead, without a word
        ({"early_stopping": "sometimes"}, "`early_stopping` must be"),
        ({"num_return_sequences": 3}, "`num_return_sequences`"),
        ({"cache_implementation": "none such"}, "`cache_implementation`"),
    ],
)
def test_settings_that_transformers_refuses_are_an_error_before_training(
    content: Any, message: str, recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    base = with_base(tiny_model, tmp_path / "base", generation_config=content)
    recipe = load_recipe(recipe_file(model={"name_or_path": str(base)}))
    [error] = side_files.side_file_errors(recipe, load_tokenizer(recipe.model))
    assert error.startswith(f"model.name_or_path: {base}/generation_config.json")
    assert message in error


# Known before training.


IN_THE_WAY = [
    *("config.json", "tokenizer.json", "model.safetensors", "README.md", "loss.png", "metrics.jsonl", "outcome.json"),
    *("attempts.jsonl", ".lock", "suspects.jsonl", "system_gain.jsonl", "system_gain.png"),
]


@pytest.mark.parametrize("name", IN_THE_WAY)
@pytest.mark.parametrize("check", [["--check"], []], ids=["check", "training"])
def test_a_folder_in_the_way_of_a_file_is_an_error_before_training(
    name: str, check: list[str], recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    message = refused("--recipe", recipe_file(), *check)
    if name == ".lock" and not check:
        assert message == f"output_dir: {tmp_path}/run/.lock can't be written: Is a directory. Name another folder."
        return
    assert message.startswith(f"output_dir: {tmp_path}/run/{name} is a folder, and the run writes a file there.")
    assert not (tmp_path / "run" / "metrics.jsonl").is_file()


def test_every_file_of_a_run_is_checked_before_training(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe_file(training={**ONE_STEP, "eval_strategy": "steps"}, data={"validation": 0.25}, system_gain={})
    assert main(["--recipe", str(path)]) == 0
    left = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()} - {"recipe.yaml"}
    assert {"metrics.jsonl", "outcome.json", "report.md"} <= left
    for name in left:
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).mkdir()
    recipe = load_recipe(path)
    faults = list(side_files.side_file_errors(recipe, load_tokenizer(recipe.model)))
    assert {name for name in left if any(f"/run/{name} is a folder" in error for error in faults)} == left


@pytest.mark.parametrize("check", [["--check"], []], ids=["check", "training"])
def test_a_file_in_the_way_of_checkpoints_is_an_error_before_training(
    check: list[str], recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "unfinished").write_text("notes")
    message = refused("--recipe", recipe_file(), *check)
    assert message.startswith(f"output_dir: {tmp_path}/run/unfinished is a file, and the run needs a folder there.")
    assert (tmp_path / "run" / "unfinished").read_text() == "notes"


def test_a_tokenizer_that_cannot_be_written_is_an_error_before_training(recipe_file: Callable[..., Path]) -> None:
    recipe = load_recipe(recipe_file(adapter={"r": 4, "target_modules": ["q_proj"]}))
    tokenizer = load_tokenizer(recipe.model)
    assert list(side_files.side_file_errors(recipe, tokenizer)) == []
    spoil(tokenizer)
    [error] = side_files.side_file_errors(recipe, tokenizer)
    assert error.startswith(f"model.name_or_path: {recipe.model.name_or_path}: its tokenizer can be read but not")
    assert "cannot be serialized" in error


# A README.md that is the user's own stays.


@pytest.mark.parametrize(
    "content",
    [b"# My project\n", b"", b"---\nlibrary_name: peft\n---\n# Another trainer's card", b"\xff\xfe not UTF-8"],
    ids=["a project", "empty", "another card", "not UTF-8"],
)
def test_a_readme_that_no_run_wrote_is_kept_with_a_message(
    content: bytes, recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(load_recipe(recipe_file()))
    readme = tmp_path / "run" / "README.md"
    readme.parent.mkdir(exist_ok=True)
    readme.write_bytes(content)
    trainer.save_model(str(readme.parent))
    assert readme.read_bytes() == content
    shown = capsys.readouterr().out
    assert f"{readme} was not written by janus-sft and is kept" in shown
    assert "warning" not in shown


def test_the_card_of_an_earlier_run_is_replaced(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for seed in 1, 2:
        recipe = load_recipe(recipe_file(seed=seed))
        make_trainer(recipe).save_model(str(run))
        assert f"seed: {seed}\n" in (run / "README.md").read_text()
    assert "is kept" not in capsys.readouterr().out


# What fails afterwards costs no weights.


def test_files_that_cannot_be_written_are_reported_and_written_later(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(training=ONE_STEP)
    trainer = make_trainer(load_recipe(recipe))
    trainer.train()
    run = tmp_path / "run"
    names = ["config.json", "generation_config.json", "chat_template.jinja", "README.md"]
    for name in names:
        (run / name).mkdir()
    trainer.save_model(str(run))
    shown = capsys.readouterr().out
    for name in ("config.json", "generation_config.json", "tokenizer", "README.md"):
        assert f"warning: {run}: {name} couldn't be written: " in shown
    assert f"python -m train.loop.side_files {run}" in shown
    expected = trainer.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_file(run / "model.safetensors").items())

    for name in names:
        (run / name).rmdir()
    (run / "recipe.yaml").write_text(recipe.read_text())
    assert side_files.main([str(run)]) == 0
    again = AutoModelForCausalLM.from_pretrained(run)
    assert again.generation_config.eos_token_id == [AutoTokenizer.from_pretrained(run).eos_token_id]
    trainer.save_model(str(tmp_path / "whole"))
    for path in (tmp_path / "whole").glob("*.json"):
        if path.name != "generation_config.json":  # whose stop tokens sft.py sets, not the trainer
            of_run, of_trainer = (json.loads(file.read_text()) for file in (run / path.name, path))
            assert of_run | {"use_cache": None} == of_trainer | {"use_cache": None}  # TRL has it false to train


def test_a_checkpoint_whose_tokenizer_cannot_be_written_is_complete(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(training={**ONE_STEP, "save_strategy": "steps", "save_steps": 1})
    trainer = make_trainer(load_recipe(recipe))
    spoil(trainer.processing_class)
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / COMPLETE).is_file()
    assert "tokenizer couldn't be written: " in capsys.readouterr().out


def test_a_run_whose_report_fails_names_the_folder_of_the_model(
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With folders in the way that were created during training."""
    run, end = tmp_path / "run", StepLog.on_train_end
    names = ["adapter_config.json", "report.md", "loss.png"]

    def put_in_the_way(self: StepLog, *args: Any, **kwargs: Any) -> None:
        for name in names:
            (run / name).mkdir()
        end(self, *args, **kwargs)

    monkeypatch.setattr(StepLog, "on_train_end", put_in_the_way)
    adapter = {"r": 4, "target_modules": ["q_proj"]}
    assert main(["--recipe", str(recipe_file(training=ONE_STEP, adapter=adapter))]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == f"the model is in {run}"
    assert shown.count("warning: ") == 3
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "finished"
    for name in names:
        (run / name).rmdir()
    assert side_files.main([str(run)]) == 0
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(load_recipe(run / "recipe.yaml").model.name_or_path), run
    )
    assert any(value.abs().max() > 0 for name, value in model.named_parameters() if "lora_B" in name)
    assert write_report(run, "", 1.0, {})
    assert (run / "loss.png").is_file()


def test_a_model_whose_last_evaluation_fails_is_saved(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """As if the GPU's memory sufficed for training and not for the evaluation: all steps are done by then."""

    class OutOfMemory(JanusTrainer):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    training = {**ONE_STEP, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(load_recipe(recipe_file(data={"validation": 0.25}, training=training)))
    trainer.__class__ = OutOfMemory
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    expected = trainer.model.state_dict()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
    AutoTokenizer.from_pretrained(tmp_path / "run")


def test_a_config_with_a_value_of_another_type_is_an_error_that_names_it(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tiny_model: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    base = with_base(tiny_model, tmp_path / "base", config={**config, "max_position_embeddings": 2048.0})
    message = refused("--recipe", recipe_file(model={"name_or_path": str(base)}), "--check")
    assert message.startswith(f"model.name_or_path: {base}: config.json: ")
    assert "max_position_embeddings" in message
    assert "2048.0" in message


def test_a_failed_upload_is_a_warning(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(load_recipe(recipe_file()))
    trainer.args.push_to_hub, trainer.args.hub_model_id = True, "somebody/some-model"
    trainer.save_model(str(tmp_path / "run"))
    shown = capsys.readouterr().out
    assert f"warning: training.push_to_hub: {tmp_path}/run was not uploaded: " in shown
    assert f"`hf upload somebody/some-model {tmp_path}/run`" in shown
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
