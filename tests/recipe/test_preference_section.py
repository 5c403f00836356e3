"""Section `preference`: TRL's names and defaults, conflicts with other keys, and records of runs without it."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from train.errors import UserError
from train.loop.checkpoint.fingerprint import run_fingerprint
from train.recipe import load_recipe
from train.recipe.preference import PREFERENCE_METRICS, REWARD_METRICS, LossType, PreferenceSection

RECIPE = """\
model: {name_or_path: some/model}
data: {sources: [{path: rows.jsonl}], validation: 0.1, max_length: 512}
training: {eval_strategy: epoch}
output_dir: out
"""
PAIRS, REWARD = "preference={loss: dpo}", "preference={loss: reward}"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_names_defaults_and_loss_types_are_those_of_trl() -> None:
    from trl import DPOConfig, DPOTrainer, RewardConfig

    fields = {field.name: field for field in dataclasses.fields(DPOConfig)}
    section = PreferenceSection(loss="dpo")
    for name in ("beta", "loss_weights", "label_smoothing"):
        assert getattr(section, name) == fields[name].default, name
    assert [*section.loss_type] == fields["loss_type"].default_factory()
    centered = {field.name: field.default for field in dataclasses.fields(RewardConfig)}["center_rewards_coefficient"]
    assert section.center_rewards_coefficient == centered
    source = Path(__import__("inspect").getsourcefile(DPOTrainer)).read_text(encoding="utf-8")
    assert set(get_args(LossType)) <= set(re.findall(r'loss_type == "(\w+)"', source))


def test_a_recipe_without_the_section_has_the_records_that_it_had(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.preference is None
    assert "preference" not in recipe.to_yaml()
    assert "siblings" not in recipe.to_yaml()
    assert not [key for key in run_fingerprint(recipe) if key.startswith("preference")]


def test_a_recipe_with_the_section_round_trips_and_is_recorded(recipe_file: Path) -> None:
    overrides = ["preference={loss: dpo, loss_type: [sigmoid, sft], loss_weights: [1, 0.2], pairs: all}"]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.preference is not None
    assert (recipe.preference.loss_type, recipe.preference.loss_weights) == (("sigmoid", "sft"), (1, 0.2))
    resolved = recipe_file.with_name("resolved.yaml")
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(resolved) == recipe
    assert run_fingerprint(recipe)["preference.loss_type"] == yaml.safe_load("[sigmoid, sft]")
    assert {"output_dir", "tracking"}.isdisjoint(key.split(".")[0] for key in run_fingerprint(recipe))


@pytest.mark.parametrize(
    "override",
    ["preference={loss: orpo, beta: 0.3}", "preference={loss: reward, center_rewards_coefficient: 0.01}", REWARD],
)
def test_a_section_without_the_keys_of_other_losses_round_trips(recipe_file: Path, override: str) -> None:
    recipe = load_recipe(recipe_file, [override])
    resolved = recipe_file.with_name("resolved.yaml")
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(resolved) == recipe
    assert "loss_type" not in yaml.safe_load(recipe.to_yaml())["preference"]
    assert (recipe.system_gain.rows == 0) == ("reward" in override)


@pytest.mark.parametrize(
    ("loss", "metric"), [*(("dpo", metric) for metric in PREFERENCE_METRICS), *(("reward", m) for m in REWARD_METRICS)]
)
def test_more_is_better_for_the_metrics_that_select_a_model(recipe_file: Path, loss: str, metric: str) -> None:
    overrides = [f"training.metric_for_best_model=eval_{metric}", "training.load_best_model_at_end=true"]
    overrides.append("training.save_strategy=epoch")
    section = f"preference={{loss: {loss}}}"
    load_recipe(recipe_file, [section, *overrides])
    for others in [], [REWARD if loss == "dpo" else PAIRS]:
        with pytest.raises(UserError, match="metric_for_best_model: found"):
            load_recipe(recipe_file, [*others, *overrides])
    with pytest.raises(UserError, match=f"a greater eval_{metric} is better"):
        load_recipe(recipe_file, [section, *overrides, "training.greater_is_better=false"])


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["preference={loss: kto}"], "preference.loss", "Allowed: dpo, orpo, reward."),
        (["preference={}"], "preference.loss", "missing."),
        (["preference={loss: dpo, loss_type: ipo}"], "preference.loss_type", "Did you mean `[ipo]`?"),
        (["preference={loss: dpo, beta: 0}"], "preference.beta", "Allowed: a number > 0."),
        (["preference={loss: dpo, label_smoothing: 0.5}"], "preference.label_smoothing", "< 0.5"),
        (["preference={loss: dpo, label_smoothing: 0.1}"], "preference.label_smoothing", "loss_type: [robust]"),
        (["preference={loss: dpo, loss_weights: [1, 2]}"], "preference.loss_weights", "2 for 1"),
        (["preference={loss: dpo, loss_weights: [0]}"], "preference.loss_weights", "nothing would be trained"),
        (["preference={loss: orpo, loss_type: [ipo]}"], "preference.loss_type", "belongs to `loss: dpo`"),
        (["preference={loss: reward, beta: 0.1}"], "preference.beta", "belongs to `loss: dpo` and `loss: orpo`"),
        (["preference={loss: dpo, center_rewards_coefficient: 1}"], "center_rewards_coefficient", "`loss: reward`"),
        (["preference={loss: [reward]}"], "preference.loss", "Allowed: dpo, orpo, reward."),
        ([REWARD, "evaluation={hierarchy: {}}"], "evaluation", "Remove this section"),
        ([REWARD, "system_gain.rows=8"], "system_gain", "Remove this section"),
        ([PAIRS, "data.sources.0.loss_weight=2"], "data.sources.0.loss_weight", "losses of pairs have no weights"),
        ([PAIRS, "training.loss_type=dft"], "training.loss_type", "the loss is set by `preference`"),
        ([PAIRS, "training.label_smoothing_factor=0.1"], "training.label_smoothing_factor", "Remove this key"),
        ([PAIRS, "adapter={lora_dropout: 0.1}"], "adapter.lora_dropout", "without dropout"),
        ([PAIRS, "model.sequence_parallel=2"], "model.sequence_parallel", "Write 1 here"),
        (["data.sources.0.format=preference"], "data.sources.0.format", "section `preference`"),
        (
            ["data.validation=[{path: v.jsonl, format: preference}]"],
            "data.validation.0.format",
            "section `preference`",
        ),
    ],
)
def test_conflicts_name_the_key_and_what_to_write(
    recipe_file: Path, overrides: list[str], key: str, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, overrides)
    assert f"{key}: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "preference={loss: dpo, loss_type: [robust], label_smoothing: 0.1}",
        "preference={loss: orpo, beta: 0.25}",
        "data.sources.0.format=preference",
    ],
)
def test_values_that_go_together_are_valid(recipe_file: Path, override: str) -> None:
    load_recipe(recipe_file, [PAIRS, override] if override.startswith("data") else [override])
