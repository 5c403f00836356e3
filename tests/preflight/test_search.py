"""The plan's search: against a plain loop over all settings, its overrides, and facts that hold for any run."""

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import Gemma2Config, LlamaConfig

from train.loop.master_weights import read_launch_configuration
from train.loop.sharding import sharding_error
from train.model.architecture import inspect_architecture
from train.model.flops import FLOAT32_FLOPS, PEAK_FLOPS, Flops, count_training_flops
from train.preflight.plan.candidates import (
    EQUALLY_FAST,
    ROOMY,
    Candidate,
    Candidates,
    Workload,
    choose,
    evaluate_written,
    find_best,
    find_fewest,
    list_strategies,
)
from train.preflight.plan.cluster import RESERVE, Cluster, parse_cluster
from train.preflight.plan.memory import DDP, STRATEGIES
from train.preflight.plan.settings import Settings, list_overrides, optimizer_name, written_settings
from train.preflight.plan.speed import NOT_HIDDEN, REACHED, bus_bandwidth, recomputed_flops
from train.recipe import load_recipe

ROOT = Path(__file__).parents[2]
MIB = 2**20
FULL, LORA, QLORA = (ROOT / f"recipes/janus-7b/sft/{name}.yaml" for name in ("full", "lora", "qlora"))
CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, head_dim=16
)
NAMES = [strategy.name for strategy in STRATEGIES]
RUNS = [
    (FULL, ()),
    (FULL, ("training.optim=adamw_torch_fused", "model.dtype=float32")),
    (FULL, ("training.gradient_checkpointing=true", "training.per_device_train_batch_size=2")),
    (
        FULL,
        (
            "training.gradient_checkpointing=true",
            "training.gradient_checkpointing_kwargs={selective: true}",
            "training.bf16=false",
        ),
    ),
    (FULL, ("model.attention=eager", "training.gradient_accumulation_steps=6")),
    (LORA, ()),
    (LORA, ("training.activation_checkpointing=true", "training.gradient_checkpointing_kwargs={use_reentrant: true}")),
]

SELECTIVE = "training.gradient_checkpointing_kwargs={selective: true}"
TRACED = [*RUNS[:1], (FULL, ("training.gradient_accumulation_steps=6", "training.optim=adamw_torch_fused")), (LORA, ())]
"""Few, as each dtype and checkpointing takes a trace."""


def cluster_of(mebibytes: float, gpus: int = 4, nodes: int = 1) -> Cluster:
    """Return GPUs of as little memory as tiny models need."""
    return Cluster(gpus, nodes, "H100", round(mebibytes * MIB), 989e12, assumed=False, mfu=0.4)


@cache
def candidates_of(path: Path, *overrides: str) -> Candidates:
    recipe = load_recipe(path, overrides)
    shared = candidates_of(path).tracer if overrides else None  # for what differs in `training` alone
    return Candidates(recipe, CONFIG, recipe.data.max_length, shared)


def workload_of(candidates: Candidates) -> Workload:
    return Workload(10, count_training_flops(candidates.shape, np.full(32, 8_192)))


