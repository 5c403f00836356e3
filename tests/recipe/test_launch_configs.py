"""The files of accelerate_configs/ and ds_configs/, read by accelerate, transformers and DeepSpeed."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from train.preflight.plan.memory import REDUCE_BUCKET

ROOT = Path(__file__).parents[2]
LAUNCHES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))


def filled_in(path: Path):
    """Return the DeepSpeed configuration as filled in by transformers for Mistral 7B."""
    from transformers import MistralConfig, TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = TrainingArguments(use_cpu=True, bf16=True, gradient_accumulation_steps=4, report_to=[])
    config = HfTrainerDeepSpeedConfig(json.loads(path.read_text()))
    config.trainer_config_process(arguments)
    model = type("Model", (), {"config": MistralConfig()})()
    config.trainer_config_finalize(arguments, model, num_training_steps=10)
    return config.config


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_reads_each_launch_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))  # raises for unknown keys
    if config.distributed_type == "DEEPSPEED":
        assert set(config.deepspeed_config) <= {
            "deepspeed_config_file", "zero3_init_flag", "deepspeed_multinode_launcher",
        }  # fmt: skip
        zero = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())["zero_optimization"]
        assert (zero["stage"] == 3) == config.deepspeed_config.get("zero3_init_flag", False)
        assert config.num_machines == 1 or config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
    if config.fsdp_config:
        options = {name for name in vars(launch_command_parser().parse_args(["x"])) if name.startswith("fsdp_")}
        assert set(config.fsdp_config) <= options
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if config.parallelism_config:
        sizes = ParallelismConfig(
            **{name.removeprefix("parallelism_config_"): size for name, size in config.parallelism_config.items()}
        )
        assert sizes.total_size == config.num_processes
        assert sizes.dp_replicate_size == config.num_machines
    assert config.mixed_precision in ("no", None)  # the recipe decides


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_each_file_starts_with_a_valid_launch_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    head = re.match(r"(#.*\n)+", path.read_text())
    lines = re.sub(r"\\\n#\s*", " ", head[0]).splitlines()
    (command,) = [line.lstrip("# ") for line in lines if "accelerate launch" in line]
    words = shlex.split(command)[2:]
    assert f"accelerate_configs/{path.name}" in words
    arguments = launch_command_parser().parse_args(["1" if word.startswith("$") else word for word in words])
    _validate_launch_command(arguments)
    assert Path(arguments.training_script).is_file()
    recipe = arguments.training_script_args[arguments.training_script_args.index("--recipe") + 1]
    assert Path(recipe).is_file()


def test_every_deepspeed_configuration_is_used_by_a_launch_configuration() -> None:
    used = {
        (yaml.safe_load(path.read_text()).get("deepspeed_config") or {}).get("deepspeed_config_file")
        for path in LAUNCHES
    }
    assert {f"ds_configs/{path.name}" for path in DEEPSPEED} == used - {None}


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_accepts_every_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = filled_in(path)
    assert "auto" not in json.dumps(config)
    keys = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization", "optimizer"}
    assert set(config) <= keys
    assert set(config["data_types"]) == {constants.GRAD_ACCUM_DTYPE}
    read = DeepSpeedConfig(config)
    assert read.zero_config.stage == int(re.search(r"zero(\d)", path.stem)[1])
    assert read.bfloat16_config.enabled
    assert read.grad_accum_dtype == "fp32"
    assert read.zero_config.zero_hpz_partition_size == (8 if "hpz" in path.stem else 1)
    assert read.communication_data_type == (torch.float32 if read.zero_config.stage == 1 else None)
    if read.zero_config.stage < 3:
        assert read.zero_config.reduce_bucket_size == REDUCE_BUCKET  # used by the memory plan
    if read.zero_config.stage == 1:
        assert read.bfloat16_config.immediate_grad_update
    with pytest.raises(ValueError, match="overlap_com"):  # unknown keys are errors
        DeepSpeedZeroConfig(**config["zero_optimization"], overlap_com=True)


@pytest.mark.parametrize(("kind", "processes"), [("NO", 1), ("NO", 2), ("MULTI_CPU", 2)])
def test_a_single_process_instead_of_several_prints_a_warning(tmp_path: Path, kind: str, processes: int) -> None:
    """accelerate silently starts one process for these configurations."""
    config = tmp_path / "launch.yaml"
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "cpu.yaml").read_text())
    config.write_text(yaml.safe_dump(settings | {"distributed_type": kind}), encoding="utf-8")
    started = ["--config_file", config, "--num_processes", processes, "train/sft.py", "--recipe", "nowhere.yaml"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    for exported in ({}, {"MASTER_ADDR": "node-1", "MASTER_PORT": "20001"} if processes == 1 else {}):
        result = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *map(str, started)],
            cwd=ROOT, capture_output=True, text=True, check=False, env=environment | exported,
        )  # fmt: skip
        lines = result.stderr.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1  # the recipe does not exist
        warnings = [line for line in lines if line.startswith("warning: ")]
        assert len(warnings) == (processes > 1)
        assert all("--config_file accelerate_configs/ddp.yaml" in line for line in warnings)
