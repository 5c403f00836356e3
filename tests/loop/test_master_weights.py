"""Full fine-tuning of 16-bit weights without float32 master copies: it loses updates, and it is refused.

Each launch kind: one process, DDP, DeepSpeed's stages and sections, FSDP; by the environment and by the file.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file, save_file
from torchao.optim import AdamW8bit
from transformers import LlamaConfig, LlamaForCausalLM

from train.loop.checkpoint.fingerprint import run_fingerprint
from train.loop.master_weights import Launch, master_weights_error, read_launch, read_launch_configuration
from train.model.load import load_config, loaded_dtype
from train.recipe import ModelSection, load_recipe
from train.sft import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
UNSHARDED = {"cpu", "single_gpu", "ddp"}
RECIPES = sorted(path for kind in ("sft", "preference") for path in (ROOT / "recipes").glob(f"*/{kind}/*.yaml"))
RATE, STEPS = 5e-6, 20


def change_of_weights(dtype: torch.dtype, **arguments: Any) -> torch.Tensor:
    """Return the change of each used weight of a small Llama after STEPS steps of AdamW on the same batches."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]  # norms start at 1
    before = torch.cat([weight.detach().float().flatten() for weight in matrices])
    kind = AdamW8bit if arguments else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=RATE, weight_decay=0.0, **arguments)
    with torch.random.fork_rng():
        for step in range(STEPS):
            torch.manual_seed(1 + step)
            ids = torch.randint(0, 64, (2, 64))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([weight.detach().float().flatten() for weight in matrices]) - before


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return change_of_weights(torch.float32)


def share_of(change: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the part of `exact` that is in `change`: its projection; 1 = all of it."""
    return float(change @ exact / (exact @ exact))


def test_most_updates_of_16_bit_weights_are_lost(exact: torch.Tensor) -> None:
    lossy = change_of_weights(torch.bfloat16)
    assert (exact != 0).float().mean() > 0.99
    assert (lossy != 0).float().mean() < 0.15
    assert share_of(lossy, exact) < 0.2


def test_stochastic_rounding_loses_none(exact: torch.Tensor) -> None:
    """torchao's, which is accepted: each rounding is off, and their mean is right."""
    torch.compiler.set_stance("force_eager")
    try:
        change = change_of_weights(torch.bfloat16, bf16_stochastic_round=True)
    finally:
        torch.compiler.set_stance("default")
    assert 0.8 < share_of(change, exact) < 1.2


def environment_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the variables that `accelerate launch` sets with this configuration."""
    monkeypatch.chdir(ROOT)
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(path), "--main_process_port", "0", "--main_process_ip", "localhost", "sft.py"]
    )
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    elif arguments.multi_gpu or arguments.use_fsdp:
        environment = prepare_multi_gpu_env(arguments)
    else:
        environment = prepare_simple_launcher_cmd_env(arguments)[1]
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_launch_configuration_keeps_masters_or_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, recipe_file: Callable[..., Path]
) -> None:
    recipe = load_recipe(recipe_file(), ["model.dtype=bfloat16", "training.bf16=true"])
    by_file = read_launch_configuration({}, yaml.safe_load(path.read_text()))
    assert read_launch({}, environment_of(path, monkeypatch)) == by_file
    error = master_weights_error(recipe, "bfloat16", by_file)
    assert (error is not None) == (path.stem in UNSHARDED)
    assert master_weights_error(recipe, "float32", by_file) is None


def test_a_deepspeed_plugin_without_a_file_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "zero1.yaml").read_text())
    for stage in (None, 0, 3):
        plugin = {"zero3_init_flag": False, "gradient_accumulation_steps": 1} | (
            {} if stage is None else {"zero_stage": stage}
        )
        path = tmp_path / "launch.yaml"
        path.write_text(yaml.safe_dump(settings | {"deepspeed_config": plugin}))
        expected = Launch({"zero_optimization": {"stage": 2 if stage is None else stage}})
        assert read_launch_configuration({}, yaml.safe_load(path.read_text())) == expected
        assert read_launch({}, environment_of(path, monkeypatch)) == expected


def test_what_a_save_needs_is_read_without_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sharding_error refuses ZeRO-3 that does not gather weights, and FSDP that saves its shards."""
    zero3 = yaml.safe_load((ROOT / "accelerate_configs" / "zero3.yaml").read_text())
    fsdp = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    plugin = {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True}
    gathering = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
    shards = fsdp["fsdp_config"] | {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}
    path = tmp_path / "launch.yaml"
    for config, expected in (
        (zero3 | {"deepspeed_config": plugin}, Launch(gathering)),
        (fsdp | {"fsdp_config": shards}, Launch(fsdp=True, state_dict="SHARDED_STATE_DICT")),
    ):
        path.write_text(yaml.safe_dump(config))
        assert read_launch_configuration({}, config) == expected
        assert read_launch({}, environment_of(path, monkeypatch)) == expected


ON, OFF = {"enabled": "auto"}, {"enabled": False}
OWN_MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True}


