"""Throughput and token metrics, compared with a second count from the rows and the model's logits."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from train.data.chat.template import use_template
from train.data.dataset import PackedDataset
from train.data.packing import plan_packing
from train.data.prepare import prepare
from train.data.tokens.table import TokenTable
from train.loop.arguments import training_arguments
from train.loop.batch_info import BATCH_INFO, BatchInfo, CountingCollator
from train.loop.metrics_log import StepLog
from train.loop.source_figures import SourceFigures
from train.loop.throughput import TIMING_METRICS, Throughput
from train.loop.trainer import JanusTrainer
from train.model.architecture import inspect_architecture
from train.model.flops import PEAK_FLOPS, peak_flops
from train.model.load import load_config, load_model
from train.model.tokenizer import load_tokenizer
from train.recipe import load_recipe


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "rows"])
def test_metrics_of_a_logging_step_are_those_of_its_tokens(
    recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path, packing: bool
) -> None:
    """At a learning rate of 0 the model stays the same, so that its logits can be computed afterwards."""
    training = {"learning_rate": 0.0, "logging_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    recipe = load_recipe(recipe_file(data={"packing": packing}, training={**training, "num_train_epochs": ...}))
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, "chatml")
    data = prepare(recipe, tokenizer)
    (tmp_path / "run").mkdir()
    trainer = JanusTrainer(
        recipe, training_arguments(recipe), load_model(recipe), tokenizer, data, [StepLog(recipe.output_dir)]
    )
    gathered: list[int] = []
    gather = trainer.accelerator.gather
    trainer.accelerator.gather = lambda tensor: gathered.append(1) or gather(tensor)
    trainer.train()
    assert len(gathered) == 2 + packing  # one a logging step, none a micro-batch; the self-test of packs has one, too

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    order = [index for epoch in (0, 1, 2) for index in epoch_indices(trainer, epoch)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    per_line, seen = 2 * 2 * 2, 0
    for number, line in enumerate(lines):
        tokens, trained, correct, entropy, loss = 0, 0, 0, 0.0, []
        for index in order[number * per_line : (number + 1) * per_line]:
            item = data.train.dataset[index]
            for ids, labels in zip(*(np.split(item[key], ends(item)) for key in ("input_ids", "labels")), strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor(ids)[None], use_cache=False).logits[0, :-1].double()
                wanted, log_p = torch.tensor(labels[1:]), logits.log_softmax(-1)
                mask = wanted != -100
                tokens, trained = tokens + len(ids), trained + int(mask.sum())
                correct += int((logits.argmax(-1) == wanted)[mask].sum())
                entropy += float(-(log_p.exp() * log_p).sum(-1)[mask].sum())
                loss += (-log_p[mask, wanted[mask]]).tolist()
        seen += tokens
        assert line["num_tokens"] == seen
        assert line["mean_token_accuracy"] == pytest.approx(correct / trained, abs=1e-12)
        assert line["entropy"] == pytest.approx(entropy / trained, rel=1e-5)
        assert line["tokens_per_second"] == pytest.approx(tokens / (2 * line["seconds_per_step"]))
        assert line["trained_tokens_per_second_per_gpu"] == pytest.approx(trained / (2 * line["seconds_per_step"]))
        parts = [line[f"seconds_{part}"] for part in ("waiting_for_data", "forward", "backward", "optimizer")]
        assert min(parts) > 0
        assert sum(parts) <= line["seconds_per_step"]
        assert set(TIMING_METRICS) - {"mfu"} <= line.keys()
        assert "mfu" not in line  # a CPU's peak is not known


def epoch_indices(trainer: JanusTrainer, epoch: int) -> list[int]:
    sampler = trainer._get_train_sampler()
    sampler.set_epoch(epoch)
    return list(sampler)


def ends(item: dict) -> np.ndarray:
    return np.cumsum(item.get("seq_lengths") or [len(item["input_ids"])])[:-1]


def no_sources() -> SourceFigures:
    rows = np.empty(0, np.int64)
    empty = PackedDataset(TokenTable([], []), rows, 8, lambda epoch: plan_packing(rows, None), packed=False)
    return SourceFigures(empty, torch.device("cpu"))


def test_a_batch_carries_its_contents() -> None:
    """The first token of a document has no loss, whatever its label."""
    examples = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, -100, 5], "seq_lengths": [2, 3], "sequence": 7},
        {"input_ids": [6], "labels": [6], "seq_lengths": [1], "sequence": 3},
    ]
    batch = CountingCollator(lambda examples: {"rows": len(examples)})(examples)
    info = batch.pop(BATCH_INFO)
    assert batch == {"rows": 2}
    assert (info.sequences, info.documents.tolist(), info.trained_tokens) == ((7, 3), [2, 3, 1], 2)


def test_mfu_counts_the_trained_documents(recipe_file: Callable[..., Path]) -> None:
    """6 FLOPs per weight and token, tied embedding included, and causal attention inside each document."""
    recipe = load_recipe(recipe_file())
    shape = inspect_architecture(recipe, load_config(recipe.model))
    throughput = Throughput(Accelerator(cpu=True), shape, no_sources())
    throughput._peak = 1e6
    throughput.begin_step()
    throughput.add(BatchInfo((0,), np.array([5, 300]), 100), None)
    throughput.add(BatchInfo((1,), np.array([17]), 4), None)
    throughput.on_step_end()
    metrics, _ = throughput.gather_metrics()
    flops = 0
    for length in (5, 300, 17):
        flops += 6 * shape.total * length
        for token in range(length):
            flops += 2 * 12 // 2 * 64 * (token + 1) * 2  # 2 layers, queries of 4 x 16
    assert metrics["mfu"] == pytest.approx(flops / metrics["seconds_per_step"] / 1e6, rel=1e-9)
    assert "entropy" not in metrics


class Device:
    """A device with a queue, in the place of CUDA's: an event happens when the work that is queued before it is done."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0
        self.waits = 0

    def launch(self, seconds: float) -> None:
        self.host += 0.001  # of the host; the device works on
        self.busy_until = max(self.busy_until, self.host) + seconds

    def now(self) -> float:
        return max(self.busy_until, self.host)

    def between(self, start: float, end: float) -> float:
        self.waits += end > self.host
        self.host = max(self.host, end)
        return end - start


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_step_lasts_until_the_device_has_done_its_optimizer_step(logging_steps: int) -> None:
    """6 steps: 0.25 s of waiting for data, 1.0 s of kernels before the host waits, 0.5 s of the optimizer's after it."""
    throughput, device = Throughput(Accelerator(cpu=True), None, no_sources()), Device()
    throughput._clock = device
    metrics = []
    for step in range(1, 7):
        throughput.begin_step()
        device.host += 0.25
        with throughput.timed("backward"):
            with throughput.timed("forward"):
                device.launch(0.4)
            device.launch(0.6)
        device.host = device.now()  # the norm of the gradients is read
        throughput.on_pre_optimizer_step()
        device.launch(0.5)
        throughput.on_optimizer_step()
        throughput.on_step_end()
        if step % logging_steps == 0:
            metrics.append(throughput.gather_metrics()[0])
            device.host = max(device.host, device.busy_until) + 9  # evaluation and saving belong to no step
        assert device.waits <= len(metrics)  # a step that is not logged never waits for the device
    # the first step after a pause begins on an idle device; the data of the others arrive while it works
    idle = 0.25 + 1.0 + 0.5
    overlapped = 1.0 + 0.5
    expected = (idle + (logging_steps - 1) * overlapped) / logging_steps
    for line in metrics:
        assert line["seconds_per_step"] == pytest.approx(expected, abs=0.005)
        assert line["seconds_optimizer"] == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "A6000"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpus_peak_is_found_by_its_driver_name(name: str, gpu: str | None) -> None:
    assert peak_flops(name) == (PEAK_FLOPS[gpu] if gpu else None)
