"""Names in `adapter` against the modules of the model."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from test_text_part import GEMMA3

from train.errors import UserError
from train.model.adapters import check_adapter, lora_config
from train.model.load import load_config
from train.model.text_part import build_meta_model, find_idle_parameters
from train.recipe import AdapterSection, ModelSection

WRONG = {
    "a typing error beside a right name": ({"target_modules": ("q_prj", "v_proj")}, ["'q_prj'", "Did you mean `q_proj`?"]),
    "a name of another architecture": ({"target_modules": ("q_proj", "c_attn")}, ["'c_attn'", "q_proj", "up_proj"]),
    "the end of a name": ({"target_modules": ("proj",)}, ["'proj'"]),
    "a regular expression": ({"target_modules": (".*q_proj",)}, [".*q_proj", "Did you mean `q_proj`?"]),
    "all-linear in a list": ({"target_modules": ("all-linear",)}, ["is a value by itself, not an item of a list"]),
    "a block": ({"target_modules": ("self_attn", "up_proj")}, ["LlamaAttention", "k_proj, o_proj, q_proj, v_proj"]),
    "a norm": ({"target_modules": ("q_proj", "norm")}, ["model.norm is a LlamaRMSNorm", "linear"]),
    "a layer that is not there": ({"target_modules": ("layers.7.self_attn.q_proj",)}, ["layers.7", "`q_proj`"]),
    "saved in full as well": ({"modules_to_save": ("mlp",), "target_modules": ("up_proj", "q_proj")}, ["'up_proj' lies in"]),
    "a module to save": ({"modules_to_save": ("lm_haed",)}, ["modules_to_save", "Did you mean `lm_head`?"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> object:
    section = ModelSection(name_or_path=str(tiny_model))
    return build_meta_model(load_config(section), section)


@pytest.mark.parametrize("kind", WRONG)
def test_a_name_without_a_module(kind: str, model: object) -> None:
    settings, words = WRONG[kind]
    with pytest.raises(UserError, match=r"^adapter\.(target_modules|modules_to_save): ") as refused:
        check_adapter(AdapterSection(**settings), model)
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)


def test_the_check_reports_a_name_without_a_module(
    recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    recipe = recipe_file(adapter={"r": 4, "target_modules": ["q_prj", "v_proj"]})
    assert "Did you mean `q_proj`?" in refused("--recipe", recipe, "--check")


@pytest.mark.parametrize(
    "pattern", ["q_proj", "self_attn.q_proj", "model.layers.0.mlp.up_proj", "0.mlp.up_proj", "embed_tokens", "_proj", "layers.0"]
)  # fmt: skip
def test_a_name_matches_as_in_peft(pattern: str, model: object) -> None:
    config = lora_config(AdapterSection(target_modules=(pattern,)))
    matched = [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
    try:
        check_adapter(AdapterSection(target_modules=(pattern,)), model)
    except UserError as error:
        assert ("has no module" in str(error)) == (not matched)  # noqa: PT017
    else:
        assert matched


def test_a_name_in_the_tower_alone_and_one_in_both_parts() -> None:
    bare = build_meta_model(GEMMA3, ModelSection(name_or_path="x"))
    idle = find_idle_parameters(bare)
    for key in ("target_modules", "modules_to_save"):
        with pytest.raises(UserError, match=rf"adapter\.{key}: 'fc1' is only in .*vision_tower"):
            check_adapter(AdapterSection(**{key: ("fc1",)}), bare, idle)
    check_adapter(AdapterSection(target_modules=("q_proj",)), bare, idle)


@pytest.mark.parametrize("names_to_save", [("norm",), ("lm_head",), ("layers.1.mlp", "norm")])
def test_modules_are_saved_by_their_names_and_not_by_ends_of_names(
    names_to_save: tuple[str, ...], model: object
) -> None:
    section = ModelSection(name_or_path="x")
    bare = build_meta_model(model.config, section)
    names = [name for name, _ in bare.named_modules(remove_duplicate=False)]
    adapted = get_peft_model(bare, lora_config(AdapterSection(modules_to_save=names_to_save), bare))
    saved = {
        name.removeprefix("base_model.model.").partition(".modules_to_save")[0]
        for name, weight in adapted.named_parameters()
        if weight.requires_grad and ".modules_to_save." in name
    }
    pattern = re.compile(rf"(.*\.)?({'|'.join(map(re.escape, names_to_save))})")
    assert saved == {name for name in names if pattern.fullmatch(name)}
