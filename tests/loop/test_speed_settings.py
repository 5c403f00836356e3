"""Settings for speed and memory: TRL's fields in a recipe reach the trained model."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_trainer import make_trainer
from torch.utils.checkpoint import CheckpointPolicy

from train.loop.trainer import JanusTrainer
from train.recipe import load_recipe

Make = Callable[..., JanusTrainer]


@pytest.fixture
def make(recipe_file: Callable[..., Path]) -> Make:
    def trainer(**training: object) -> JanusTrainer:
        one_step = {"num_train_epochs": ..., "max_steps": 1}
        return make_trainer(load_recipe(recipe_file(training={**one_step, **training})))

    return trainer


def saved_for_backward(trainer: JanusTrainer) -> int:
    """Return the bytes that a forward pass of the first batch keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=100).backward()
    return sum(sizes.values())


def test_activation_checkpointing_is_none_full_or_selective(make: Make) -> None:
    none = make(gradient_checkpointing=False)
    full = make(gradient_checkpointing=True)
    selective = make(gradient_checkpointing=True, gradient_checkpointing_kwargs={"selective": True})
    assert not none.model.is_gradient_checkpointing
    for trainer in full, selective:
        trainer.train()
        assert trainer.model.is_gradient_checkpointing
    assert saved_for_backward(full) < saved_for_backward(none)
    contexts = {
        name: trainer.model.model.layers[0]._gradient_checkpointing_func.keywords
        for name, trainer in (("full", full), ("selective", selective))
    }
    assert "context_fn" not in contexts["full"]
    forward, _ = contexts["selective"]["context_fn"]()
    keeps = forward.policy_fn(None, torch.ops.aten._scaled_dot_product_flash_attention.default)
    assert keeps == CheckpointPolicy.MUST_SAVE


def test_the_launcher_compiles_the_complete_model(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --dynamo_backend eager --dynamo_use_dynamic` does; the recipe compiles layers."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "True")
    trainer = make()
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)


def test_torch_compile_compiles_the_layers(make: Make) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = make(torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert all(
        isinstance(layer, torch._dynamo.eval_frame.OptimizedModule) for layer in trainer.model_wrapped.model.layers
    )
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_liger_replaces_layers(make: Make) -> None:
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    trainer = make(use_liger_kernel=True)
    norm = trainer.model.model.norm
    assert isinstance(norm, LigerRMSNorm) or "liger" in norm.forward.__func__.__module__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_activations_are_offloaded(make: Make) -> None:
    trainer = make(activation_offloading=True)
    assert type(trainer.maybe_activation_offload_context).__name__ == "OffloadActivations"
    trainer.train()
