"""Layers of the hub (`model.use_kernels`), and Liger's: conflicts, missing packages, and training with them."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cached_kernels import put_in_cache, with_package, without_package
from test_trainer import make_trainer

from train.errors import UserError
from train.loop.layer_kernels import replaced_layers
from train.model.hub_kernels import HubKernel, is_cached
from train.model.load import check_model
from train.recipe import load_recipe

RecipeFile = Callable[..., Path]
ONE_STEP = {"num_train_epochs": ..., "max_steps": 1}


@pytest.mark.parametrize(
    ("training", "reason"),
    [({"use_liger_kernel": True}, "replaces the same layers"), ({"torch_compile": True}, "can't trace these kernels")],
)
def test_conflicts(training: dict, reason: str, recipe_file: RecipeFile) -> None:
    with pytest.raises(UserError, match=rf"model\.use_kernels: .*{reason}.* Keep one of them\."):
        load_recipe(recipe_file(model={"use_kernels": True}, training=training))


def test_ligers_settings_need_liger(recipe_file: RecipeFile) -> None:
    layers = {"liger_kernel_config": {"rms_norm": True}}
    with pytest.raises(
        UserError, match=r"training\.liger_kernel_config: has no effect without `training\.use_liger_ke"
    ):
        load_recipe(recipe_file(training=layers))
    assert load_recipe(recipe_file(training={**layers, "use_liger_kernel": True}))


@without_package
def test_the_package_is_missing(recipe_file: RecipeFile) -> None:
    recipe = load_recipe(recipe_file(model={"use_kernels": True}))
    with pytest.raises(UserError, match=r"^model\.use_kernels: it needs the package kernels>=0\.\d+.*pip install 'ker"):
        check_model(recipe)
    with pytest.raises(UserError, match=r"^model\.use_kernels: Kernels are not available.* Write false\.$"):
        make_trainer(load_recipe(recipe_file(model={"use_kernels": True}, training=ONE_STEP))).train()


LIGER = HubKernel("kernels-community/liger-kernels", None, 3)
NORM = """
import torch

class TwiceTheNorm(torch.nn.Module):
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states):
        return 2 * torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

class layers:
    TwiceTheNorm = TwiceTheNorm
"""


@with_package
def test_layers_are_replaced_when_training_begins(tmp_path: Path, recipe_file: RecipeFile, monkeypatch) -> None:
    """transformers has no kernels for a CPU, so that the run ends; with one of ours the loss is that of its layers."""
    from kernels import LayerRepository, register_kernel_mapping

    recipe = load_recipe(recipe_file(model={"use_kernels": True}, training={**ONE_STEP, "bf16": False}))
    with pytest.raises(
        UserError, match=r"no kernel that trains a layer of LlamaForCausalLM on this device. Write false"
    ):
        make_trainer(recipe).train()
    repository = LayerRepository(LIGER.repo_id, layer_name="TwiceTheNorm", version=LIGER.version)
    put_in_cache(tmp_path, monkeypatch, LIGER, NORM)
    register_kernel_mapping({"RMSNorm": {"cpu": repository}})
    trainer = make_trainer(recipe)
    own = trainer.model.model.norm(torch.ones(1, 1, trainer.model.config.hidden_size))
    trainer.train()
    norms = 2 * trainer.model.config.num_hidden_layers + 1
    assert replaced_layers(trainer.model) == {"TwiceTheNorm": norms}
    ours = trainer.model.model.norm(torch.ones(1, 1, trainer.model.config.hidden_size))
    torch.testing.assert_close(ours, 2 * own, rtol=0.01, atol=0.01)  # after a step of training


def test_ligers_loss_is_refused_and_left_out(recipe_file: RecipeFile) -> None:
    """It would replace the model's forward, and with it TRL's fused head, whose losses this trainer reads."""
    fused = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}, **ONE_STEP}
    with pytest.raises(UserError, match="fused_linear_cross_entropy"):
        make_trainer(load_recipe(recipe_file(training=fused)))
    layers = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}, **ONE_STEP}
    trainer = make_trainer(load_recipe(recipe_file(training=layers)))
    assert trainer.args.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}


GPU = torch.cuda.is_available()
COMPILED = [
    pytest.param({}, id="own layers"),  # so that the test itself runs on any machine
    pytest.param(
        {"training": {"use_liger_kernel": True}},
        id="liger",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not GPU or find_spec("liger_kernel") is None, reason="needs a GPU and liger-kernel"),
        ],
    ),
    pytest.param(
        {"model": {"use_kernels": True}},
        id="hub",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not GPU or not is_cached(LIGER), reason="needs a GPU and liger-kernels in the hub's cache"
            ),
        ],
    ),
]


@pytest.mark.parametrize("settings", COMPILED)
def test_losses_and_gradients_are_those_of_the_models_own_layers(settings: dict, recipe_file: RecipeFile) -> None:
    """Three steps in bfloat16, with the learning rate that makes the last two depend on the gradients."""
    steps = {"num_train_epochs": ..., "max_steps": 3, "bf16": True, "logging_steps": 1, "learning_rate": 1e-3}
    curves = []
    for changes in {}, settings:
        training = {**steps, **changes.get("training", {})}
        trainer = make_trainer(load_recipe(recipe_file(training=training, model=changes.get("model", {}))))
        trainer.train()
        curves.append([(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line])
    assert len(curves[0]) == 3
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=0.02, atol=0)


def test_evaluation_with_ligers_setting_is_unchanged(recipe_file: RecipeFile) -> None:
    """transformers tells the model to skip its logits then, an argument of Liger's loss, which TRL's head replaces."""
    metrics = []
    for liger in False, True:
        training = {**ONE_STEP, "use_liger_kernel": liger, "eval_strategy": "epoch"}
        metrics.append(make_trainer(load_recipe(recipe_file(data={"validation": 0.25}, training=training))).evaluate())
    assert metrics[0]["eval_loss"] == metrics[1]["eval_loss"] > 0
