"""Packing isolation test: models whose packed documents see each other are refused, and no others."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_trainer import make_trainer
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from train.errors import UserError
from train.loop.guards.packing_isolation import Isolation, measure_isolation
from train.loop.trainer import JanusTrainer
from train.recipe import load_recipe

Make = Callable[..., JanusTrainer]
ONE_STEP = {"num_train_epochs": ..., "max_steps": 1}


@pytest.fixture
def make(recipe_file: Callable[..., Path]) -> Make:
    def trainer(attention: str = "sdpa", **sections: dict) -> JanusTrainer:
        training = {**ONE_STEP, **sections.pop("training", {})}
        return make_trainer(load_recipe(recipe_file(model={"attention": attention}, training=training, **sections)))

    return trainer


@pytest.fixture
def borderless() -> Iterator[str]:
    """Register a kernel that treats a pack as one document, as FlashAttention does without borders."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("borderless", attention)
    AttentionMaskInterface.register("borderless", flash_attention_mask)
    yield "borderless"
    del AttentionInterface._global_mapping["borderless"], AttentionMaskInterface._global_mapping["borderless"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_isolated_documents_pass(make: Make, attention: str, bf16: bool, capsys) -> None:
    trainer = make(attention, training={"bf16": bf16})
    measured = measure_isolation(trainer)
    assert measured.change == measured.noise == 0.0
    assert measured.leak > 0.1
    assert measured.packed_loss == pytest.approx(measured.alone_loss, rel=0.03 if bf16 else 1e-5)
    trainer.train()
    assert capsys.readouterr().out.count("packed documents are isolated") == 1


def test_a_kernel_that_ignores_borders_is_refused(make: Make, borderless: str) -> None:
    trainer = make()
    trainer.model.set_attn_implementation(borderless)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(UserError, match=r"^model\.attention: borderless lets packed documents see each other.*`auto`"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_a_leak_in_one_layer_alone_is_refused(make: Make, borderless: str) -> None:
    trainer = make()
    leaking = trainer.model.model.layers[1].self_attn
    leaking.config = type(leaking.config)(**{**leaking.config.to_dict(), "attn_implementation": borderless})
    assert leaking.config._attn_implementation == "borderless"
    assert "see each other" in measure_isolation(trainer).find_error()


def test_a_dense_mask_is_refused(make: Make) -> None:
    """transformers derives packed documents from the positions only if there is no mask: this would leak silently."""
    trainer = make()
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (
        (batch := collate(rows)) | {"attention_mask": batch["input_ids"].new_ones(1, batch["input_ids"].shape[1])}
    )
    with pytest.raises(UserError, match="see each other"):
        trainer.train()


def test_positions_that_do_not_restart_are_refused(make: Make) -> None:
    trainer = make()
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (
        (batch := collate(rows)) | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    )
    with pytest.raises(UserError, match="see each other"):
        trainer.train()


def test_a_loss_that_differs_from_the_document_alone_is_refused() -> None:
    """Without a leak: positions that are wrong only in a pack, say."""
    error = Isolation(0.0, 0.0, 1.0, packed_loss=5.1, alone_loss=5.0, dtype=torch.float32).find_error()
    assert "5.1000 in a pack and 5.0000 alone" in error
    assert Isolation(0.0, 0.0, 1.0, packed_loss=5.1, alone_loss=5.0, dtype=torch.bfloat16).find_error() is None


def test_noise_without_a_leak_passes() -> None:
    """Batches of experts and 8-bit scales couple documents, the following one as much as the preceding one."""
    assert Isolation(0.04, 0.03, 1.0, 5.0, 5.0, torch.bfloat16).find_error() is None
    assert Isolation(0.04, 0.0, 1.0, 5.0, 5.0, torch.bfloat16).find_error() is not None


def test_losses_that_are_not_finite_are_left_to_training() -> None:
    nan = float("nan")
    assert Isolation(nan, nan, nan, nan, nan, torch.bfloat16).find_error() is None
    assert Isolation(nan, 0.0, 1.0, 5.0, 5.0, torch.bfloat16).find_error() is not None


def test_the_model_and_the_random_state_stay_unchanged(make: Make) -> None:
    trainer = make()
    trainer.model.train()
    trainer.model.model.layers[0].eval()
    modes = [module.training for module in trainer.model.modules()]
    metrics = {mode: dict(values) for mode, values in trainer._metrics.items()}
    random = torch.get_rng_state()
    measure_isolation(trainer)
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert {mode: dict(values) for mode, values in trainer._metrics.items()} == metrics
    assert trainer.state.num_input_tokens_seen == 0


def test_runs_without_packing_are_not_tested(make: Make, capsys) -> None:
    make(data={"packing": False}).train()
    assert "packed documents" not in capsys.readouterr().out


def test_few_short_rows_are_enough(make: Make, tmp_path: Path) -> None:
    rows = tmp_path / "one.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 2)
    measured = measure_isolation(make(data={"sources": [{"path": str(rows)}]}))
    assert measured.leak > 0.01
    assert measured.find_error() is None


def test_adapters_are_tested_too(make: Make, borderless: str) -> None:
    trainer = make(adapter={"r": 2})
    assert measure_isolation(trainer).find_error() is None
    trainer.model.get_base_model().set_attn_implementation(borderless)
    assert "see each other" in measure_isolation(trainer).find_error()
