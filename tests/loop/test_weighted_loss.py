"""Weighted loss: packed batches of rows with loss weights train what a plain loop over single rows trains."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import make_trainer
from tiny_words import WORDS
from transformers import AutoConfig, AutoModelForCausalLM

from train.data.dataset import LOSS_WEIGHTS, PackedDataset
from train.errors import UserError
from train.loop import loss as loss_module
from train.loop.batch_info import BATCH_INFO, CountingCollator
from train.loop.sequence_slice import slice_batch
from train.loop.trainer import JanusTrainer
from train.recipe import Recipe, load_recipe

SOURCE_WEIGHT = 0.7
STEPS = 4


def write_weighted(path: Path, rows: int, seed: int) -> Path:
    """Write conversations of one to three exchanges, of which messages and rows have loss weights, or none."""
    rng = random.Random(seed)
    text = lambda count: " ".join(rng.choice(WORDS.split()) for _ in range(count))  # noqa: E731
    with path.open("w", encoding="utf-8") as lines:
        for number in range(rows):
            turns: list[dict[str, Any]] = [{"role": "system", "content": text(5)}]
            for exchange in range(1 + number % 3):
                answer = {"role": "assistant", "content": text(rng.choice([1, 3, 10, 20]))}
                weight = rng.choice([None, 0.25, 1, 3] if exchange == 0 else [None, 0, 0.25, 1, 3])
                key = rng.choice(["weight", "loss_weight", "loss_scale"])
                turns += [{"role": "user", "content": text(4)}, answer | ({} if weight is None else {key: weight})]
            weight = rng.choice([None, 0.5, 1, 2])
            lines.write(json.dumps({"messages": turns} | ({} if weight is None else {"loss_weight": weight})) + "\n")
    return path


@pytest.fixture
def weighted_recipe(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """Return a function that makes a recipe of two sources with loss weights, one of which has one itself."""
    own, other = (write_weighted(tmp_path / f"{name}.jsonl", 18, seed) for seed, name in enumerate(("own", "other")))
    held_out = write_weighted(tmp_path / "held-out.jsonl", 7, seed=9)

    def make(**sections: Any) -> Recipe:
        data = {
            "sources": [{"path": str(own)}, {"path": str(other), "loss_weight": SOURCE_WEIGHT}],
            "validation": [{"path": str(held_out)}],
            "max_length": 200,
            **sections.pop("data", {}),
        }
        training = {
            "num_train_epochs": ...,
            "max_steps": STEPS,
            "optim": "sgd",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1e9,
            "per_device_eval_batch_size": 3,
            **sections.pop("training", {}),
        }
        return load_recipe(recipe_file(data=data, training=training, **sections))

    return make


def raw_weights(place: str) -> list[float]:
    """Return the loss weight of each trained answer of a row, read from its file."""
    path, line = place.rsplit(":", 1)
    row = json.loads(Path(path).read_text(encoding="utf-8").splitlines()[int(line) - 1])
    factor = row.get("loss_weight", 1) * (SOURCE_WEIGHT if path.endswith("other.jsonl") else 1)
    keys = ("weight", "loss_weight", "loss_scale")
    answers = (turn for turn in row["messages"] if turn["role"] == "assistant")
    weights = [next((turn[key] for key in keys if key in turn), 1) for turn in answers]
    return [weight * factor for weight in weights if weight]


def documents(dataset: PackedDataset, sequence: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield ids, labels and loss weights of each row of a sequence: [tokens]. An answer is a run of labels."""
    item, start = dataset[sequence], 0
    lengths = item.get("seq_lengths") or [len(item["input_ids"])]
    for length, place in zip(lengths, dataset.places(sequence), strict=True):
        ids, labels = (item[name][start : start + length] for name in ("input_ids", "labels"))
        trained = labels != -100
        begins = trained & ~np.concatenate([[False], trained[:-1]])
        weights = raw_weights(place)
        assert begins.sum() == len(weights)
        by_token = np.append(0, weights)[np.cumsum(begins) * trained]
        yield torch.tensor(ids), torch.tensor(labels), torch.tensor(by_token, dtype=torch.float64)
        start += length


