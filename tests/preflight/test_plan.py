"""The plan: its choice of a configuration, its hours, and the models of the papers."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from trl.trainer.utils import get_peak_flops

from train.errors import UserError
from train.model.architecture import Architecture, inspect_architecture
from train.model.classifier import as_classifier
from train.model.flops import PEAK_FLOPS, Flops
from train.model.load import load_config
from train.preflight.plan.candidates import Candidates, Workload
from train.preflight.plan.cluster import parse_cluster
from train.preflight.plan.description import describe_plan
from train.preflight.plan.memory import STRATEGIES
from train.preflight.plan.plan import RunPlan, plan_run
from train.preflight.plan.settings import written_settings
from train.preflight.plan.speed import HARDWARE
from train.recipe import Recipe, load_recipe
from train.sft import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "model_configs"
JANUS = ROOT / "recipes/janus-7b/sft/full.yaml"
RECIPES = sorted(
    path
    for kind in ("sft", "preference")
    for path in ROOT.glob(f"recipes/*/{kind}/*.yaml")
    if "smollm2" not in str(path)
)
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


@cache
def published_model(name: str) -> str:
    """Return the published model that `name` is, or from which the recipes start that end with the folder `name`."""
    if not name.startswith("outputs/"):
        return name
    (origin,) = (recipe for recipe in map(load_recipe, RECIPES) if recipe.output_dir == name)
    return published_model(origin.model.name_or_path)


def config_for(recipe: Recipe, name: str | None = None) -> PreTrainedConfig:
    name = (name or published_model(recipe.model.name_or_path)).rpartition("/")[2].lower()
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    return as_classifier(config, name) if recipe.trains_reward_model else config


def shape_for(recipe: Recipe, name: str | None = None) -> Architecture:
    return inspect_architecture(recipe, config_for(recipe, name))


@cache
def candidates_for(path: Path, *overrides: str, model: str | None = None) -> Candidates:
    """Return the candidates of a recipe; those that differ in `training` alone share their traces."""
    recipe = load_recipe(path, overrides)
    shared = candidates_for(path, model=model).tracer if overrides else None
    return Candidates(recipe, config_for(recipe, model), recipe.sequence_length, shared)


def plan_of(candidates: Candidates, gpus: str, nodes: int = 1) -> RunPlan:
    cluster = parse_cluster(gpus, nodes)
    return plan_run(candidates, cluster, JANUS_ROWS, steps=3_004, epochs=4, sequences_per_step=32)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parts[-3] + "-" + path.stem)
def test_every_recipe_of_the_papers_has_its_model(path: Path) -> None:
    recipe, shape = candidates_for(path).recipe, candidates_for(path).shape
    published = PUBLISHED[published_model(recipe.model.name_or_path)] * 1e9
    if recipe.trains_reward_model:  # without an output layer
        published -= config_for(recipe).vocab_size * config_for(recipe).hidden_size
    assert shape.total == pytest.approx(published, rel=0.01)
    assert (shape.trained == shape.total) is (recipe.adapter is None)
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
    text = path.read_text(encoding="utf-8")
    config = re.search(r"--config_file (\S+)", text)
    assert config
    one_gpu = "single_gpu" in config[1]
    gpus, nodes = ("1xA100-80GB", 1) if one_gpu else ("4xA100-80GB", 1) if "janus" in text else ("8xH100", 4)
    names = {strategy.config_file: strategy.name for strategy in STRATEGIES}
    name = "DDP" if one_gpu else names[config[1]]
    strategy = next(strategy for strategy in STRATEGIES if strategy.name == name)
    candidates, cluster = candidates_for(path), parse_cluster(gpus, nodes)
    memory = candidates.memory(written_settings(candidates.recipe, strategy), cluster)
    assert memory.total <= cluster.usable_memory


def test_the_command_can_be_pasted_and_clusters_have_an_end() -> None:
    plan = plan_of(candidates_for(JANUS, "guards={non_finite_steps: 4}", "output_dir=a folder"), "8xH100")
    words = shlex.split(plan.launch or "")
    assert {"guards={non_finite_steps: 4}", "output_dir=a folder"} <= set(words)
    lines = describe_plan(plan)
    start = next(number for number, line in enumerate(lines) if line.startswith("  accelerate launch"))
    shown = "\n".join(line for line in lines[start:] if line.startswith("  "))
    read = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {shown.lstrip()}"], capture_output=True, text=True, check=True
    )
    assert read.stdout.splitlines() == words
    for gpus, nodes in (("99999999999999x80GB", 1), ("8xH100", 100_000), ("8xH100", 0)):
        with pytest.raises(UserError, match="Write 1 to 16,384 GPUs in all"):
            parse_cluster(gpus, nodes)


def test_a_70b_on_two_nodes() -> None:
    llama = "meta-llama/Llama-3.1-70B"
    path, fused = ROOT / "recipes/janus-llama-3-8b/sft/full.yaml", "training.optim=adamw_torch_fused"
    plan = plan_of(candidates_for(path, fused, model=llama), "8x80GB", 2)
    assert plan.parameters == 70_553_706_496  # the hub's count
    # by hand: 2 + 4 + 12 bytes a parameter, over 16 GPUs: 79.4 GB, and little that is kept whole
    zero3 = next(candidate for candidate in plan.candidates if candidate.memory.strategy == "ZeRO-3").memory
    states = zero3.parameters + zero3.gradients + zero3.optimizer
    assert states == pytest.approx(70_553_706_496 * 18 / 16, rel=0.001)
    assert plan.chosen == "ZeRO-3 offload"
    assert plan.config_file == "accelerate_configs/zero3_offload.yaml"
    # 8-bit Adam: 2 + 4 + 4 + 2 bytes fit without offload, and the page says how
    assert plan.eight_bit
    assert plan.eight_bit.settings.strategy.name == "ZeRO-3"
    text = " ".join(describe_plan(plan))
    assert " ".join(plan.eight_bit.overrides) in text
    assert "training.optim=adamw_bnb_8bit" in plan.eight_bit.overrides
    # 6 N D within the convention's rest: the table of embeddings out, attention in
    tokens = 4 * 196_998_000
    assert plan.parameter_flops == pytest.approx(6 * (70_553_706_496 - 128_256 * 8_192) * tokens)


def test_janus_trains_on_one_h200_without_offload_and_on_eight_h100_without_full_checkpointing() -> None:
    single, eight = plan_of(candidates_for(JANUS), "1xH200"), plan_of(candidates_for(JANUS), "8xH100")
    assert single.best
    assert not single.best.settings.strategy.offload
    assert single.best.settings.dtype == "float32"
    assert "model.dtype=float32" in (single.launch or "")
    assert eight.best
    assert eight.best.settings.checkpointing != "full"


JANUS_ON = {"1xH200": 32, "4xA100-80GB": 8, "8xH100": 4, "8xH200": 4}
"""Accumulation steps that keep the recipe's 32 sequences a step with its micro-batch of 1."""


