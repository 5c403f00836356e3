"""Configurations in recipes/sysgen, and the errors of invalid ones."""

from pathlib import Path

import pytest

from train.errors import UserError
from train.sysgen.config import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "sysgen").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_configuration_loads_and_its_command_names_it(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == f"outputs/sysgen/{path.stem}"
    assert f"scripts/sysgen.py --config recipes/sysgen/{path.name}" in path.read_text("utf-8")


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "smollm2-135m"], ids=lambda path: path.stem)
def test_the_papers_generators_have_the_papers_settings(path: Path) -> None:
    config = load_config(path)
    limits = [(stage.max_tokens, stage.temperature) for stage in (config.generate, config.verify, config.answer)]
    assert limits == [(512, 0.7), (256, 0.7), (1024, 0.7)]
    assert config.constraints.share == 0
    recipe = path.parents[1] / path.stem / "sft" / "sysgen.yaml"
    assert f"path: {config.output_dir}/data " in recipe.read_text("utf-8")


def test_a_training_recipe_is_an_error_that_says_so() -> None:
    with pytest.raises(UserError) as failure:
        load_config(ROOT / "recipes" / "phi-4" / "sft" / "sysgen.yaml")
    assert "model: found a section. Allowed: text." in str(failure.value)
    assert "servers: missing. Servers of the model" in str(failure.value)
    assert "training: unknown key." in str(failure.value)


@pytest.mark.parametrize("override", ["answer.extra={api_key: sk-1}", "answer.extra={a: {Authorization: sk-1}}"])
def test_a_secret_in_a_stage_names_the_setting_of_a_servers_key(override: str) -> None:
    with pytest.raises(UserError, match=r"secrets.*the variable that its `servers\.N\.key_variable` names") as failure:
        load_config(CONFIGS[0], [override])
    assert "sk-1" not in str(failure.value)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(UserError, match=r"empty. Required keys: model, servers, data, output_dir\."):
        load_config(path)