def weighted_sum(
    model: torch.nn.Module, dataset: PackedDataset, sequences: tuple[int, ...], *, dft: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of weight x loss and of the weights over sequences, whose rows go through the model alone."""
    total, weight = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        for ids, labels, weights in documents(dataset, sequence):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)
            losses = losses * torch.exp(-losses).detach() if dft else losses
            total = total + (losses.double() * weights[1:]).sum()
            weight = weight + weights[1:].sum()
    return total, weight


def train_plainly(recipe: Recipe, trainer: JanusTrainer, *, dft: bool = False) -> tuple[list[float], dict[str, Any]]:
    """Return the losses and weights of SGD in a plain loop over the steps of a trainer."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), trainer.args.learning_rate)
    batches = [batch[BATCH_INFO].sequences for batch in trainer.get_train_dataloader()]
    accumulation, losses = trainer.args.gradient_accumulation_steps, []
    for step in range(trainer.args.max_steps):
        sequences = sum(batches[step * accumulation : (step + 1) * accumulation], ())
        assert sequences
        total, weight = weighted_sum(model, trainer.train_dataset, sequences, dft=dft)
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append((total / weight).item())
    return losses, model.state_dict()


def logged_losses(recipe: Recipe) -> list[float]:
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


SETTINGS = {
    "packed": {"data": {"packing": True}},
    "packed, accumulated": {"training": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "max_steps": 3}},
    "rows": {"data": {"packing": False}},
    "rows, accumulated": {"data": {"packing": False}, "training": {"gradient_accumulation_steps": 3}},
    "dft": {"training": {"loss_type": "dft", "learning_rate": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("head", ["logits", "fused head"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_are_those_of_a_plain_loop(
    setting: str, head: str, weighted_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of the steps and all weights after them, in float32; and the validation loss."""
    if head == "fused head":
        monkeypatch.setattr(loss_module, "LOGITS_LIMIT", 0)
    recipe = weighted_recipe(**SETTINGS[setting])
    trainer = make_trainer(recipe)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    losses, weights = train_plainly(recipe, trainer, dft=setting == "dft")
    trainer.train()
    assert logged_losses(recipe) == pytest.approx(losses, rel=1e-5)
    for name, value in trainer.model.state_dict().items():
        moved = (weights[name] - start[name]).abs().max()
        assert moved > 0
        rounding = STEPS * torch.finfo().eps * value.abs().max()  # of the weight itself, in each step
        torch.testing.assert_close(value, weights[name], rtol=0, atol=float(1e-4 * moved + rounding))

    held_out = trainer.eval_dataset._sequences
    with torch.no_grad():
        total, weight = weighted_sum(trainer.model.eval(), held_out, tuple(range(len(held_out))))
    assert trainer.evaluate()["eval_loss"] == pytest.approx((total / weight).item(), rel=1e-6)


def test_losses_of_sources_are_weighted_means(weighted_recipe: Callable[..., Recipe]) -> None:
    """In a run that changes no weight, they are those of a plain loop over the rows of each source."""
    recipe = weighted_recipe(training={"learning_rate": 0.0, "logging_steps": STEPS})
    trainer = make_trainer(recipe)
    batches = [batch[BATCH_INFO].sequences for batch in trainer.get_train_dataloader()][:STEPS]
    dataset, sums = trainer.train_dataset, {"own": np.zeros(3), "other": np.zeros(3)}
    with torch.no_grad():
        for sequence in sum(batches, ()):
            for place, (ids, labels, weights) in zip(
                dataset.places(sequence), documents(dataset, sequence), strict=True
            ):
                logits = trainer.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
                losses = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)
                figures = ((losses * weights[1:]).sum(), weights[1:].sum(), (labels[1:] != -100).sum())
                sums[Path(place.rpartition(":")[0]).stem] += [float(figure) for figure in figures]
    trainer.train()
    (line,) = map(json.loads, (Path(recipe.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    for name, (loss, weight, tokens) in sums.items():
        assert line[f"loss/{name}"] == pytest.approx(loss / weight, rel=1e-6)
        assert line[f"trained_tokens/{name}"] == tokens


def test_weights_matter(weighted_recipe: Callable[..., Recipe]) -> None:
    """The test above can fail: without the weights the losses differ by percents."""
    recipe = weighted_recipe()
    trainer = make_trainer(recipe)
    (inputs, *_) = trainer.get_train_dataloader()
    plain = {name: value for name, value in inputs.items() if name != LOSS_WEIGHTS}
    trainer.model.train()
    losses = [trainer.compute_loss(trainer.model, dict(batch)).item() for batch in (inputs, plain)]
    assert abs(losses[0] - losses[1]) > 0.01 * losses[1]


def test_accuracy_and_entropy_count_every_token_alike(weighted_recipe: Callable[..., Recipe]) -> None:
    """And a weight that all rows have changes nothing."""
    path = weighted_recipe().data.sources[0].path
    figures = []
    for weight in (1.0, 5.0):
        recipe = weighted_recipe(data={"sources": [{"path": path, "loss_weight": weight}]})
        make_trainer(recipe).train()
        lines = map(json.loads, (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines())
        names = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
        figures.append([[line[name] for name in names] for line in lines if "loss" in line])
    assert np.array(figures[1]) == pytest.approx(np.array(figures[0]), rel=1e-5)


def test_weights_of_adapters(weighted_recipe: Callable[..., Recipe]) -> None:
    """Gradients of an adapter are those of the plain loop."""
    recipe = weighted_recipe(adapter={"r": 4})
    trainer = make_trainer(recipe)
    batch = next(iter(trainer.get_train_dataloader()))
    sequences = batch[BATCH_INFO].sequences
    trainer.model.train()
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items).backward()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad.clone() for parameter in trained]
    trainer.model.zero_grad()
    total, weight = weighted_sum(trainer.model, trainer.train_dataset, sequences)
    (total / weight).backward()
    assert max(parameter.grad.abs().max() for parameter in trained) > 0
    for ours, parameter in zip(gradients, trained, strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6 * float(parameter.grad.abs().max()))


def test_a_resumed_run_continues_to_the_bit(weighted_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    training = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "logging_steps": 3, "max_steps": 6}
    recipe = weighted_recipe(training=training)
    trainer = make_trainer(recipe)
    trainer.train()
    resumed_recipe = recipe.model_copy(update={"output_dir": str(tmp_path / "resumed")})
    resumed = make_trainer(resumed_recipe)
    resumed.train(str(Path(recipe.output_dir) / "checkpoint-2"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert logged_losses(resumed_recipe) == logged_losses(recipe)


def test_runs_without_weights_have_none_in_their_batches(recipe_file: Callable[..., Path]) -> None:
    trainer = make_trainer(load_recipe(recipe_file()))
    assert not trainer.train_dataset.has_loss_weights
    assert all(LOSS_WEIGHTS not in batch for batch in trainer.get_train_dataloader())


def test_slices_hold_the_weights_of_their_labels(weighted_recipe: Callable[..., Recipe]) -> None:
    """Of a shared sequence each process has the weights of the tokens that its own tokens predict."""
    trainer = make_trainer(weighted_recipe())
    collator = CountingCollator(trainer.data_collator._collate)
    batch = collator([trainer.train_dataset[sequence] for sequence in (0, 1)])
    whole = batch[LOSS_WEIGHTS][0]
    assert torch.equal(whole > 0, batch["labels"][0, 1:] != -100)
    for ranks in (2, 3):
        parts = [slice_batch(batch, rank, ranks) for rank in range(ranks)]
        for part in parts:
            assert torch.equal(part[LOSS_WEIGHTS] > 0, part["shift_labels"] != -100)
        assert torch.equal(torch.cat([part[LOSS_WEIGHTS][0] for part in parts])[: len(whole)], whole)


def test_losses_that_cannot_be_weighted_are_refused(weighted_recipe: Callable[..., Recipe]) -> None:
    error = r"^data: .* of 36 training rows .* loss of training\.label_smoothing_factor without weights"
    with pytest.raises(UserError, match=error):
        make_trainer(weighted_recipe(training={"label_smoothing_factor": 0.1}))


def test_weights_beside_a_router_loss_are_refused(
    weighted_recipe: Callable[..., Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    """TRL computes the loss of a mixture of experts, whose auxiliary loss is on by default."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
    config = AutoConfig.for_model("qwen3_moe", vocab_size=512, head_dim=16, **sizes, **experts)
    folder = shutil.copytree(tiny_model, tmp_path / "experts")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = {"name_or_path": str(folder)}
    with pytest.raises(UserError, match=r"^training\.router_aux_loss_coef: .* without the loss weights"):
        make_trainer(weighted_recipe(model=model))
    assert make_trainer(weighted_recipe(model=model, training={"router_aux_loss_coef": 0.0}))