@pytest.mark.parametrize("gpus", JANUS_ON)
def test_the_readme_s_settings_for_janus_are_those_of_the_plan(gpus: str) -> None:
    own = () if JANUS_ON[gpus] == 8 else (f"training.gradient_accumulation_steps={JANUS_ON[gpus]}",)
    plan = plan_of(candidates_for(JANUS, *own), gpus)
    assert plan.best
    settings = plan.best.settings
    assert settings.batch * settings.accumulation * plan.cluster.processes == 32
    words = [word for word in shlex.split(plan.launch or "") if re.match(r"(model|training)\.", word)]
    cells = [
        gpus.replace("x", " x ", 1),
        f"[{Path(plan.config_file or '').name}]({Path(plan.config_file or '').name})",
        ", ".join(f"`{word}`" for word in words) or "none",
        f"{plan.best.memory.total / 2**30:.0f}",
    ]
    readme = (ROOT / "accelerate_configs" / "README.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(cells)} |" in readme


def test_the_hours_of_dpo_include_the_reference_s_forward_pass() -> None:
    path = ROOT / "recipes/janus-7b/preference/dpo.yaml"
    plan = plan_of(candidates_for(path), "8xH100")
    assert plan.best
    # four epochs train at 6 FLOPs a token and weight; the reference takes 2, once
    seconds = plan.flops / 3 / 4 / (8 * 989e12 * 0.4)
    assert plan.reference_hours == pytest.approx(seconds / 3_600)
    assert plan.hours == pytest.approx(plan.reference_hours + plan.steps * plan.best.seconds.total / 3_600)
    assert "for the reference before step 1" in " ".join(describe_plan(plan))
    assert plan_of(candidates_for(path, "preference.loss=orpo"), "8xH100").reference_hours == 0


def test_a_run_that_fits_nowhere_says_why() -> None:
    plan = plan_of(candidates_for(JANUS), "1x4GB")
    assert plan.chosen is plan.launch is plan.overrides is None
    text = " ".join(describe_plan(plan))
    nearest = min(candidate.memory.total for candidate in plan.candidates)
    assert f"{nearest / 2**30:,.1f} of 3.7 GiB" in text
    assert "an adapter, or a smaller data.max_length" in text


def test_a_plan_refuses_16_bit_weights_without_master_weights() -> None:
    plan = plan_of(candidates_for(JANUS), "8xH200")
    assert plan.written[0].refusal
    assert all(candidate.refusal is None for candidate in [*plan.candidates, *plan.written[1:]])
    lora = candidates_for(ROOT / "recipes/janus-7b/sft/lora.yaml")
    written = written_settings(lora.recipe, STRATEGIES[0])
    assert lora.evaluate(written, parse_cluster("8xH200"), Workload(1, Flops(1e15, 0.0))).refusal is None


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
    ("written", "gpus", "mebibytes", "gpu"),  # of named GPUs those that nvidia-smi shows
    [
        ("4x80GB", 4, 81_920, "H100"),
        ("8xH100-80GB", 8, 81_559, "H100"),
        ("2xH200", 2, 143_771, "H200"),
        ("1xa100-40GB", 1, 40_960, "A100"),
        ("8Xh100-80gb", 8, 81_559, "H100"),
        ("4xL4", 4, 23_034, "L4"),
        ("1xH100-94GB", 1, 94 * 1_024, "H100"),
    ],
)
def test_gpus_are_parsed(written: str, gpus: int, mebibytes: int, gpu: str) -> None:
    plan = parse_cluster(written, 2)
    assert (plan.gpus, plan.processes, plan.memory, plan.gpu) == (gpus, 2 * gpus, mebibytes * 1024**2, gpu)
    assert plan.assumed is (written == "4x80GB")