@pytest.mark.parametrize(("path", "overrides"), TRACED)
@pytest.mark.parametrize("mebibytes", [295, 310, 450, 1_700])
def test_the_search_is_a_plain_loop_over_all_settings(path: Path, overrides: tuple[str, ...], mebibytes: float) -> None:
    candidates, cluster = candidates_of(path, *overrides), cluster_of(mebibytes)
    recipe, workload = candidates.recipe, workload_of(candidates)
    training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1} | recipe.training
    sequences = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    fitting: list[Candidate] = []
    for strategy, checkpointing, batch, accumulation in product(
        STRATEGIES, ("none", "selective", "full"), range(1, sequences + 1), range(1, sequences + 1)
    ):
        if batch * accumulation != sequences:
            continue
        if checkpointing == "selective" and (
            recipe.model.attention == "eager" or (recipe.adapter is not None and strategy.stage == 3)
        ):
            continue
        optimizer = optimizer_name(recipe)
        if strategy.offload and not optimizer.startswith("adamw_torch"):
            optimizer = "adamw_torch"
        dtype = "float32" if strategy is DDP and recipe.adapter is None else recipe.model.dtype
        settings = Settings(strategy, dtype, checkpointing, batch, accumulation, optimizer)
        candidate = candidates.evaluate(settings, cluster, workload)
        if candidate.memory.total <= mebibytes * MIB * (1 - RESERVE):
            fitting.append(candidate)
    fitting = [candidate for candidate in fitting if candidate.memory.strategy != "ZeRO-3 offload"] or fitting
    fastest = min((candidate.seconds.total for candidate in fitting), default=0)
    expected: Candidate | None = None
    for candidate in fitting:
        if candidate.seconds.total > EQUALLY_FAST * fastest:
            continue
        room = mebibytes * MIB * (1 - RESERVE) * ROOMY
        if expected is None or (
            (
                len(candidate.overrides),
                candidate.memory.total > room,
                NAMES.index(candidate.memory.strategy),
                candidate.memory.total,
            )
            < (
                len(expected.overrides),
                expected.memory.total > room,
                NAMES.index(expected.memory.strategy),
                expected.memory.total,
            )
        ):
            expected = candidate
    assert choose(find_best(candidates, cluster, workload)) == expected


@pytest.mark.parametrize(("path", "overrides"), [*RUNS, (QLORA, ())])
def test_overrides_load_as_the_planned_settings(path: Path, overrides: tuple[str, ...]) -> None:
    """Every setting of the search, as overrides through load_recipe, is the recipe as written."""
    candidates = candidates_of(path, *overrides)
    recipe = candidates.recipe
    planned = [settings for strategy in STRATEGIES for settings in candidates.list(strategy)]
    planned += candidates.list(STRATEGIES[1], "adafactor")
    assert len(planned) == len(set(planned))
    written = written_settings(recipe, STRATEGIES[1])
    assert list_overrides(recipe, written) == []
    for settings in planned:
        loaded = load_recipe(path, [*overrides, *list_overrides(recipe, settings)])
        assert written_settings(loaded, settings.strategy) == settings
        assert settings.batch * settings.accumulation == written.batch * written.accumulation
        assert loaded.training.keys() - recipe.training.keys() <= {
            *("per_device_train_batch_size", "gradient_accumulation_steps", "optim"),
            *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        }
        if (loaded.training.get("gradient_checkpointing_kwargs") or {}).get("selective"):
            assert not loaded.training["gradient_checkpointing_kwargs"].get("use_reentrant")


@pytest.mark.parametrize(("path", "overrides"), TRACED)
def test_more_memory_never_makes_the_chosen_slower(path: Path, overrides: tuple[str, ...]) -> None:
    candidates = candidates_of(path, *overrides)
    workload, earlier = workload_of(candidates), float("inf")
    for mebibytes in (292, 295, 310, 450, 600, 1_700, 2_600):
        cluster = cluster_of(mebibytes)
        every = [
            candidates.evaluate(settings, cluster, workload)
            for strategy in STRATEGIES[:4]
            for settings in candidates.list(strategy)
        ]
        fastest = min((candidate.seconds.total for candidate in every if candidate.fits), default=float("inf"))
        chosen = choose(find_best(candidates, cluster, workload))
        if chosen and not chosen.settings.strategy.offload:
            assert chosen.seconds.total <= EQUALLY_FAST * fastest
            assert chosen.seconds.total <= EQUALLY_FAST * earlier
        assert fastest <= earlier
        earlier = fastest
    assert earlier < float("inf")


