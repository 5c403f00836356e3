"""Every launch configuration on one device, as users start it: losses of a plain process, a save and a resume.

On a GPU `accelerate launch` starts one process with NCCL for each configuration, all at the same time. On a CPU, where
other tests train on several ranks, one configuration is run by the fork server of ranks.py.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from devices import GPU, HAS_GPU
from ranks import ROOT, free_port, launch
from small_runs import read_metrics, write_recipe, write_rows

from train.sft import main

pytest.importorskip("deepspeed")

STEPS, SAVED_AT = 4, 2
PINNED = "zero3_offload.yaml"
ON_CPU = ("zero3.yaml",)
ON_GPU = ("ddp.yaml", "zero1.yaml", "zero2.yaml", "zero3.yaml", PINNED, "fsdp2.yaml")
CONFIGS = ON_GPU if HAS_GPU else ON_CPU
ROUNDING = 1e-4
"""Relative, of losses in float32 whose sums were taken in another order."""


class Run(NamedTuple):
    folder: Path
    losses: list[float]


def with_torchs_optimizer(folder: Path) -> Path:
    """Write zero3_offload.yaml with torch's AdamW in place of DeepSpeed's, which is compiled for minutes."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / PINNED).read_text())
    deepspeed = json.loads((ROOT / config["deepspeed_config"]["deepspeed_config_file"]).read_text())
    assert all(deepspeed["zero_optimization"][f"offload_{part}"]["pin_memory"] for part in ("param", "optimizer"))
    del deepspeed["optimizer"]
    deepspeed["zero_force_ds_cpu_optimizer"] = False
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    config["deepspeed_config"]["deepspeed_config_file"] = str(folder / "deepspeed.json")
    (folder / PINNED).write_text(yaml.safe_dump(config))
    return folder / PINNED


def start_on_gpu(config: str | Path, recipe: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start train/sft.py on one GPU by `accelerate launch`."""
    path = ROOT / "accelerate_configs" / config
    words = ["--config_file", path, "--num_processes", 1, "--main_process_port", free_port()]
    words += [ROOT / "train" / "sft.py", "--recipe", recipe]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output, stderr=output,
        )  # fmt: skip


@pytest.fixture(scope="module")
def recipe_of(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function that writes the recipe of a name: its file, and the folder of its run."""
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root / "rows.jsonl", 40, seed=5, answers=(5, 30, 60))

    def write(name: str) -> tuple[Path, Path]:
        training = {"max_steps": STEPS, "save_steps": SAVED_AT, "gradient_accumulation_steps": 2}
        training |= {"optim": "adamw_torch", "adam_epsilon": 1e-3}  # test_sharded_training.py explains the epsilon
        folder = root / name
        recipe = write_recipe(root / f"{name}.yaml", tiny_model, rows, folder / "run", data={}, training=training)
        folder.mkdir(exist_ok=True)
        return recipe, folder / "run"

    return write


def read(folder: Path) -> Run:
    lines = read_metrics(folder)
    return Run(folder, [line["loss"] for line in lines if "loss" in line])


@pytest.fixture(scope="module")
def launched(recipe_of: Callable[[str], tuple[Path, Path]]) -> dict[str, tuple[Run, Run]]:
    """Train with each configuration, then resume each from a copy of its first checkpoint: both runs by name."""

    def run_all(suffix: str) -> dict[str, Run]:
        folders, processes = {}, {}
        for name in CONFIGS:
            recipe, folder = recipe_of(f"{name}-{suffix}")
            if suffix == "resumed":
                checkpoint = f"checkpoint-{SAVED_AT}"
                shutil.copytree(recipe_of(f"{name}-whole")[1] / checkpoint, folder / checkpoint)
            config = with_torchs_optimizer(folder.parent) if name == PINNED else name
            log, folders[name] = folder.parent / "log.txt", folder
            if HAS_GPU:
                processes[name] = start_on_gpu(config, recipe, log)
            else:
                launch(1, str(config), "--recipe", recipe, logs=folder.parent / "logs").succeeded()
        for name, process in processes.items():
            assert process.wait(240) == 0, (folders[name].parent / "log.txt").read_text()[-4_000:]
        return {name: read(folder) for name, folder in folders.items()}

    whole, resumed = run_all("whole"), run_all("resumed")
    return {name: (whole[name], resumed[name]) for name in CONFIGS}


@pytest.fixture(scope="module")
def plain(recipe_of: Callable[[str], tuple[Path, Path]]) -> Run:
    """Train in this process."""
    recipe, folder = recipe_of("plain")
    assert main(["--recipe", str(recipe)]) == 0
    return read(folder)


@pytest.mark.parametrize(
    "config", [pytest.param(name, marks=() if name in ON_CPU and not HAS_GPU else GPU) for name in ON_GPU]
)
def test_a_launch_trains_like_a_plain_process_and_resumes(
    config: str, launched: dict[str, tuple[Run, Run]], plain: Run
) -> None:
    whole, resumed = launched[config]
    assert len(plain.losses) == STEPS
    assert whole.losses == pytest.approx(plain.losses, rel=ROUNDING)
    assert resumed.losses == pytest.approx(whole.losses, rel=ROUNDING)
    assert (whole.folder / "model.safetensors").is_file()