@pytest.mark.parametrize("written", ["80GB", "4xA100", "4xH1000-80GB", "0x80GB", "x", "4x", "4x0GB"])
def test_invalid_gpus_are_user_errors(
    written: str, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    assert refused("--recipe", recipe_file(), "--check", "--gpus", written).startswith("--gpus: ")


def test_the_peaks_are_those_that_trl_has() -> None:
    assert {name: get_peak_flops(name, "bfloat16") for name in PEAK_FLOPS} == PEAK_FLOPS
    assert set(HARDWARE) == set(PEAK_FLOPS)


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
    assert plan["plan"]["config_file"] in plan["plan"]["launch"]
    assert plan["plan"]["launch"] in " ".join(shown.replace(" \\\n", " ").split())
    assert f"--num_processes 6 --num_machines 3 --machine_rank RANK" in plan["plan"]["launch"]  # noqa: F541
    assert len(plan["plan"]["candidates"]) == len(plan["plan"]["written"]) == 5
    for candidate in plan["plan"]["candidates"]:
        assert candidate["memory"]["strategy"] == candidate["settings"]["strategy"]["name"]
        assert candidate["memory"]["strategy"] in shown
    seconds = plan["plan"]["candidates"][0]["seconds"]
    assert seconds["total"] == pytest.approx(sum(value for name, value in seconds.items() if name != "total"))
    assert "the recipe as written" in " ".join(shown.split())


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


def test_a_plan_notes_what_it_cannot_count() -> None:
    def notes(path: Path, gpus: str, *overrides: str) -> str:
        return " ".join(describe_plan(plan_of(candidates_for(path, *overrides), gpus)))

    galore = ("training.optim=galore_adamw", "training.optim_target_modules=all-linear")
    assert "training.optim: galore_adamw is counted as AdamW" in notes(JANUS, "8xH200", *galore)
    split = plan_of(candidates_for(JANUS, "training.deepspeed=ds_configs/zero2.json"), "8xH200")
    assert "training.deepspeed in the recipe would decide how the run is split" in " ".join(split.notes)
    words = shlex.split(split.launch or "")
    assert "training.deepspeed=null" in words
    assert "training.deepspeed=ds_configs/zero2.json" not in words
    assert load_recipe(JANUS, words[words.index("--recipe") + 2 :]).training["deepspeed"] is None
    offloading = plan_of(candidates_for(JANUS, "training.activation_offloading=true"), "8xH200")
    assert "training.activation_offloading=false" in (offloading.overrides or [])
    assert {each.settings.offloaded for each in offloading.candidates} == {False}
    assert {each.settings.offloaded for each in offloading.written} == {True}
    assert "their transfers take no time" in " ".join(describe_plan(offloading))
    long = plan_of(candidates_for(JANUS, "training.per_device_eval_batch_size=512"), "8xH200")
    size = int(re.search(r"training\.per_device_eval_batch_size=(\d+)$", (long.overrides or [])[-1])[1])  # type: ignore[index]
    assert (
        f"an evaluation of 512 sequences at once (training.per_device_eval_batch_size) does not fit: the command has {size}"
        in long.notes[-1]
    )
    for written, changed in (
        (f"per_device_eval_batch_size={size}", False),
        (f"per_device_eval_batch_size={2 * size}", True),
    ):
        again = plan_of(candidates_for(JANUS, f"training.{written}"), "8xH200")
        assert any("eval" in override for override in again.overrides or []) is changed
    unseen = candidates_for(JANUS, "training.per_device_eval_batch_size=512", "training.eval_strategy=no")
    assert plan_of(unseen, "8xH200").notes == []
    assert "paged_adamw_8bit may move" in notes(JANUS, "8xH200", "training.optim=paged_adamw_8bit")


def test_a_plan_initializes_no_gpu() -> None:
    before = torch.cuda.is_initialized()
    plan_of(candidates_for(JANUS), "1xH200")
    assert torch.cuda.is_initialized() is before
    assert torch.get_default_device().type == "cpu"


def test_load_config_needs_no_weights(tiny_model: Path, recipe_file: Callable[..., Path]) -> None:
    assert load_config(load_recipe(recipe_file()).model).hidden_size == 64


def test_short_runs_and_gpus_that_cannot_share_a_sequence() -> None:
    candidates = candidates_for(JANUS)

    def plan(own: Candidates, gpus: str) -> RunPlan:
        return plan_run(own, parse_cluster(gpus), JANUS_ROWS[:32], steps=1, epochs=1, sequences_per_step=32)

    lines = describe_plan(plan(candidates, "64x80GB"))
    hours = [line for line in lines if line.startswith("hours ")]
    assert [len(line.split()) for line in hours] == [6, 6]  # a label and five columns
    assert any("as of H100: --gpus names none" in line for line in lines)
    assert any(re.match(r"0\.\d+ seconds \(0\.00\d+ GPU-hours\)", line) for line in lines)
    shared = candidates_for(JANUS, "model.sequence_parallel=3")
    uneven = plan(shared, "8xH100")
    assert uneven.launch is None
    assert uneven.best
    assert "model.sequence_parallel: 3 does not divide the 8 processes" in " ".join(describe_plan(uneven))
    assert not any("accelerate launch" in line for line in describe_plan(uneven))
    assert plan(shared, "3xH100").launch