@pytest.mark.parametrize(
    ("path", "overrides", "refused"),
    [
        (QLORA, ("quantization.bnb_4bit_quant_storage=uint8",), "bnb_4bit_quant_storage: uint8 differs"),
        (LORA, ("training.gradient_checkpointing=true", SELECTIVE), "`selective: true` needs non-reentrant"),
        (FULL, ("model.float8=tensorwise",), "model.float8: under ZeRO-3"),
    ],
)
def test_what_a_run_refuses_is_neither_planned_nor_counted_as_fitting(
    path: Path, overrides: tuple[str, ...], refused: str
) -> None:
    """Expected from the rules of the trainer on the loaded overrides of each setting, with the file's DeepSpeed."""
    candidates = candidates_of(path, *overrides)
    for strategy in STRATEGIES[1:]:
        config = yaml.safe_load((ROOT / strategy.config_file).read_text(encoding="utf-8"))
        launch = read_launch_configuration({}, config)
        for settings in candidates.list(strategy):
            recipe = load_recipe(path, [*overrides, *list_overrides(candidates.recipe, settings)])
            error = sharding_error(recipe, launch)
            assert error == candidates.refusal(settings)
            assert error is None or path is QLORA
    written = evaluate_written(candidates, cluster_of(100_000), workload_of(candidates))
    assert [each.settings.strategy.stage for each in written if refused in (each.refusal or "")] == [3, 3]
    assert [each.fits for each in written[-2:]] == [False, False]
    chosen = choose(find_best(candidates, cluster_of(100_000), workload_of(candidates)))
    assert chosen
    assert chosen.refusal is None
    assert find_fewest(candidates, cluster_of(100_000)).strategy == "DDP"
    if path is QLORA:
        assert not candidates.fits(STRATEGIES[3], cluster_of(100_000), "adamw_torch")


def test_settings_in_a_string_are_not_overridden() -> None:
    """JSON in a string is one value for the overrides."""
    recipe = load_recipe(LORA, ["training.gradient_checkpointing_kwargs='{\"selective\": true}'"])
    candidates = Candidates(recipe, CONFIG, recipe.data.max_length, candidates_of(LORA).tracer)
    assert written_settings(recipe, DDP).checkpointing == "selective"
    planned = candidates.list(DDP)
    assert {settings.checkpointing for settings in planned} == {"none", "selective"}
    assert not any("kwargs" in override for settings in planned for override in list_overrides(recipe, settings))


@pytest.mark.parametrize("path", [FULL, LORA])
def test_more_gpus_never_raise_the_memory_of_zero_3(path: Path) -> None:
    candidates = candidates_of(path)
    settings = candidates.list(STRATEGIES[3])[0]
    totals = [candidates.memory(settings, cluster_of(2_000, gpus)).total for gpus in (2, 4, 8, 16, 32)]
    assert totals == sorted(totals, reverse=True)


def test_more_recomputation_takes_less_memory_and_more_seconds() -> None:
    candidates = candidates_of(FULL)
    for strategy in STRATEGIES:
        by_checkpointing = {
            settings.checkpointing: candidates.evaluate(settings, cluster_of(2_000), workload_of(candidates))
            for settings in candidates.list(strategy)
            if settings.batch == 2
        }
        none, selective, full = (by_checkpointing[name] for name in ("none", "selective", "full"))
        assert none.memory.total >= selective.memory.total >= full.memory.total
        assert none.memory.total > full.memory.total
        assert none.seconds.compute < selective.seconds.compute < full.seconds.compute


@pytest.mark.parametrize(("gpus", "mebibytes"), [(4, 293.2), (8, 292.3), (2, 900), (8, 200)])
@pytest.mark.parametrize("optimizer", [None, "adamw_bnb_8bit"])
def test_the_fewest_gpus_are_those_of_a_plain_loop(gpus: int, mebibytes: float, optimizer: str | None) -> None:
    candidates = candidates_of(FULL, "training.optim=adamw_torch_fused")
    cluster = cluster_of(mebibytes, gpus)
    expected: tuple[int | None, int | None, str | None] = (None, None, None)
    for number, nodes in [*((number, 1) for number in range(1, gpus + 1)), *((gpus, nodes) for nodes in range(2, 65))]:
        tried = replace(cluster, gpus=number, nodes=nodes)
        best = find_best(candidates, tried, workload_of(candidates), optimizer)
        names = [candidate.memory.strategy for candidate in best if candidate.fits]
        names = [name for name in names if "offload" not in name]
        if names:
            expected = (number if nodes == 1 else None, nodes, names[0])
            break
    fewest = find_fewest(candidates, cluster, optimizer)
    assert (fewest.gpus, fewest.nodes, fewest.strategy) == expected
    assert fewest.optimizer == (optimizer or "adamw_torch_fused")


