"""The plan: its choice of a configuration, its hours, and the models of the papers."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from trl.trainer.utils import get_peak_flops

from train.errors import UserError
from train.model.architecture import Architecture, inspect_architecture
from train.model.flops import PEAK_FLOPS
from train.model.load import load_config
from train.preflight.plan.candidates import evaluate_candidate
from train.preflight.plan.cluster import RESERVE, parse_cluster
from train.preflight.plan.description import describe_plan
from train.preflight.plan.memory import STRATEGIES
from train.preflight.plan.plan import RunPlan, plan_run
from train.recipe import Recipe, load_recipe
from train.sft import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "model_configs"
RECIPES = sorted(path for path in ROOT.glob("recipes/*/sft/*.yaml") if "smollm2" not in str(path))
PUBLISHED = {  # parameters that the hub counts in the safetensors files, in thousand millions
    "mistral-community/Mistral-7B-v0.2": 7.24,
    "meta-llama/Meta-Llama-3-8B": 8.03,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    "meta-llama/Llama-3.1-70B": 70.6,
    "Qwen/Qwen2.5-14B-Instruct": 14.8,
    "microsoft/phi-4": 14.7,
    "upstage/SOLAR-10.7B-Instruct-v1.0": 10.7,
    "google/gemma-2-9b-it": 9.24,
}
JANUS_ROWS = np.full(196_998, 1_000)  # an epoch: 751 steps of 32 sequences of 8,192 tokens, eight rows in each


def shape_for(recipe: Recipe, name: str | None = None) -> Architecture:
    name = (name or recipe.model.name_or_path).rpartition("/")[2].lower()
    return inspect_architecture(recipe, AutoConfig.from_pretrained(CONFIGS / f"{name}.json"))


def plan_of(recipe: Recipe, gpus: str, nodes: int = 1, model: str | None = None) -> RunPlan:
    shape = shape_for(recipe, model)
    return plan_run(recipe, shape, parse_cluster(gpus, nodes), JANUS_ROWS, steps=3_004, epochs=4, sequences_per_step=32)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parts[-3] + "-" + path.stem)
def test_every_recipe_of_the_papers_has_its_model_and_a_plan(path: Path) -> None:
    recipe = load_recipe(path)
    shape = shape_for(recipe)
    assert shape.total == pytest.approx(PUBLISHED[recipe.model.name_or_path] * 1e9, rel=0.01)
    assert (shape.trained == shape.total) is (recipe.adapter is None)
    plan = plan_of(recipe, "8xH100-80GB", 4)
    assert plan.chosen
    text = path.read_text(encoding="utf-8")
    assert 40 <= len(text.splitlines()) <= 70
    assert "arXiv:" in text
    assert str(path.relative_to(ROOT)) in text
    assert recipe.output_dir.startswith("outputs/")
    config = re.search(r"--config_file (\S+)", text)
    assert config
    assert (ROOT / config[1]).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parts[-3] + "-" + path.stem)
def test_the_launch_that_a_recipe_names_fits_the_gpus_that_the_paper_had(path: Path) -> None:
    recipe, text = load_recipe(path), path.read_text(encoding="utf-8")
    config = re.search(r"--config_file (\S+)", text)
    assert config
    one_gpu = "single_gpu" in config[1]
    gpus, nodes = ("1xA100-80GB", 1) if one_gpu else ("4xA100-80GB", 1) if "janus" in text else ("8xH100", 4)
    plan = plan_of(recipe, gpus, nodes)
    names = {strategy.config_file: strategy.name for strategy in STRATEGIES}
    name = "DDP" if one_gpu else names[config[1]]
    assert next(candidate for candidate in plan.candidates if candidate.memory.strategy == name).fits


def test_the_command_can_be_pasted_and_clusters_have_an_end() -> None:
    recipe = load_recipe(ROOT / "recipes/janus-7b/sft/full.yaml", ["adapter={r: 16}", "output_dir=a folder"])
    launch = plan_of(recipe, "8xH100").launch or ""
    assert shlex.split(launch)[-2:] == ["adapter={r: 16}", "output_dir=a folder"]
    for gpus, nodes in (("99999999999999x80GB", 1), ("8xH100", 100_000), ("8xH100", 0)):
        with pytest.raises(UserError, match="Write 1 to 16,384 GPUs in all"):
            parse_cluster(gpus, nodes)


def test_a_70b_on_two_nodes() -> None:
    recipe = load_recipe(
        ROOT / "recipes/janus-llama-3-8b/sft/full.yaml",
        ["training.optim=adamw_torch_fused", "training.per_device_train_batch_size=1"],
    )
    plan = plan_of(recipe, "8x80GB", 2, "meta-llama/Llama-3.1-70B")
    assert plan.parameters == 70_553_706_496  # the hub's count
    # by hand: 2 + 4 + 12 bytes a parameter, over 16 GPUs: 79.4 GB, and little that is kept whole
    zero3 = next(candidate for candidate in plan.candidates if candidate.memory.strategy == "ZeRO-3").memory
    states = zero3.parameters + zero3.gradients + zero3.optimizer
    assert states == pytest.approx(70_553_706_496 * 18 / 16, rel=0.001)
    assert plan.chosen == "ZeRO-3 offload"
    assert plan.config_file == "accelerate_configs/zero3_offload.yaml"
    assert any("adamw_bnb_8bit" in note for note in plan.notes)
    assert any("far longer than the hours shown" in note for note in plan.notes)
    # 6 N D within the convention's rest: the table of embeddings out, attention in
    tokens = 4 * 196_998_000
    assert plan.parameter_flops == pytest.approx(6 * (70_553_706_496 - 128_256 * 8_192) * tokens)
    assert plan.hours == pytest.approx(plan.flops / (16 * 989e12 * 0.4 * 3_600))


@pytest.mark.parametrize(
    ("gpus", "nodes", "model", "overrides"),
    [
        ("8x80GB", 2, "meta-llama/Llama-3.1-70B", ["training.optim=adamw_torch_fused"]),
        ("4x40GB", 1, None, ["training.optim=adamw_torch"]),
        ("1x24GB", 1, None, ["training.optim=adamw_torch_fused"]),
        ("2xH200", 1, None, ["training.optim=adamw_bnb_8bit"]),
        ("8xH100", 3, None, ["adapter={r: 16}"]),
        ("4x24GB", 1, None, ["training.per_device_train_batch_size=64"]),
    ],
)
def test_the_fewest_nodes_are_those_of_a_plain_loop(
    gpus: str, nodes: int, model: str | None, overrides: list[str]
) -> None:
    recipe = load_recipe(
        ROOT / "recipes/janus-llama-3-8b/sft/full.yaml", ["training.per_device_train_batch_size=1", *overrides]
    )
    shape = shape_for(recipe, model)

    def fits(count: int, optimizer: str) -> str | None:
        """Return the first strategy without offload and caution that fits `count` nodes with that optimizer."""
        other = load_recipe(
            ROOT / "recipes/janus-llama-3-8b/sft/full.yaml",
            ["training.per_device_train_batch_size=1", *overrides, f"training.optim={optimizer}"],
        )
        cluster = parse_cluster(gpus, count)
        ways = [evaluate_candidate(other, shape, cluster, way, optimizer, recipe.data.max_length) for way in STRATEGIES]
        ways = ways if count * cluster.gpus > 1 else ways[:1]  # one GPU has nothing to share
        names = [candidate.memory.strategy for candidate in ways if candidate.fits and not candidate.caution]
        return next((name for name in names if "offload" not in name), None)

    plan = plan_run(recipe, shape, parse_cluster(gpus, nodes), JANUS_ROWS, steps=1, epochs=1, sequences_per_step=1)
    eight_bit = "adamw_bnb_8bit"
    assert [candidate.optimizer for candidate in plan.fewest_nodes] == list(dict.fromkeys([plan.optimizer, eight_bit]))
    for candidate in plan.fewest_nodes:
        counts = range(1, (candidate.nodes or 4) + 1)  # beyond the first that fits nothing is to be known
        fewest = next(((count, name) for count in counts if (name := fits(count, candidate.optimizer))), (None, None))
        assert (candidate.nodes, candidate.strategy) == fewest
        assert candidate.here == fits(nodes, candidate.optimizer)
    own = plan.fewest_nodes[0]
    text = " ".join(describe_plan(plan))
    assert (f"without offload: --nodes {own.nodes} ({own.strategy})" if own.nodes else "none up to 64") in text
    eight = plan.fewest_nodes[-1]
    if own.nodes != 1 and eight is not own:
        here = "these nodes" if nodes > 1 else "this node"
        fits_too = f"fits {here} ({eight.here})" if eight.here else f"does not fit {here} either"
        fits_too = "is not needed here" if own.here else fits_too
        assert f"8-bit Adam (training.optim={eight_bit}) {fits_too}; its fewest nodes: --nodes {eight.nodes}" in text


def test_the_least_communication_that_fits_is_chosen() -> None:
    recipe = load_recipe(ROOT / "recipes/janus-7b/sft/full.yaml", ["training.optim=adamw_torch_fused"])
    chosen = [plan_of(recipe, gpus).chosen for gpus in ("8xH200", "8x80GB", "4x80GB", "8x40GB", "2x24GB")]
    order = [strategy.name for strategy in STRATEGIES]
    places = [order.index(name) if name else len(order) for name in chosen]
    assert places == sorted(places)
    assert len(set(places)) >= 3
    for gpus in ("8x80GB", "4x40GB"):
        plan = plan_of(recipe, gpus)
        for candidate in plan.candidates:
            assert candidate.fits is (candidate.memory.total <= plan.cluster.memory * (1 - RESERVE))
        fitting = [
            candidate.memory.strategy for candidate in plan.candidates if candidate.fits and not candidate.caution
        ]
        assert plan.chosen == (fitting[0] if fitting else None)


def test_a_plan_does_not_choose_16_bit_weights_without_master_weights() -> None:
    path = ROOT / "recipes/janus-7b/sft/full.yaml"
    plan = plan_of(load_recipe(path), "8xH200")
    assert plan.candidates[0].fits
    assert plan.candidates[0].caution
    assert plan.chosen == "ZeRO-1"
    float32 = plan_of(load_recipe(path, ["model.dtype=float32"]), "8xH200")
    assert (float32.chosen, float32.candidates[0].caution) == ("DDP", None)
    lora = plan_of(load_recipe(ROOT / "recipes/janus-7b/sft/lora.yaml"), "8xH200")
    assert (lora.chosen, lora.candidates[0].caution) == ("DDP", None)


def test_every_configuration_of_a_strategy_exists() -> None:
    import yaml

    for strategy in STRATEGIES:
        config = yaml.safe_load((ROOT / strategy.config_file).read_text())
        deepspeed = config.get("deepspeed_config", {}).get("deepspeed_config_file")
        assert (deepspeed is None) is (strategy.stage == 0)
        if deepspeed:
            zero = json.loads((ROOT / deepspeed).read_text())["zero_optimization"]
            assert zero["stage"] == strategy.stage
            assert ("offload_optimizer" in zero) is ("offload_param" in zero) is strategy.offload


@pytest.mark.parametrize(
    ("written", "gpus", "gibibytes", "gpu"),
    [
        ("4x80GB", 4, 80, "H100"),
        ("8xH100-80GB", 8, 80, "H100"),
        ("2xH200", 2, 141, "H200"),
        ("1xa100-40GB", 1, 40, "A100"),
        ("8Xh100-80gb", 8, 80, "H100"),
    ],
)
def test_gpus_are_parsed(written: str, gpus: int, gibibytes: int, gpu: str) -> None:
    plan = parse_cluster(written, 2)
    assert (plan.gpus, plan.processes, plan.memory, plan.gpu) == (gpus, 2 * gpus, gibibytes * 1024**3, gpu)
    assert plan.assumed is (written == "4x80GB")


@pytest.mark.parametrize("written", ["80GB", "4xA100", "4xH1000-80GB", "0x80GB", "x", "4x", "4x0GB"])
def test_invalid_gpus_are_user_errors(
    written: str, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    assert refused("--recipe", recipe_file(), "--check", "--gpus", written).startswith("--gpus: ")


def test_the_peaks_are_those_that_trl_has() -> None:
    assert {name: get_peak_flops(name, "bfloat16") for name in PEAK_FLOPS} == PEAK_FLOPS


def test_the_check_shows_the_plan_and_writes_it(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "without-weights"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    recipe = recipe_file(model={"name_or_path": str(folder)})
    report = tmp_path / "report.json"
    options = ["--check", "--gpus", "2x80GB", "--nodes", "3", "--mfu", "0.5", "--json", str(report)]
    assert main(["--recipe", str(recipe), *options]) == 0
    shown = capsys.readouterr().out
    plan = json.loads(report.read_text(encoding="utf-8"))
    assert plan["schedule"]["processes"] == plan["plan"]["cluster"]["gpus"] * 3 == 6
    assert plan["plan"]["steps"] == plan["schedule"]["steps"]
    assert plan["plan"]["tokens"] == plan["training"]["tokens"]
    assert plan["plan"]["chosen"] == "DDP"
    assert plan["plan"]["launch"] in " ".join(shown.replace(" \\\n", " ").split())
    assert f"--num_processes 6 --num_machines 3 --machine_rank RANK" in plan["plan"]["launch"]  # noqa: F541
    assert len(plan["plan"]["candidates"]) == 5
    assert all(candidate["memory"]["strategy"] in shown for candidate in plan["plan"]["candidates"])


def test_options_of_the_plan_alone_are_refused(recipe_file: Callable[..., Path]) -> None:
    for options in (["--gpus", "8x80GB"], ["--check", "--nodes", "2"], ["--check", "--mfu", "0.4"]):
        with pytest.raises(SystemExit) as usage:
            main(["--recipe", str(recipe_file()), *options])
        assert usage.value.code == 2


def test_a_mixture_of_experts_is_refused(recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path) -> None:
    from transformers import MixtralConfig

    from train.errors import UserError

    with pytest.raises(UserError, match="mixture of experts"):
        inspect_architecture(load_recipe(recipe_file()), MixtralConfig())


def test_a_plan_notes_what_it_cannot_count(tmp_path: Path) -> None:
    path = ROOT / "recipes/janus-7b/sft/full.yaml"
    text = " ".join(
        describe_plan(
            plan_of(
                load_recipe(path, ["training.optim=galore_adamw", "training.optim_target_modules=all-linear"]), "8xH200"
            )
        )
    )
    assert "training.optim: galore_adamw is counted as AdamW" in text
    text = " ".join(describe_plan(plan_of(load_recipe(path, ["training.deepspeed=ds_configs/zero2.json"]), "8xH200")))
    assert "training.deepspeed in the recipe decides how the run is split" in text
    lora = load_recipe(ROOT / "recipes/janus-7b/sft/qlora.yaml")
    assert "paged_adamw_8bit may move" in " ".join(describe_plan(plan_of(lora, "1x24GB")))


def test_a_plan_initializes_no_gpu() -> None:
    before = torch.cuda.is_initialized()
    plan_of(load_recipe(ROOT / "recipes/janus-7b/sft/qlora.yaml"), "1x24GB")
    assert torch.cuda.is_initialized() is before
    assert torch.get_default_device().type == "cpu"


def test_load_config_needs_no_weights(tiny_model: Path, recipe_file: Callable[..., Path]) -> None:
    assert load_config(load_recipe(recipe_file()).model).hidden_size == 64
