"""Combinations of a recipe and a distribution that a run refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from train.loop.master_weights import Launch, read_launch_configuration
from train.loop.sharding import sharding_error
from train.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SELECTIVE = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
LORA = {"adapter": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}


def stage_3(**changes: Any) -> Launch:
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True} | changes.pop("zero", {})
    return Launch({"zero_optimization": zero, **changes})


@pytest.mark.parametrize(
    ("launch", "sections", "message"),
    [
        (Launch({"sequence_parallel_size": 2}), {}, "`sequence_parallel_size: 2`"),
        (Launch({"tensor_parallel": {"autotp_size": 4}}), {}, "`tensor_parallel.autotp_size: 4`"),
        (Launch({"zero_optimization": {"stage": 3}}), {}, "lacks `zero_optimization.stage3_gather_16bit"),
        (stage_3(optimizer={"type": "Adam"}), {"training": {"optim": "lion_32bit"}}, "lion_32bit would not be used"),
        (
            stage_3(),
            {"model": {"float8": "rowwise"}, "training": {"bf16": True, "gradient_checkpointing": False}},
            "Write `training.gradient_checkpointing: true`",
        ),
        (
            stage_3(),
            {"training": SELECTIVE, **LORA},
            "`selective: true` needs non-reentrant checkpointing",
        ),
        (
            stage_3(),
            {"model": {"dtype": "bfloat16"}, "quantization": {"bnb_4bit_quant_storage": "uint8"}, **LORA},
            "uint8 differs from model.dtype: bfloat16",
        ),
        (Launch(fsdp=True, state_dict="SHARDED_STATE_DICT"), {}, "fsdp_state_dict_type: SHARDED_STATE_DICT"),
        (stage_3(), {"training": SELECTIVE}, None),
        (
            Launch({"zero_optimization": {"stage": 2}}),
            {"quantization": {"bnb_4bit_quant_storage": "uint8"}, **LORA},
            None,
        ),
        (Launch(), {"training": SELECTIVE, **LORA}, None),
    ],
)
def test_refused_combinations(
    launch: Launch, sections: dict[str, Any], message: str | None, recipe_file: Callable[..., Path]
) -> None:
    error = sharding_error(load_recipe(recipe_file(**sections)), launch)
    assert (error is None) is (message is None)
    assert (message or "") in (error or "")


def test_every_launch_configuration_trains_a_plain_recipe(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(recipe_file())
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        launch = read_launch_configuration({}, yaml.safe_load(path.read_text(encoding="utf-8")))
        assert sharding_error(recipe, launch) is None, path
