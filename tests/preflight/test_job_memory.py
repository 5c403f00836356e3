"""The warning for a job that doesn't fit its GPUs: the figures, and what would fit."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from test_plan import candidates_for

from train.preflight.plan.cluster import parse_cluster
from train.preflight.plan.job_memory import memory_warning, open_candidates, parse_gpu_names, read_strategy
from train.preflight.plan.memory import DDP
from train.preflight.plan.settings import written_settings
from train.recipe import load_recipe
from train.recipe.schedule import sequences_per_step

ROOT = Path(__file__).parents[2]
FULL = ROOT / "recipes/janus-llama-3-8b/sft/full.yaml"
LLAMA_70B = "meta-llama/Llama-3.1-70B"


def warning(overrides: Sequence[str], gpus: str, nodes: int, config: str, model: str | None = None) -> str | None:
    candidates = candidates_for(FULL, *overrides, model=model)
    strategy = read_strategy(yaml.safe_load((ROOT / config).read_text(encoding="utf-8")), candidates.recipe)
    assert strategy is not None
    return memory_warning(candidates, parse_cluster(gpus, nodes), strategy, config)


@pytest.mark.parametrize(
    ("gpus", "nodes", "config", "model", "optimizer"),
    [
        ("8x80GB", 2, "accelerate_configs/zero3_multinode.yaml", LLAMA_70B, "adamw_torch_fused"),
        ("8xH100", 1, "accelerate_configs/zero3.yaml", LLAMA_70B, "adamw_bnb_8bit"),
        ("4x40GB", 1, "accelerate_configs/zero3.yaml", None, "adamw_torch"),
        ("8x40GB", 1, "accelerate_configs/zero2.yaml", None, "adamw_torch_fused"),
        ("1x40GB", 1, "accelerate_configs/single_gpu.yaml", None, "adamw_torch_fused"),
    ],
)
def test_suggested_settings_fit(
    gpus: str, nodes: int, config: str, model: str | None, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each suggestion is applied and planned again, without a warning."""
    monkeypatch.chdir(ROOT)
    overrides = [f"training.optim={optimizer}"]
    message = warning(overrides, gpus, nodes, config, model)
    assert message is not None
    cluster, candidates = parse_cluster(gpus, nodes), candidates_for(FULL, *overrides, model=model)
    strategy = read_strategy(yaml.safe_load((ROOT / config).read_text(encoding="utf-8")), candidates.recipe)
    assert strategy is not None
    total = candidates.memory(written_settings(candidates.recipe, strategy), cluster).total
    assert f"({config}) needs {total / 2**30:,.1f} GiB on each of {cluster.processes} GPUs" in message
    assert f"and {cluster.memory * 0.92 / 2**30:,.1f} of their {cluster.memory / 2**30:,.0f} GiB can be used" in message
    ways = re.search(r"What fits: (.*?)\.(?: More nodes|$)", message)
    assert ways
    for way in ways[1].split("; or "):
        words = shlex.split(way)
        options = dict(zip(words[::2], words[1::2], strict=False)) if words[0].startswith("--") else {}
        changed = [word for word in words if word.startswith(("training.", "model."))]
        taken = int(options.get("--nodes", nodes)), options.get("--config", config)
        assert warning([*overrides, *changed], gpus, *taken, model) is None, way
        written, planned = load_recipe(FULL, overrides), load_recipe(FULL, [*overrides, *changed])
        assert sequences_per_step(written, 8) == sequences_per_step(planned, 8)


def test_a_job_that_fits_and_one_that_fits_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert warning([], "8xH100", 1, "accelerate_configs/zero3.yaml") is None
    evaluation = warning(["training.per_device_eval_batch_size=512"], "8xH100", 1, "accelerate_configs/zero3.yaml")
    assert evaluation is not None
    size = re.search(r"runs out of memory in its first evaluation\. Write (training\.\w+=\d+)\.$", evaluation)
    assert size
    assert warning([size[1]], "8xH100", 1, "accelerate_configs/zero3.yaml") is None
    message = warning([], "8x6GB", 1, "accelerate_configs/zero3.yaml")
    assert message is not None
    assert "What fits" not in message
    assert message.endswith("Write a smaller data.max_length, or train an adapter.")


def test_a_sequence_of_pairs_holds_two_documents_of_the_greatest_length(recipe_file: Callable[..., Path]) -> None:
    """So it takes as much memory as one of rows of twice the length."""
    cluster, rows = parse_cluster("1x80GB"), {"data": {"max_length": 256}}
    pairs, short, long = (
        open_candidates(load_recipe(recipe_file(**sections)))
        for sections in (rows | {"preference": {"loss": "dpo"}}, rows, {"data": {"max_length": 512}})
    )
    of_pairs, of_short, of_long = (
        candidates.memory(written_settings(candidates.recipe, DDP), cluster) for candidates in (pairs, short, long)
    )
    assert of_pairs == of_long
    assert of_pairs.total > of_short.total


@pytest.mark.parametrize(
    ("names", "gpus"),
    [
        (["h100"], "8xH100"),
        (["nvidia_a100-sxm4-80gb"], "8xA100-80GB"),
        (["", "a100&80gb"], "8xA100-80GB"),
        (["", "gpu:h200:8"], "8xH200"),
        (["1g.10gb"], "8x10GB"),
        (["nvidia_h100_nvl"], None),  # 94 GB
        (["a100"], None),  # 40 or 80 GB
        (["v100"], None),
        ([""], None),
    ],
)
def test_gpu_names_of_clusters_are_parsed(names: list[str], gpus: str | None) -> None:
    assert parse_gpu_names(names, 8) == (gpus and gpus.upper().replace("X", "x"))
    assert parse_gpu_names(names, 0) is None


def test_the_strategy_is_read_from_the_launch_configuration(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Callable[..., Path]
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(FULL)
    names = {
        path.stem: (strategy := read_strategy(yaml.safe_load(path.read_text(encoding="utf-8")), recipe))
        and strategy.name
        for path in (ROOT / "accelerate_configs").glob("*.yaml")
    }
    assert names == {
        "cpu": "DDP", "single_gpu": "DDP", "ddp": "DDP", "fsdp2": None, "hsdp_multinode": None, "zero1": "ZeRO-1",
        "zero2": "ZeRO-2", "zero3": "ZeRO-3", "zero3_hpz_multinode": None, "zero3_multinode": "ZeRO-3",
        "zero3_offload": "ZeRO-3 offload",
    }  # fmt: skip
    inline = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu"}}
    assert read_strategy(inline, recipe).name == "ZeRO-3 offload"
    own = load_recipe(FULL, ["training.deepspeed=ds_configs/zero2.json"])
    assert read_strategy(inline, own) is None
