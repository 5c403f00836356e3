"""Settings that the machine, the model or the rows don't allow: an error before the first step, in one paragraph."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from train.recipe import load_recipe
from train.sft import main

ROOT = Path(__file__).parents[2]

FAULTS = {
    "a schedule without what it needs": (
        {"training": {"lr_scheduler_type": "cosine_with_min_lr"}},
        ["training.lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler_kwargs"],
    ),
    "a schedule with what it doesn't know": (
        {"training": {"lr_scheduler_kwargs": {"nosuch": 1}}},
        ["training.lr_scheduler_type", "lr_scheduler_kwargs", "'nosuch'"],
    ),
    "an optimizer with what it can't read": ({"training": {"optim_args": "betas"}}, ["training.optim"]),
    "a package that is not installed": (
        {"training": {"use_liger_kernel": True}},
        ["training.use_liger_kernel: ", "pip install liger-kernel"],
    ),
    "a compiler that there is none of": (
        {"training": {"torch_compile": True, "torch_compile_backend": "nosuch"}},
        ["training: ", "NOSUCH"],
    ),
    "offloading from the CPU": ({"training": {"activation_offloading": True}}, ["training.activation_offloading"]),
    "the hub out of reach": ({"training": {"push_to_hub": True}}, ["training.push_to_hub: ", "HF_TOKEN"]),
    "a metric that nobody measures": (
        {
            "data": {"validation": 0.25},
            "training": {"metric_for_best_model": "bleu", "eval_strategy": "epoch", "save_strategy": "best"},
        },
        ["training.metric_for_best_model", "'bleu'", "eval_loss"],
    ),
    "a best checkpoint that listens least": (
        {
            "data": {"validation": 0.25},
            "training": {
                "metric_for_best_model": "eval_system_gain",
                "greater_is_better": False,
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
                "load_best_model_at_end": True,
            },
        },
        ["training.greater_is_better", "found false", "eval_system_gain", "but a greater "],
    ),
    "a best checkpoint of the highest loss": (
        {
            "data": {"validation": 0.25},
            "training": {
                "greater_is_better": True,
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
                "load_best_model_at_end": True,
            },
        },
        ["training.greater_is_better", "found true", "loss", "but a smaller "],
    ),
    "too few rows for one whole batch": (
        {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 100}},
        ["training.dataloader_drop_last", "100"],
    ),
    "too few rows for one whole batch, however many steps": (
        {
            "training": {
                "dataloader_drop_last": True,
                "per_device_train_batch_size": 100,
                "num_train_epochs": ...,
                "max_steps": 3,
            }
        },
        ["training.dataloader_drop_last", "100"],
    ),
    "a module to save that is not there": (
        {"adapter": {"r": 2, "modules_to_save": ["lm_head", "embed_token"]}},
        ["adapter.modules_to_save", "'embed_token'", "embed_tokens", "lm_head", "q_proj"],
    ),
    "heads that processes can't share": (
        {"model": {"sequence_parallel": 3}},
        ["model.sequence_parallel: 3 does not divide the 4 attention heads", "Allowed: 1, 2, 4."],
    ),
    "processes that can't share sequences": (
        {"model": {"sequence_parallel": 2}},
        ["model.sequence_parallel: 2 does not divide the 1 process", "--num_processes"],
    ),
    "a kernel that can't share sequences": (
        {"model": {"sequence_parallel": 2, "attention": "eager"}},
        ["model.sequence_parallel does not support the attention kernel eager"],
    ),
    "a loss of each process": (
        {"model": {"sequence_parallel": 2}, "training": {"average_tokens_across_devices": False}},
        ["model.sequence_parallel: ", "training.average_tokens_across_devices"],
    ),
    "noise that depends on a sequence's length": (
        {"model": {"sequence_parallel": 2}, "training": {"neftune_noise_alpha": 5.0}},
        ["model.sequence_parallel: ", "training.neftune_noise_alpha"],
    ),
    "a loss of all logits": (
        {"model": {"sequence_parallel": 2}, "training": {"label_smoothing_factor": 0.1}},
        ["model.sequence_parallel: ", "training.label_smoothing_factor"],
    ),
    "a kernel that can't train here": ({"model": {"attention": "flex_attention"}}, ["model.attention", "CUDA"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_setting_that_cannot_work_is_an_error(
    case: str, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    sections, words = FAULTS[case]
    error = refused("--recipe", recipe_file(**sections))
    assert [word for word in words if word not in error] == []
    assert "\n" not in error


def test_an_unreachable_hub_is_an_error(recipe_file: Callable[..., Path]) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none"}
    result = subprocess.run(
        [sys.executable, "train/sft.py", "--recipe", recipe_file(training={"push_to_hub": True})],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "error: training.push_to_hub: " in result.stderr
    assert "Traceback" not in result.stderr


def test_the_last_smaller_batch_is_dropped_if_the_recipe_asks_for_it(
    recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"dataloader_drop_last": True, "per_device_train_batch_size": 7}
    assert main(["--recipe", str(recipe_file(data={"packing": False}, training=training))]) == 0
    assert "step 3/3 " in capsys.readouterr().out  # 24 rows: the last 3 are left out


def test_modules_to_save_are_saved(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert main(["--recipe", str(recipe_file(adapter={"r": 2, "modules_to_save": ["norm"]}))]) == 0
    assert any(name.endswith(".norm.weight") for name in load_file(tmp_path / "run" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("eval_system_gain", True), ("eval_system_accuracy_over_none", None), ("loss", False), ("eval_entropy", True),
     ("eval_entropy", False)],
)  # fmt: skip
def test_the_direction_of_a_metric_is_checked(
    metric: str, greater: bool | None, recipe_file: Callable[..., Path]
) -> None:
    training = {"metric_for_best_model": metric, "greater_is_better": greater, "load_best_model_at_end": True,
                "eval_strategy": "epoch", "save_strategy": "epoch"}  # fmt: skip
    recipe = load_recipe(recipe_file(data={"validation": 0.25}, training=training))
    assert recipe.training["greater_is_better"] is greater


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_a_check_names_a_package_that_is_not_installed(
    recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    error = refused("--recipe", recipe_file(training={"use_liger_kernel": True}), "--check")
    assert error.startswith("training.use_liger_kernel: it needs the package liger-kernel")
    assert main(["--recipe", str(recipe_file(training={"use_liger_kernel": False})), "--check"]) == 0


@pytest.mark.parametrize("alpha", [-5, -0.1])
def test_negative_noise_is_an_error_of_the_recipe(
    alpha: float, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    error = refused("--recipe", recipe_file(training={"neftune_noise_alpha": alpha}), "--check")
    assert f"training.neftune_noise_alpha: found {alpha}" in error


@pytest.mark.parametrize("mode", [[], ["--check"]], ids=["start", "check"])
@pytest.mark.parametrize("size", ["SP", "CP", "TP"])
def test_parallelism_of_the_launch_that_does_not_support_packed_rows_is_an_error(
    size: str,
    mode: list[str],
    monkeypatch: pytest.MonkeyPatch,
    recipe_file: Callable[..., Path],
    refused: Callable[..., str],
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size}_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")  # sharded data parallelism is supported
    error = refused("--recipe", recipe_file(), *mode)
    assert f"parallelism_config_{size.lower()}_size: 2 in the launch configuration" in error
    assert "dp_shard" not in error
    assert "write `model.sequence_parallel`" in error


def test_a_check_counts_the_steps_of_gpus_that_share_sequences(
    recipe_file: Callable[..., Path], refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(recipe_file(model={"sequence_parallel": 2}, training={"per_device_train_batch_size": 1}))
    assert main(["--recipe", recipe, "--check", "--gpus", "6x80GB"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "; 6 processes, 2 for each sequence 3 sequences per step" in page
    error = refused("--recipe", recipe, "--check", "--gpus", "5x80GB")
    assert "model.sequence_parallel: 2 does not divide the 5 processes" in error


@pytest.mark.parametrize("mode", [[], ["--check"]], ids=["start", "check"])
def test_replicas_of_shards_must_be_all_processes(
    mode: list[str], monkeypatch: pytest.MonkeyPatch, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "8")
    error = refused("--recipe", recipe_file(), *mode)
    assert "dp_replicate_size: 2 x parallelism_config_dp_shard_size: 8 in the launch configuration" in error
    assert "the number of processes (1). Launch one node with accelerate_configs/fsdp2.yaml." in error
