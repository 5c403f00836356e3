"""The same 64 rows, however they are spread: over processes, accumulation steps and ZeRO's stages.

All in float32 on CPU processes, with the configurations that the project ships.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import WORDS
from ranks import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("deepspeed")

STEPS = 5
SAVED_AT = 3
NOISE_OF_LOSS = 2e-6
"""Relative. A loss is a sum of some 3,000 float32 terms (rounding 6e-8 each), added up in another order by each
setting; errors of such sums grow with the root of their number: 6e-8 x 55 = 3e-6, and the mean of them over steps less."""
NOISE_OF_WEIGHTS = 1e-3
"""Of the largest change of a tensor. Adam divides by the root of the squared gradient, so the relative rounding of a
small gradient is that of its update: where one is epsilon's size (1e-6), rounding is some percent of it. What is wrong
in kind (a mean over ranks in place of tokens, a rank's rows twice) moves weights by tens of percent."""


@dataclass(frozen=True)
class Setting:
    """A way to train 8 sequences a step."""

    processes: int = 1
    config: str | None = None
    packed: bool = True
    lora: bool = False

    @property
    def name(self) -> str:
        kind = Path(self.config or ("ddp" if self.processes > 1 else "alone")).stem
        return f"{kind}-{self.processes}-{'packed' if self.packed else 'rows'}-{'lora' if self.lora else 'full'}"


@dataclass(frozen=True)
class Trained:
    folder: Path
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def rows_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(11)
    text = lambda count: " ".join(chance.choice(WORDS.split()) for _ in range(count))  # noqa: E731
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as lines:
        for _ in range(64):
            turns = [("system", chance.randint(1, 20)), ("user", 10), ("assistant", chance.choice([1, 5, 40, 120]))]
            messages = [{"role": role, "content": text(count)} for role, count in turns]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(
    rows_64: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Trained]:
    """Trains a setting, once a module; with `resumed` from a checkpoint half-way, in another folder."""
    root = tmp_path_factory.mktemp("runs")
    known: dict[tuple[Setting, bool], Trained] = {}

    def recipe(setting: Setting, folder: Path) -> Path:
        content: dict[str, Any] = {
            "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
            "chat": {"template": "chatml"},
            "data": {"sources": [{"path": str(rows_64)}], "max_length": 256, "packing": setting.packed},
            "training": {
                "bf16": False,
                "gradient_checkpointing": True,
                "learning_rate": 2e-3,
                "adam_epsilon": 1e-6,
                "lr_scheduler_type": "linear",
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 8 // setting.processes,
                "max_steps": STEPS,
                "logging_steps": 1,
                "save_strategy": "steps",
                "save_steps": SAVED_AT,
            },
            "output_dir": str(folder),
        }
        if setting.lora:
            content["adapter"] = {"r": 4, "modules_to_save": ["lm_head"]}
        path = root / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def train(setting: Setting, *, resumed: bool = False) -> Trained:
        if (setting, resumed) not in known:
            folder = root / (setting.name + ("-resumed" if resumed else ""))
            if resumed:
                train(setting)
                shutil.copytree(root / setting.name / f"checkpoint-{SAVED_AT}", folder / f"checkpoint-{SAVED_AT}")
            outcome = launch(
                setting.processes, setting.config, "--recipe", recipe(setting, folder), logs=root / f"{folder.name}-logs"
            ).succeeded()
            assert "Warning" not in "".join(outcome.output)
            assert resumed == ("going on from" in outcome.output[0])
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in metrics if "loss" in line]
            weights = load_file(folder / ("adapter_model.safetensors" if setting.lora else "model.safetensors"))
            known[setting, resumed] = Trained(
                folder, [line["loss"] for line in steps], [line["grad_norm"] for line in steps], weights
            )
        return known[setting, resumed]

    return train


def test_measure(trained) -> None:
    import time, sys
    for packed in (True, False):
        for lora in (False, True):
            ref = None
            for processes, config in ((1, None), (2, None), (2, "zero1.yaml"), (2, "zero2.yaml"), (2, "zero3.yaml"), (4, "zero3.yaml")):
                t = time.time()
                try:
                    got = trained(Setting(processes, config, packed, lora))
                except AssertionError as e:
                    print("FAIL", processes, config, packed, lora, str(e)[-3000:], file=sys.stderr); continue
                if ref is None: ref = got; start = load_file(str(got.folder).rsplit("/",1)[0] + "/" + got.folder.name + "/checkpoint-3/" + ("adapter_model.safetensors" if lora else "model.safetensors"))
                dl = max(abs(a-b)/b for a,b in zip(got.losses, ref.losses))
                dn = max(abs(a-b)/b for a,b in zip(got.norms, ref.norms))
                dw = max(((got.weights[k]-ref.weights[k]).abs().max()/(ref.weights[k]-start[k]).abs().max()).item() for k in ref.weights)
                print(got.folder.name, f"{time.time()-t:.1f}s loss {dl:.1e} norm {dn:.1e} weights {dw:.1e}", len(got.losses), [round(x,4) for x in got.losses], file=sys.stderr)
