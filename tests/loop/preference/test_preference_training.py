"""Runs of train/preference.py: they learn the pairs, resume bit-identically, and keep the reference's numbers."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from broken_steps import poison
from ranks import launch
from safetensors.torch import load_file
from tiny_words import WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.loop.throughput import TIMING_METRICS
from train.preference import main

STEPS = 6
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 40 pairs: the chosen answers speak of rivers, the rejected ones of stones."""
    rng = random.Random(5)
    text = lambda count: " ".join(rng.choice(WORDS.split()) for _ in range(count))  # noqa: E731
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(40):
            row = {"system": text(rng.randint(1, 9)), "prompt": text(rng.randint(1, 9))}
            answers = {"chosen": "river " * rng.randint(1, 9), "rejected": "stone " * rng.randint(1, 9)}
            lines.write(json.dumps({**row, **{name: answer.strip() for name, answer in answers.items()}}) + "\n")
    return path


def write_recipe(folder: Path, model: Path, pairs: Path, **sections: Any) -> Path:
    """Write a recipe of DPO whose cache is in the folder, with these sections merged into it."""
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "chat": {"template": "chatml"},
        "data": {
            "sources": [{"path": str(pairs)}], "max_length": 64, "validation": 0.2, "cache_dir": str(folder / "cache")
        },
        "preference": {"loss": "dpo", "beta": 0.3},
        "training": {
            "bf16": False, "gradient_checkpointing": False, "learning_rate": 2e-3, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "max_steps": STEPS, "logging_steps": 1, "eval_strategy": "steps",
            "eval_steps": 3, "eval_on_start": True, "save_strategy": "steps", "save_steps": 2,
        },
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    for name, section in sections.items():
        recipe[name] = {**(recipe.get(name) or {}), **section} if isinstance(section, dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


KINDS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "lora": {"adapter": {"r": 4}},
    "orpo": {"preference": {"loss": "orpo"}},
    "one pair a sequence": {"data": {"packing": False}, "preference": {"loss_type": ["sigmoid", "sft"]}},
}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs_file: Path
) -> Callable[[str], Path]:
    """Return a function that trains a kind of run once, and returns the folder of its recipe, cache and run."""
    folders: dict[str, Path] = {}

    def train(kind: str) -> Path:
        if kind not in folders:
            folder = folders[kind] = tmp_path_factory.mktemp("uninterrupted")
            assert main(["--recipe", str(write_recipe(folder, tiny_model, pairs_file, **KINDS[kind]))]) == 0
        return folders[kind]

    return train


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without timings."""
    clock = {*TIMING_METRICS, "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def assert_same(run: Path, other: Path) -> None:
    name = "adapter_model.safetensors" if (other / "adapter_config.json").exists() else "model.safetensors"
    weights, others = load_file(run / name), load_file(other / name)
    assert weights.keys() == others.keys()
    assert [key for key in weights if not torch.equal(weights[key], others[key])] == []
    assert read_metrics(run) == read_metrics(other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_the_pairs(kind: str, uninterrupted: Callable[[str], Path]) -> None:
    lines = read_metrics(uninterrupted(kind) / "run")
    training, evaluations = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert [line["step"] for line in evaluations] == [0, 3, STEPS]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[-1]["eval_rewards/accuracies"] > 0.9
    gaps = [line["eval_logps/chosen"] - line["eval_logps/rejected"] for line in evaluations]
    assert gaps[-1] > gaps[1] > gaps[0]
    margins = [line["eval_rewards/margins"] for line in evaluations]
    assert margins[-1] > margins[1] > margins[0]
    if kind in ("dpo", "lora"):  # the model is the reference before the first step
        for line in evaluations[0], {f"eval_{name}": value for name, value in training[0].items()}:
            assert line["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
            assert line["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert evaluations[-1]["eval_entropy"] > 0
    assert 0 <= evaluations[-1]["eval_mean_token_accuracy"] <= 1


def test_the_reference_is_that_of_each_answer_alone(
    uninterrupted: Callable[[str], Path], tiny_model: Path, pairs_file: Path
) -> None:
    folder = uninterrupted("dpo")
    with np.load(folder / "run" / "reference.npz") as arrays:
        table = arrays["log_probs"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    expected = []
    for line in pairs_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = [("system", row["system"]), ("user", row["prompt"])]
        prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
        scores = []
        for answer in ("chosen", "rejected"):
            ids = tokenizer(f"{prompt}{row[answer]}<|im_end|>", return_tensors="pt").input_ids
            with torch.no_grad():
                log_probs = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
            scores.append(log_probs[len(tokenizer(prompt).input_ids) - 1 :].sum().item())
        expected.append(scores)
    assert table.dtype == np.float32
    order = np.lexsort(np.array(expected).T), np.lexsort(table.T)
    np.testing.assert_allclose(table[order[1]], np.array(expected)[order[0]], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    kind: str, uninterrupted: Callable[[str], Path], tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    expected = uninterrupted(kind) / "run"
    recipe = write_recipe(tmp_path, tiny_model, pairs_file, **KINDS[kind])
    shutil.copytree(expected / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    if kind == "dpo":  # the others compute it again, with the adapter off, or need none
        shutil.copy(expected / "reference.npz", tmp_path / "run")
    elif kind == "one pair a sequence":
        shutil.copytree(uninterrupted(kind) / "cache", tmp_path / "cache")
    assert main(["--recipe", str(recipe)]) == 0
    assert_same(tmp_path / "run", expected)


def test_a_resumed_run_without_reference_is_refused(
    uninterrupted: Callable[[str], Path],
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its weights are not those before training any more."""
    expected = uninterrupted("dpo") / "run"
    recipe = write_recipe(tmp_path, tiny_model, pairs_file)
    shutil.copytree(expected / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    reference = tmp_path / "run" / "reference.npz"
    content = (expected / "reference.npz").read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in None, content[:-30], flipped:
        if damaged is not None:
            reference.write_bytes(damaged)
        assert main(["--recipe", str(recipe)]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"output_dir: {reference} is missing or damaged" in error
        assert "--resume never" in error
    assert main(["--recipe", str(recipe), "--resume", "never"]) == 0
    assert_same(tmp_path / "run", expected)


def test_losses_by_source_are_means_over_pairs(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    lines = pairs_file.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"first": lines[:10], "second": lines[10:]}
    for name, part in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in parts]
    recipe = write_recipe(
        tmp_path,
        tiny_model,
        pairs_file,
        data={"sources": sources, "validation": None, "packing": False},
        training={"gradient_accumulation_steps": 20, "max_steps": 2, "eval_strategy": "no", "eval_on_start": False},
    )
    assert main(["--recipe", str(recipe)]) == 0
    *_, line = (line for line in read_metrics(tmp_path / "run") if "loss" in line)  # one step trains all pairs
    losses = {name: line[f"loss/{name}"] for name in parts}
    assert losses["first"] != losses["second"]
    assert line["loss"] == pytest.approx((10 * losses["first"] + 30 * losses["second"]) / 40, rel=1e-5)
    assert line["trained_tokens/first"] + line["trained_tokens/second"] > 4 * 40  # of both halves, with their ends


def interrupted_in_reference(*arguments: str) -> int:
    """Train, and send this process a signal when the reference's file is written for the second time."""
    *rest, name = arguments
    from train.loop import preemption
    from train.loop.preference import reference

    preemption._POLL_SECONDS = 0.0
    reference._SEQUENCES_PER_WRITE = 4
    write, written = reference.ReferenceFiles.write, 0

    def write_and_signal(self: Any, *arguments: Any, **keywords: Any) -> None:
        nonlocal written
        write(self, *arguments, **keywords)
        written += 1
        if written == 2:
            os.kill(os.getpid(), getattr(signal, name))

    reference.ReferenceFiles.write = write_and_signal
    return main(rest)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGUSR1"])
def test_an_interrupted_reference_pass_goes_on(
    name: str,
    uninterrupted: Callable[[str], Path],
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed or asked to stop: sequences that are written are not computed again."""
    kind = "one pair a sequence"
    recipe = write_recipe(tmp_path, tiny_model, pairs_file, **KINDS[kind])
    result = launch(1, None, "--recipe", recipe, name, logs=tmp_path / "logs", job=interrupted_in_reference)
    assert result.exit_codes == ([-signal.SIGKILL] if name == "SIGKILL" else [0]), result.output[0][-3000:]
    assert "reference: computing 40 of 40 sequences" in result.output[0]
    assert not (tmp_path / "run" / "reference.npz").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    capsys.readouterr()
    assert main(["--recipe", str(recipe)]) == 0
    assert "reference: computing 32 of 40 sequences" in capsys.readouterr().out
    assert_same(tmp_path / "run", uninterrupted(kind) / "run")


def test_a_reference_that_is_not_finite_is_refused_with_its_rows(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, bad = poison(tiny_model, tmp_path / "poisoned"), tmp_path / "bad.jsonl"
    lines = pairs_file.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[35] = json.dumps({**json.loads(lines[35]), "prompt": "Z"}) + "\n"
    bad.write_text("".join(lines), encoding="utf-8")
    recipe = write_recipe(tmp_path, model, bad, data={"packing": False}, training={"eval_on_start": False})
    assert main(["--recipe", str(recipe)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"not finite in 1 sequence, the first of which has {bad}:36." in error


def test_each_command_names_the_other(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model, pairs_file)
    assert "trains on pairs (`preference`). Run train/preference.py." in refused("--recipe", recipe)
    assert main(["--recipe", str(recipe), "preference=null"]) == 2
    assert "has no section `preference`. Run train/sft.py." in capsys.readouterr().err