def test_a_recipe_that_accepts_16_bit_weights_keeps_them() -> None:
    allowed = candidates_of(FULL, "model.allow_16bit_training=true")
    assert {settings.dtype for settings in allowed.list(DDP)} == {"bfloat16"}
    assert {settings.dtype for settings in candidates_of(FULL).list(DDP)} == {"float32"}


def test_gpus_that_share_sequences_are_counted_together() -> None:
    shared = candidates_of(FULL, "model.sequence_parallel=4")
    assert find_fewest(shared, cluster_of(2_000, gpus=8)).gpus == 4
    assert find_fewest(candidates_of(FULL), cluster_of(2_000, gpus=8)).gpus == 1


def test_the_recipe_as_written_is_evaluated_under_each_strategy() -> None:
    candidates = candidates_of(FULL)
    written = evaluate_written(candidates, cluster_of(2_000), workload_of(candidates))
    assert [candidate.memory.strategy for candidate in written] == NAMES
    assert [candidate.overrides for candidate in written[:-1]] == [[]] * 4
    assert written[-1].overrides == ["training.optim=adamw_torch"]  # DeepSpeed's own runs on the host
    assert [bool(candidate.refusal) for candidate in written] == [True, False, False, False, False]
    single = cluster_of(2_000, gpus=1)
    assert [strategy.name for strategy in list_strategies(single)] == ["DDP", "ZeRO-3 offload"]


def test_full_checkpointing_takes_eight_sixths_of_the_layers_flops() -> None:
    shape = inspect_architecture(load_recipe(FULL), CONFIG)
    flops = count_training_flops(shape, np.full(8, 256))
    tokens, layers = 8 * 256, shape.total - 2 * 512 * 64 - 64  # embedding, output layer, last norm
    full = recomputed_flops(shape, flops, "full") - flops.attention / 3
    assert full == pytest.approx(2 * layers * tokens, rel=0.001)
    assert recomputed_flops(shape, flops, "selective") == full
    assert recomputed_flops(shape, flops, "none") == 0
    lora = inspect_architecture(load_recipe(LORA), CONFIG)
    frozen = count_training_flops(lora, np.full(8, 256))
    adapters = lora.trained
    assert recomputed_flops(lora, frozen, "selective") == pytest.approx(2 * (layers + adapters) * tokens, rel=0.001)


def test_hours_with_full_checkpointing_are_those_of_the_mfu() -> None:
    """`--mfu` is the utilisation with full checkpointing, before communication."""
    candidates = candidates_of(FULL)
    flops = Flops(6e15, 1e14)
    cluster = cluster_of(2_000, gpus=1)
    settings = replace(written_settings(candidates.recipe, DDP), checkpointing="full")
    compute = candidates.evaluate(settings, cluster, Workload(1, flops)).seconds.compute
    assert compute == pytest.approx(6.1e15 / (989e12 * 0.4))


@pytest.mark.parametrize(
    ("overrides", "slower"),  # of the H100's data sheet: 989 TFLOP/s of bfloat16, 67 of float32, 494.5 of TF32
    [(("training.bf16=false",), 989 / 67), (("training.bf16=false", "training.tf32=true"), 2.0),
     (("training.bf16=false", "training.torch_compile=true"), 2.0), (("training.tf32=true",), 1.0),
     (("training.bf16=false", "training.fp16=true"), 1.0)],
)  # fmt: skip
def test_float32_is_computed_at_its_own_peak(overrides: tuple[str, ...], slower: float) -> None:
    cluster, workload = parse_cluster("8xH100"), Workload(1, Flops(6e15, 1e14))
    compute = [
        (own := candidates_of(FULL, *more)).seconds(written_settings(own.recipe, DDP), cluster, workload).compute
        for more in ((), overrides)
    ]
    assert compute[1] == pytest.approx(slower * compute[0])
    assert set(FLOAT32_FLOPS) == set(PEAK_FLOPS)


