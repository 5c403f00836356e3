"""Rows that are not packed: with a kernel that takes borders, batches have no padding and give what padded ones do."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import prepared
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from varlen_kernels import stand_in_kernel

from train.errors import UserError
from train.loop.arguments import training_arguments
from train.loop.batch_info import BATCH_INFO
from train.loop.metrics_log import StepLog
from train.loop.trainer import JanusTrainer
from train.model.attention import torch_varlen as varlen
from train.model.attention.document_borders import takes_borders
from train.model.load import load_model
from train.recipe import load_recipe

Make = Callable[..., JanusTrainer]
ROWS = 3


@pytest.fixture
def make(recipe_file: Callable[..., Path], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that makes the trainer of unpacked rows, three at once, with any attention kernel."""
    monkeypatch.setattr(varlen, "KERNEL", stand_in_kernel("2.13"))
    varlen.register()

    def trainer(attention: str, folder: str = "run", *, layers: int = 2, packing: bool = False) -> JanusTrainer:
        training = {
            "num_train_epochs": ...,
            "max_steps": 4,
            "per_device_train_batch_size": ROWS,
            "per_device_eval_batch_size": 5,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        data = {"packing": packing, "max_length": 300, "overlong": "drop", "validation": [{"path": str(rows_file)}]}
        recipe = load_recipe(recipe_file(data=data, training=training, output_dir=str(tmp_path / folder)))
        Path(recipe.output_dir).mkdir(exist_ok=True)
        tokenizer, splits = prepared(recipe)
        model = load_model(recipe)
        model.model.layers = model.model.layers[:layers]
        model.set_attn_implementation(attention)
        return JanusTrainer(recipe, training_arguments(recipe), model, tokenizer, splits, [StepLog(recipe.output_dir)])

    return trainer


def gradients(trainer: JanusTrainer, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=100)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in trainer.model.named_parameters()}


def test_joined_rows_have_the_loss_and_gradients_of_padded_ones(make: Make) -> None:
    padded, joined = make("sdpa"), make(varlen.NAME)
    batches = list(zip(padded.get_train_dataloader(), joined.get_train_dataloader(), strict=True))
    assert len(batches) == len(padded.train_dataset) / ROWS
    for one_each in batches[:2]:
        infos = [batch[BATCH_INFO] for batch in one_each]
        assert infos[0].sequences == infos[1].sequences
        assert infos[0].documents.tolist() == infos[1].documents.tolist()
        lengths = infos[0].documents
        assert one_each[0]["input_ids"].shape == (ROWS, lengths.max())
        assert one_each[1]["input_ids"].shape == (1, lengths.sum())
        assert "attention_mask" not in one_each[1]
        (loss, right), (other, ours) = (gradients(*pair) for pair in zip((padded, joined), one_each, strict=True))
        assert other == pytest.approx(loss, rel=1e-6)
        for name, gradient in right.items():
            assert (ours[name] - gradient).norm() <= 4e-6 * gradient.norm(), name  # a few dozen roundings of 6e-8


def lines(trainer: JanusTrainer) -> list[dict[str, float]]:
    text = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text()
    names = ("step", "epoch", "loss", "grad_norm", "num_tokens", "entropy", "mean_token_accuracy", "learning_rate")
    return [{name: line[name] for name in names} for line in map(json.loads, text.splitlines()) if "loss" in line]


def test_a_run_takes_the_same_steps_and_resumes(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics of steps, evaluation, and a run resumed from its middle equal those of padded rows."""
    padded, joined, resumed = make("sdpa", "padded"), make(varlen.NAME, "joined"), make(varlen.NAME, "resumed")
    padded.train()
    assert "isolated" not in capsys.readouterr().out
    joined.train()
    assert "rows of a batch, joined without padding, are isolated: replacing one" in capsys.readouterr().out
    resumed.train(str(Path(joined.args.output_dir) / "checkpoint-2"))
    expected = lines(padded)
    assert [line["step"] for line in expected] == [1, 2, 3, 4]
    for trainer in joined, resumed:
        for line, right in zip(lines(trainer), expected, strict=True):
            assert line == pytest.approx(right, rel=1e-4)
    right, ours = (trainer.evaluate() for trainer in (padded, joined))
    for name in "eval_loss", "eval_entropy", "eval_mean_token_accuracy":
        assert ours[name] == pytest.approx(right[name], rel=1e-4)


class Syncs(TorchDispatchMode):
    """Count of operations for which the host waits for a device: their results have a size or a value it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket)
        if name in ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero"):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_no_layer_waits_for_the_host(make: Make) -> None:
    """Forward and backward of a batch: as often as packed rows do, and with two layers as often as with one."""

    def count(trainer: JanusTrainer) -> Counter[str]:
        inputs = next(iter(trainer.get_train_dataloader()))
        with Syncs() as syncs:
            gradients(trainer, inputs)
        return syncs.counts

    packed = count(make(varlen.NAME, packing=True))
    assert count(make(varlen.NAME)) == count(make(varlen.NAME, layers=1)) == packed
    padded = make(varlen.NAME)
    padded.data_collator._collate.padding_free = False
    assert count(padded).total() >= packed.total() + 2 * 4  # the test can fail: this is what padding costs a layer


def test_a_kernel_that_ignores_borders_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    trainer = make(varlen.NAME)
    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, varlen.NAME, attention)
        with pytest.raises(UserError, match=r"torch_varlen lets .* or `sdpa` with `data\.packing: false`"):
            trainer.train()


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "takes"),
    [("llama", True), ("gemma2", True), ("qwen3_moe", True), ("lfm2", False), ("qwen3_next", False)],
)
def test_models_with_a_state_are_padded(kind: str, takes: bool) -> None:
    """And all with kernels that mask."""
    layers = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    config = AutoConfig.for_model(kind, **SMALL, **layers, vocab_size=64, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert not takes_borders(model)
    joining = (varlen.NAME, varlen.BY_DOCUMENT, "flash_attention_2", "kernels-community/flash-attn3")
    for kernel in (*joining, "sdpa", "flex_attention"):
        model.config._attn_implementation_internal = kernel
        assert takes_borders(model) == (takes and kernel in joining), kernel
