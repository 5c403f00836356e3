"""Timeout of collectives: long enough for the first rank to write a checkpoint, in the process group of two ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import ROOT, launch

from train.loop.arguments import save_timeout
from train.recipe import load_recipe

CONFIGS = ROOT / "tests" / "model_configs"
LLAMA_70B = 70_553_706_496
"""Parameters, by its model card's architecture: 2 x 128,256 x 8,192 + 80 x 855,654,400 + 8,192."""


@pytest.fixture
def recipe_of(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a recipe for a published config, without weights."""

    def write(config: str, dtype: str = "bfloat16", **sections: object) -> Path:
        folder = tmp_path / config
        folder.mkdir(exist_ok=True)
        shutil.copyfile(CONFIGS / f"{config}.json", folder / "config.json")
        return recipe_file(model={"name_or_path": str(folder), "dtype": dtype}, **sections)

    return write


@pytest.mark.parametrize(
    ("config", "dtype", "adapter", "processes", "seconds"),
    [
        ("llama-3.1-70b", "bfloat16", None, 16, round(LLAMA_70B * (2 + 4 + 4 + 4) / 200e6)),
        ("llama-3.1-70b", "float32", None, 16, round(LLAMA_70B * (4 + 4 + 4 + 4) / 200e6)),
        ("llama-3.1-70b", "bfloat16", {"r": 16}, 16, 1_800),  # an adapter is written within seconds
        ("llama-3.1-70b", "bfloat16", None, 1, 1_800),  # nobody waits
        ("mistral-7b-v0.2", "bfloat16", None, 8, 1_800),  # 101 GB take 507 s
    ],
)
def test_the_timeout_is_the_time_to_write_a_checkpoint_at_200_mb_per_second(
    config: str, dtype: str, adapter: object, processes: int, seconds: int,
    recipe_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert save_timeout(load_recipe(recipe_of(config, dtype, adapter=adapter))) == seconds


def read_timeouts(recipe: str, report: str) -> None:
    """Start the process group of a recipe as train/sft.py does, and write its timeout."""
    import torch
    from torch import distributed

    from train.loop.arguments import training_arguments

    arguments = training_arguments(load_recipe(recipe))
    group = distributed.distributed_c10d._get_default_group()
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    Path(f"{report}-{arguments.process_index}.json").write_text(json.dumps(timeout.total_seconds()))


@pytest.mark.parametrize(("config", "own"), [(None, 2_345), ("zero3.yaml", None)])
def test_the_process_group_has_the_timeout_of_the_rule_or_of_the_recipe(
    config: str | None, own: int | None, recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    recipe = recipe_of("llama-3.1-70b", training={"ddp_timeout": own} if own else {})
    launch(2, config, recipe, tmp_path / "timeout", job=read_timeouts, logs=tmp_path / "logs").succeeded()
    reports = [json.loads((tmp_path / f"timeout-{rank}.json").read_text()) for rank in (0, 1)]
    assert reports == [own or round(LLAMA_70B * 14 / 200e6)] * 2