@pytest.mark.parametrize(
    ("launch", "training", "refused"),
    [
        (Launch({"zero_optimization": {"stage": 0}, "bf16": ON}), {"bf16": True}, None),
        (Launch({"zero_optimization": {"stage": 0}}), {"bf16": True}, None),  # accelerate adds the section
        (Launch({"zero_optimization": {"stage": 0}}), {"bf16": False}, "DeepSpeed at stage 0"),
        (Launch({"zero_optimization": {"stage": 0}, "bf16": OFF}), {"bf16": True}, "DeepSpeed at stage 0"),
        (Launch({"bf16": ON}), {"bf16": False}, "DeepSpeed at stage 0"),
        (Launch({"zero_optimization": {"stage": 1}}), {"bf16": False}, None),
        (Launch({"zero_optimization": {"stage": 3}, "bf16": OWN_MASTERS}), {}, "bf16.bf16_master_weights_and_grads: true"),
        (Launch(fsdp=True), {"bf16": True}, None),
        (Launch(fsdp=True), {"fp16": True}, None),
        (Launch(fsdp=True), {"bf16": False}, "FSDP makes such copies only with"),
        (Launch(), {"bf16": True}, "one process and DDP keep no such copies"),
        (Launch(), {"optim": "adamw_torch_8bit"}, "one process and DDP"),
        (Launch(), {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round = true"}, None),
        (Launch(), {"optim": "adamw_anyprecision", "optim_args": "use_kahan_summation=true"}, None),
        (Launch(), {"optim": "adamw_anyprecision"}, "one process and DDP"),
        (Launch(), {"optim": "stable_adamw"}, None),
        (Launch(), {"optim": "adamw_bnb_8bit"}, "one process and DDP"),
    ],
)  # fmt: skip
def test_who_keeps_masters(
    launch: Launch, training: dict[str, Any], refused: str | None, recipe_file: Callable[..., Path]
) -> None:
    recipe = load_recipe(recipe_file(training={"bf16": ..., **training}), ["model.dtype=bfloat16"])
    error = master_weights_error(recipe, "bfloat16", launch)
    assert (refused in error) if refused else error is None
    allowed = load_recipe(recipe_file(training={"bf16": ..., **training}), ["model.allow_16bit_training=true"])
    assert master_weights_error(allowed, "bfloat16", launch) is None
    adapter = load_recipe(recipe_file(adapter={"r": 2}, training={"bf16": ..., **training}))
    assert master_weights_error(adapter, "bfloat16", launch) is None


@pytest.mark.parametrize(
    ("dtype", "quantized", "refused"), [("bfloat16", False, True), ("float32", False, False), ("float32", True, True)]
)
def test_copies_that_an_adapter_trains_in_full_need_masters(
    dtype: str, quantized: bool, refused: bool, recipe_file: Callable[..., Path]
) -> None:
    """TRL casts all that is trained on quantized weights to bfloat16."""
    adapter = {"r": 2, "modules_to_save": ["embed_tokens"]}
    overrides = [f"model.dtype={dtype}", *(["quantization={}"] if quantized else [])]
    recipe = load_recipe(recipe_file(adapter=adapter, training={"bf16": True}), overrides)
    error = master_weights_error(recipe, dtype, Launch())
    assert (error is not None) == refused
    assert error is None or error.startswith("adapter.modules_to_save: training copies of embed_tokens in bfloat16")
    assert error is None or ("`model.dtype: float32`" in error) != quantized
    assert master_weights_error(recipe, dtype, Launch({"zero_optimization": {"stage": 2}})) is None
    allowed = load_recipe(recipe_file(adapter=adapter), [*overrides, "model.allow_16bit_training=true"])
    assert master_weights_error(allowed, dtype, Launch()) is None


def test_the_recipe_may_name_the_distribution(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 2}}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    plain = {"ACCELERATE_MIXED_PRECISION": "no"}
    for deepspeed in content, json.dumps(content), str(tmp_path / "ds.json"):
        assert read_launch({"deepspeed": deepspeed}, plain) == Launch(content)
        assert read_launch_configuration({"deepspeed": deepspeed}, {"distributed_type": "NO"}) == Launch(content)
    assert read_launch({"fsdp": "full_shard"}, {}) == Launch(fsdp=True)
    assert read_launch({}, plain) == read_launch({}, {"WORLD_SIZE": "1"}) == Launch()
    assert read_launch({}, {}) is None


def test_a_run_on_one_process_is_refused_before_the_weights_are_loaded(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(model={"dtype": "bfloat16"}, training={"bf16": True, "max_steps": 1, "num_train_epochs": ...})
    error = refused("--recipe", recipe)
    assert error.startswith("model.dtype: bfloat16: full fine-tuning would lose most updates")
    assert "Write `model.dtype: float32`" in error
    assert not (tmp_path / "run").exists()
    assert main(["--recipe", str(recipe), "model.allow_16bit_training=true"]) == 0
    assert "step 1/1" in capsys.readouterr().out


def test_auto_is_the_type_of_the_checkpoint(
    tiny_model: Path, tmp_path: Path, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    model = ModelSection(name_or_path=str(tmp_path), dtype="auto")
    recipe = recipe_file(model={"name_or_path": str(tmp_path), "dtype": "auto"})
    assert loaded_dtype(model, load_config(model)) == "float32"
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert loaded_dtype(model, load_config(model)) == "bfloat16"
    assert refused("--recipe", recipe).startswith("model.dtype: auto, here bfloat16: full fine-tuning")
    (tmp_path / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if name != "dtype"})
    )
    assert loaded_dtype(model, load_config(model)) == "float32"
    weights = {name: value.half() for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert loaded_dtype(model, load_config(model)) == "float16"


def test_a_check_that_does_not_know_the_launch_has_a_note(
    recipe_file: Callable[..., Path],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = str(recipe_file(model={"dtype": "bfloat16"}, training={"bf16": True}))
    monkeypatch.setenv("COLUMNS", "1000")
    for repeated in (False, True):  # the second reads the checks of the first from the cache
        assert main(["--recipe", recipe, "--check"]) == 0, repeated
        assert "One process and ddp.yaml lose most updates and refuse to start" in capsys.readouterr().out
    for fine in ("model.dtype=float32", "adapter={r: 2}", "model.allow_16bit_training=true"):
        assert main(["--recipe", recipe, fine, "--check"]) == 0
        assert "ddp.yaml" not in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "one process and DDP keep no such copies" in refused("--recipe", recipe, "--check")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["--recipe", recipe, "--check"]) == 0
    assert "ddp.yaml" not in capsys.readouterr().out


def test_the_permission_is_no_other_run(recipe_file: Callable[..., Path]) -> None:
    """Checkpoints of earlier versions have no such key."""
    recipe = recipe_file()
    allowed = load_recipe(recipe, ["model.allow_16bit_training=true"])
    assert run_fingerprint(load_recipe(recipe)) == run_fingerprint(allowed)
    assert not any("16bit" in key for key in run_fingerprint(allowed))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_every_recipe_passes_with_the_launch_that_it_names(path: Path) -> None:
    text = path.read_text()
    command = next(line for line in text.splitlines() if "accelerate launch" in line)
    words = shlex.split(command.lstrip("# ").rstrip("\\"))
    config = yaml.safe_load((ROOT / words[words.index("--config_file") + 1]).read_text())
    recipe = load_recipe(path)
    assert recipe.model.dtype != "auto"
    assert not re.search("allow_16bit", text)
    assert master_weights_error(recipe, recipe.model.dtype, read_launch_configuration(recipe.training, config)) is None