def test_the_planned_attention_is_that_of_the_run() -> None:
    """FlashAttention computes in 16 bits; soft-capping takes flex_attention, under which selective saves nothing."""
    half, single = candidates_of(FULL), candidates_of(FULL, "training.bf16=false", "model.dtype=float32")
    assert (half.attention, single.attention) == ("torch_varlen", "sdpa")
    for attention, selective in (("auto", False), ("flash_attention_2", True)):
        recipe = load_recipe(FULL, [f"model.attention={attention}"])
        softcapped = Candidates(recipe, Gemma2Config(num_hidden_layers=2), recipe.data.max_length)
        assert softcapped.attention == ("flash_attention_2" if selective else "flex_attention")
        assert ("selective" in {each.checkpointing for each in softcapped.list(STRATEGIES[2])}) is selective
    assert "selective" in {each.checkpointing for each in half.list(STRATEGIES[2])}


@pytest.mark.parametrize(
    ("strategy", "bytes_per_parameter"),  # in 16 bits, of a step of four micro-batches (ZeRO, section 7); ZeRO-1 in 32
    [("DDP", 2 * 4), ("ZeRO-1", 2 * 4 + 2), ("ZeRO-2", (4 + 1) * 2), ("ZeRO-3", 4 * 3 * 2)],
)
def test_communication_is_that_of_the_zero_paper(strategy: str, bytes_per_parameter: int) -> None:
    recipe = load_recipe(FULL, ["model.dtype=float32", "training.gradient_accumulation_steps=4"])
    candidates = Candidates(recipe, CONFIG, 8_192, candidates_of(FULL).tracer)
    cluster = parse_cluster("8xH100")
    settings = written_settings(recipe, next(each for each in STRATEGIES if each.name == strategy))
    assert settings.accumulation == 4
    step = candidates.evaluate(settings, cluster, Workload(1, Flops(1e18, 0.0)))  # long enough to hide all that can be
    one_parameter = 7 / 8 / (REACHED * 450e9)
    volume = bytes_per_parameter * candidates.shape.total * one_parameter
    after = {"DDP": 0.0, "ZeRO-1": 1.0, "ZeRO-2": 1 / 5, "ZeRO-3": 0.0}[strategy]
    assert step.seconds.communication == pytest.approx(volume * (after + (1 - after) * NOT_HIDDEN))
    assert bus_bandwidth(cluster) == REACHED * 450e9
    assert bus_bandwidth(parse_cluster("8xH100", 2)) == REACHED * 400e9  # eight cards of 400 Gbit/s a node
    assert bus_bandwidth(parse_cluster("4xA100-80GB", 2)) == REACHED * 100e9


def test_communication_that_computing_can_not_hide_is_waited_for() -> None:
    candidates = candidates_of(FULL)
    settings = written_settings(candidates.recipe, STRATEGIES[3])
    cluster, nothing = parse_cluster("8xH100"), Workload(1, Flops(1.0, 0.0))
    exposed = candidates.evaluate(settings, cluster, nothing).seconds.communication
    volume = settings.accumulation * 3 * 2 * candidates.shape.total * 7 / 8 / (REACHED * 450e9)
    assert exposed == pytest.approx(volume, rel=0.001)


def test_gpus_that_share_a_sequence_hold_the_activations_of_their_tokens() -> None:
    """32,768 tokens on four GPUs take the memory of 8,192 on each; states and steps stay as they are."""
    shared = load_recipe(FULL, ["model.sequence_parallel=4", "data.max_length=32768"])
    whole, tracer, cluster = load_recipe(FULL), candidates_of(FULL).tracer, parse_cluster("8xH100")
    settings = written_settings(whole, STRATEGIES[3])
    assert written_settings(shared, STRATEGIES[3]) == settings
    divided = Candidates(shared, CONFIG, 32_768, tracer).memory(settings, cluster)
    assert divided == Candidates(whole, CONFIG, 8_192, tracer).memory(settings, cluster)
    assert divided.total < Candidates(whole, CONFIG, 32_768, tracer).memory(settings, cluster).total
