"""Losses and weights are independent of how rows fall into batches, packed or not."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from train.data.chat.template import use_template
from train.data.prepare import prepare
from train.data.prepared_data import PreparedData
from train.loop.arguments import training_arguments, without_zero3
from train.loop.metrics_log import StepLog
from train.loop.trainer import JanusTrainer
from train.model.load import load_model
from train.model.tokenizer import load_tokenizer
from train.recipe import Recipe, load_recipe
from train.recipe.schedule import compute_schedule


def prepared(recipe: Recipe):
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.chat.template)
    return tokenizer, prepare(recipe, tokenizer)


def make_trainer(recipe: Recipe) -> JanusTrainer:
    tokenizer, data = prepared(recipe)
    Path(recipe.output_dir).mkdir(exist_ok=True)
    return JanusTrainer(
        recipe, training_arguments(recipe), load_model(recipe), tokenizer, data, [StepLog(recipe.output_dir)]
    )


def one_by_one(model: torch.nn.Module, data: PreparedData) -> tuple[torch.Tensor, int]:
    """Return the loss summed over all documents, each in its own forward pass with gradients, and the trained tokens."""
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in data.train.dataset:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids = torch.tensor(row["input_ids"][None, start : start + length])
            labels = torch.tensor(row["labels"][start + 1 : start + length])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            part = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
            part.backward()
            loss += part.detach().double()
            tokens += int((labels != -100).sum())
            start += length
    return loss, tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_packed_batch_do_not_see_each_other(recipe_file: Callable[..., Path], attention: str) -> None:
    """Loss and every gradient of packed batches equal those of the documents one by one, in float32."""
    recipe = load_recipe(recipe_file(model={"attention": attention}, data={"packing": True}))
    trainer = make_trainer(recipe)
    assert max(len(row["seq_lengths"]) for row in trainer.train_dataset) > 3
    packed_loss = torch.zeros((), dtype=torch.float64)
    tokens = sum(label != -100 for row in trainer.train_dataset for label in row["labels"])
    trainer.model.train()
    for inputs in trainer.get_train_dataloader():
        assert inputs["position_ids"].shape[0] == 1
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=tokens)
        loss.backward()
        packed_loss += loss.detach().double()
    packed_gradients = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}

    model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.float32)
    loss, counted = one_by_one(model, prepared(recipe)[1])
    assert counted == tokens
    assert packed_loss.item() == pytest.approx(loss.item() / tokens, rel=1e-6)
    for name, parameter in model.named_parameters():
        expected = parameter.grad / tokens
        torch.testing.assert_close(packed_gradients[name], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_a_leak_between_documents_changes_the_loss(recipe_file: Callable[..., Path]) -> None:
    """The test above can fail: with positions that don't restart, the same rows have another loss."""
    recipe = load_recipe(recipe_file(data={"packing": True}))
    trainer = make_trainer(recipe)
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    right = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=100).item()
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    leaking = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=100).item()
    assert abs(leaking - right) > 1e-3 * right


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_accumulation_does_not_change_loss_or_weights(recipe_file: Callable[..., Path], packing: bool) -> None:
    """Batch x accumulation 1 x 8, 2 x 4 and 8 x 1: the same loss, gradient norm and weights after one step."""
    outcomes = []
    for batch, accumulation in ((1, 8), (2, 4), (8, 1)):
        recipe = load_recipe(
            recipe_file(
                data={"packing": packing, "max_length": 300, "overlong": "drop"},
                training={
                    "per_device_train_batch_size": batch,
                    "gradient_accumulation_steps": accumulation,
                    "num_train_epochs": ...,
                    "max_steps": 1,
                    "optim": "sgd",
                    "learning_rate": 1.0,
                    "lr_scheduler_type": "constant",
                },
            )
        )
        trainer = make_trainer(recipe)
        assert len(trainer.train_dataset) >= 8
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        assert packing or max(lengths) > 5 * min(lengths)
        trainer.train()
        (line,) = [json.loads(text) for text in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
        outcomes.append((line, {name: value.clone() for name, value in trainer.model.state_dict().items()}))
    (first_line, first_weights), *others = outcomes
    start = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.float32).state_dict()
    moved = {name: (first_weights[name] - start[name]).abs().max().item() for name in first_weights}
    assert all(change > 0 for change in moved.values())
    for line, weights in others:
        assert line["loss"] == pytest.approx(first_line["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(first_line["grad_norm"], rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, first_weights[name], rtol=0, atol=2e-5 * moved[name])


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_evaluation_loss_is_the_mean_over_tokens(
    recipe_file: Callable[..., Path], rows_file: Path, packing: bool
) -> None:
    """For all batch sizes; transformers' mean over batches would differ."""
    losses = []
    for batch in (1, 3, 5):
        recipe = load_recipe(
            recipe_file(
                data={
                    "packing": packing,
                    "max_length": 300,
                    "overlong": "drop",
                    "validation": [{"path": str(rows_file)}],
                },
                training={"per_device_eval_batch_size": batch},
            )
        )
        trainer = make_trainer(recipe)
        losses.append(trainer.evaluate()["eval_loss"])
        assert not any(trainer._throughput.state()["counts"])  # an evaluation is no part of a step's time
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.float32)
    loss, tokens = one_by_one(model, prepared(recipe)[1])
    assert losses == pytest.approx([loss.item() / tokens] * 3, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("epochs", [1, 2, 1.5])
def test_steps_are_counted_as_transformers_counts_them(
    recipe_file: Callable[..., Path], batch: int, accumulation: int, epochs: float
) -> None:
    recipe = load_recipe(
        recipe_file(
            data={"packing": False},
            training={
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "num_train_epochs": epochs,
                "learning_rate": 0.0,
            },
        )
    )
    trainer = make_trainer(recipe)
    expected = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    steps = compute_schedule(recipe.training, len(trainer.train_dataset), 1.0, trainer.args.world_size)
    assert (steps.steps, steps.steps_per_epoch) == (expected[-1], expected[1])


def test_zero3_is_restored_after_a_model_without_weights() -> None:
    """`training.deepspeed` makes a plugin without `dschf`, which accelerate's own configuration sets."""
    pytest.importorskip("deepspeed")
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import (
        HfTrainerDeepSpeedConfig,
        is_deepspeed_zero3_enabled,
        unset_hf_deepspeed_config,
    )

    settings = HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
        assert not hasattr(plugin, "dschf")
        with without_zero3(SimpleNamespace(deepspeed_plugin=plugin)):
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
