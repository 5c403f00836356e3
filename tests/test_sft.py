"""train/sft.py: the files of a run, and the errors of invalid input."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from chat_templates import TRL_TEMPLATES
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.sft import main

ROOT = Path(__file__).parents[1]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_complete_run_saves_a_model_that_transformers_loads(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    recipe = recipe_file(
        data={"validation": 0.25},
        training={"num_train_epochs": 2, "eval_strategy": "epoch"},
        tracking={"tensorboard": True, "wandb": {"project": "test", "mode": "offline"}},
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    result = subprocess.run(
        [*command, "train/sft.py", "--recipe", recipe, "training.learning_rate=2e-3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "parameters (100.00%)" in result.stdout
    assert "Traceback" not in result.stderr

    run = tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert "generation" not in tokenizer.chat_template.replace("add_generation_prompt", "")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.generation_config.eos_token_id in (2, [2])
    before, after = load_file(tiny_model / "model.safetensors"), load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)

    metrics = lines_of(run / "metrics.jsonl")
    logged = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, len(logged) + 1))
    assert all(math.isfinite(line[key]) for line in logged for key in ("loss", "grad_norm", "learning_rate"))
    assert sum("eval_loss" in line for line in metrics) == 2
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["learning_rate"] == 2e-3
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "loss.png" in (run / "report.md").read_text()
    assert list((run / "tensorboard").glob("events.*"))
    assert list((run / "wandb").glob("offline-run-*"))
    for line in logged:
        assert f"step {line['step']}/{len(logged)} loss {line['loss']:.4f}" in result.stdout


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True, "use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}]
)
def test_lora_saves_an_adapter_that_peft_loads(
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    tiny_model: Path,
    settings: dict,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--recipe", str(recipe_file(adapter={"r": 4, **settings}))]) == 0
    shown = capsys.readouterr().out
    assert "LoRA r=4" in shown
    assert "(100.00%)" not in shown
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    layers = 2 if "target_modules" in settings else 7
    assert sum("lora_B" in name for name in weights) == 2 * layers
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.tensor([[1, 50, 300, 2]])
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not torch.allclose(model(ids).logits, base(ids).logits)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_4_bit_weights_train_an_adapter_on_the_cpu(
    recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(
        adapter={"r": 4},
        quantization={"bnb_4bit_compute_dtype": "float32"},
        training={"num_train_epochs": ..., "max_steps": 3},
    )
    assert main(["--recipe", str(recipe)]) == 0
    assert "on 4-bit nf4" in capsys.readouterr().out
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run")


def test_a_run_resumes_from_its_newest_complete_checkpoint(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": ..., "max_steps": 4}
    recipe = str(recipe_file(training=training))
    assert main(["--recipe", recipe]) == 0
    run = tmp_path / "run"
    assert json.loads((run / "checkpoint-4" / "COMPLETE.json").read_text())["step"] == 4
    uninterrupted, metrics = load_file(run / "model.safetensors"), lines_of(run / "metrics.jsonl")
    (run / "checkpoint-4" / "COMPLETE.json").unlink()
    capsys.readouterr()
    assert main(["--recipe", recipe]) == 0
    shown = capsys.readouterr().out
    assert f"resuming from {run / 'checkpoint-2'}" in shown
    assert "step 2/4" not in shown
    again, metrics_again = load_file(run / "model.safetensors"), lines_of(run / "metrics.jsonl")
    assert all(torch.equal(uninterrupted[name], again[name]) for name in uninterrupted)
    assert [line["loss"] for line in metrics_again] == [line["loss"] for line in metrics]
    (run / "checkpoint-2" / "COMPLETE.json").unlink()
    (run / "checkpoint-4" / "COMPLETE.json").unlink()
    assert main(["--recipe", recipe]) == 2
    assert "is incomplete" in capsys.readouterr().err
    assert main(["--recipe", recipe, "--resume", str(run / "checkpoint-2")]) == 2
    assert "is incomplete" in capsys.readouterr().err
    assert main(["--recipe", recipe, "--resume", "never"]) == 0
    capsys.readouterr()
    assert main(["--recipe", recipe, "training.learning_rate=0.5", "seed=1"]) == 2
    error = capsys.readouterr().err
    assert "belongs to another run: seed was 42 and is 1; training.learning_rate was 0.001 and is 0.5" in error


def test_a_run_does_not_write_into_a_folder_with_another_model(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tiny_model: Path, tmp_path: Path
) -> None:
    assert "would be overwritten" in refused("--recipe", recipe_file(output_dir=str(tiny_model)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused("--recipe", recipe_file())
    (tmp_path / "run" / "adapter_config.json").unlink()
    shutil.copy(tiny_model / "model.safetensors", tmp_path / "run")
    assert "run holds a model" in refused("--recipe", recipe_file(adapter={"r": 4}))


def test_broken_weights_and_unknown_modules_are_errors(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tiny_model: Path, tmp_path: Path
) -> None:
    assert "nosuch" in refused("--recipe", recipe_file(adapter={"target_modules": ["nosuch"]}))
    shutil.copytree(tiny_model, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"cut short")
    assert "can't be loaded" in refused("--recipe", recipe_file(model={"name_or_path": str(tmp_path / "broken")}))


def test_a_trained_base_model_stops_at_the_end_token_of_the_template(
    recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    """Base models have another end token, at which a trained model would never stop."""
    base = tmp_path / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "<|endoftext|>"
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    assert main(["--recipe", str(recipe_file(model={"name_or_path": str(base)}))]) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert saved.eos_token == "<|im_end|>"
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config
    assert set(generation.eos_token_id) == {saved.eos_token_id, tokenizer.eos_token_id}


def test_a_model_without_an_end_token_stops_at_each_token_that_can_follow_an_answer(
    recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    base, ends = tmp_path / "glm", ["<|user|>", "<|observation|>"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "<|endoftext|>"
    others = ["[gMASK]", "<sop>", "<|system|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": others + ends})
    tokenizer.chat_template = (TRL_TEMPLATES / "glm4moe.jinja").read_text(encoding="utf-8")
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = recipe_file(model={"name_or_path": str(base)}, chat={"template": None})
    assert main(["--recipe", str(recipe)]) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert saved.eos_token == "<|user|>"
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "run").generation_config
    assert saved.convert_ids_to_tokens(generation.eos_token_id) == [*ends, "<|endoftext|>"]


def test_validation_rows_are_evaluated_at_the_end_without_an_eval_strategy(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    assert main(["--recipe", str(recipe_file(data={"validation": 0.25}))]) == 0
    assert "eval_loss" in lines_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert "validation loss at the end" in (tmp_path / "run" / "report.md").read_text()


def test_no_secret_of_the_environment_is_written(
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "s3cr3t" * 7)
    training = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": ..., "max_steps": 2}
    recipe = recipe_file(training=training, tracking={"wandb": {"mode": "offline"}, "tensorboard": True})
    assert main(["--recipe", str(recipe)]) == 0
    shown = capsys.readouterr()
    assert "s3cr3t" not in shown.out + shown.err
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 15
    assert [path for path in written if b"s3cr3t" in path.read_bytes()] == []


# Invalid input: exit code 2 and one `error:` that says where and what to write.


def test_an_invalid_recipe_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: {name_or_path: x}\noutput_dirr: y\n")
    result = subprocess.run(
        [sys.executable, "train/sft.py", "--recipe", path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "output_dir" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.learning_rate=1"], "the following arguments are required: --recipe"),
        (["--recipe", "x.yaml", "--resume", "never", "--nosuch"], "--nosuch"),
        (["--recipe", "x.yaml", "--json", "x.json"], "--check"),
    ],
)
def test_an_invalid_command_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    usage, _, error = capsys.readouterr().err.partition("\nerror: ")
    assert usage.startswith("usage: ")
    assert words in error


MODEL_ERRORS = {
    "there is no folder recipes/nowhere": {"name_or_path": "recipes/nowhere"},
    "can't be loaded": {"name_or_path": "nobody/no-such-model"},
}


@pytest.mark.parametrize("words", MODEL_ERRORS)
def test_a_missing_model(words: str, recipe_file: Callable[..., Path], refused: Callable[..., str]) -> None:
    error = refused("--recipe", recipe_file(model=MODEL_ERRORS[words]))
    assert "model.name_or_path" in error
    assert words in error


def test_pickled_weights_need_allow_pickle(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_model / "model.safetensors")
    torch.save({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    assert "model.allow_pickle: true" in refused("--recipe", recipe_file(model={"name_or_path": str(folder)}))
    allowed = recipe_file(
        model={"name_or_path": str(folder), "allow_pickle": True}, training={"num_train_epochs": ..., "max_steps": 1}
    )
    assert main(["--recipe", str(allowed)]) == 0


def test_code_of_a_model_is_not_run(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "model.trust_remote_code: true" in refused("--recipe", recipe_file(model={"name_or_path": str(folder)}))
    assert not (tmp_path / "ran").exists()


RUN_ERRORS = {
    "a missing kernel": (
        {"model": {"attention": "flash_attention_2"}, "training": {"bf16": True}},
        ["model.attention", "flash-attn", "pip install"],
    ),
    "more tokens than positions": ({"data": {"max_length": 4096}}, ["data.max_length", "2,048 positions"]),
    "an unknown template": (
        {"chat": {"template": "chatlm"}},
        ["chat.template", "chatml, chatml-tools, mistral-system"],
    ),
    "a template that loses messages": ({"chat": {"template": None}}, ["chat.template", "loses messages"]),
    "rows that are too long": ({"data": {"max_length": 100}}, ["data.max_length (100)", "data.overlong: drop"]),
    "rows that are all too long": (
        {"data": {"max_length": 8, "overlong": "drop"}},
        ["no training row remains", "longest"],
    ),
    "no such data": ({"data": {"sources": [{"path": "no/such.jsonl"}]}}, ["no/such.jsonl"]),
    "an optimizer that is not installed": ({"training": {"optim": "galore_adamw"}}, ["galore"]),
}


@pytest.mark.parametrize("case", RUN_ERRORS)
def test_errors_found_before_training(case: str, recipe_file: Callable[..., Path], refused: Callable[..., str]) -> None:
    sections, words = RUN_ERRORS[case]
    error = refused("--recipe", recipe_file(**sections))
    assert [word for word in words if word not in error] == []


def test_an_unwritable_output_dir_is_an_error_before_the_data_is_read(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no row")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "run"):
        error = refused("--recipe", recipe_file(output_dir=str(folder), data={"sources": [{"path": str(broken)}]}))
        assert error.startswith(f"output_dir: {folder} can't be written: ")
    assert (tmp_path / "taken").read_text() == "a file"


def test_rows_that_the_template_refuses_are_errors_or_skipped(
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    rows_file: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = rows_file.read_text().splitlines()
    lines[4] = json.dumps(
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "tool", "content": "b"},
                {"role": "assistant", "content": "c"},
            ]
        }
    )
    rows_file.write_text("\n".join(lines))
    error = refused("--recipe", recipe_file())
    assert "1 refused by the template" in error
    assert "rows.jsonl:5" in error
    assert main(["--recipe", str(recipe_file(data={"on_bad_row": "skip"}))]) == 0
    shown = capsys.readouterr().out
    assert "23 rows" in shown
    assert "1 row skipped, refused by the template" in shown


def test_wandb_without_a_key_is_an_error_and_not_a_prompt(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_file(tracking={"wandb": {"project": "x"}})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    result = subprocess.run(
        [sys.executable, "train/sft.py", "--recipe", recipe],
        cwd=ROOT,
        env=environment | nowhere,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "error: tracking.wandb: " in result.stderr
    assert "tracking.wandb.mode: offline" in result.stderr
    assert "Traceback" not in result.stderr
