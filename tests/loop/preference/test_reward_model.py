"""Reward models: TRL's losses and gradients, runs that learn, and saved models in plain transformers."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_words import WORDS
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference, suppress_seqcls_warning
from trl.trainer.reward_trainer import RewardTrainer as TrlRewardTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from train.data.loss_mask import NOT_TRAINED
from train.errors import UserError
from train.loop import side_files
from train.loop.batch_info import BATCH_INFO
from train.loop.preference.losses import compute_losses, step_loss
from train.loop.preference.pairs import DOCUMENTS, PAIRS, PairCollator, by_pair, tokens_of
from train.loop.preference.reward import REWARD_MEANS, find_last_tokens, sum_rewards
from train.model.classifier import find_score_head, score_tokens
from train.model.merge import merge_adapter
from train.preference import main
from train.recipe.preference import PreferenceSection

CHOSEN, REJECTED = "chosen_ids", "rejected_ids"
PADDING = 0
Pair = dict[str, list[int]]


def draw_pairs() -> list[Pair]:
    """Return pairs of random tokens; the last one's chosen text ends with the padding token."""
    rng = random.Random(3)
    lengths = [(16, 12), (5, 13), (13, 30), (18, 7), (24, 12)]
    pairs = [{name: [rng.randrange(3, 250) for _ in range(n)] for name, n in zip((CHOSEN, REJECTED), pair, strict=True)}
             for pair in lengths]  # fmt: skip
    pairs[-1][CHOSEN][-1] = PADDING
    return pairs


PAIRS_OF_TOKENS = draw_pairs()


def build(folder: Path, *, adapter: bool) -> Any:
    torch.manual_seed(1)
    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = PADDING
    model.score.weight.data.normal_()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model.train()


def pack(pairs: list[Pair]) -> dict[str, Any]:
    """Return all pairs as one packed batch."""
    documents = [pair[name] for pair in pairs for name in (CHOSEN, REJECTED)]
    tokens = [token for document in documents for token in document]
    item = {"input_ids": tokens, "labels": tokens, "seq_lengths": [len(document) for document in documents]}
    collate = DataCollatorForLanguageModeling(pad_token_id=PADDING, padding_free=True)
    return PairCollator(collate)([{**item, PAIRS: range(len(pairs)), "sequence": 0}])


def evaluate(
    model: Any, batch: dict[str, Any], section: PreferenceSection, divisors: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return our loss and metrics of a batch."""
    batch = dict(batch)
    numbers, documents = batch.pop(PAIRS), batch.pop(DOCUMENTS)
    batch.pop(BATCH_INFO)
    of_document = tokens_of(documents, len(numbers))
    last = find_last_tokens(batch["input_ids"], of_document, PADDING)
    rewards = score_tokens(model, find_score_head(model), batch)[0, last]
    scores = by_pair(rewards, of_document & (batch["labels"][0, 1:] != NOT_TRAINED))
    losses = compute_losses(section, scores, None)
    return step_loss(losses, scores, divisors), REWARD_MEANS.means(sum_rewards(scores, losses).tolist())


def assert_same_gradients(model: Any, other: Any) -> None:
    gradients = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.grad is not None}
    assert any("score" in name for name in gradients)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if name in gradients:
            tolerance = 1e-5 * gradients[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("centering", [None, 0.01, 0.5])
def test_loss_metrics_and_gradients_equal_trl(
    centering: float | None, adapter: bool, tiny_model: Path, tmp_path: Path
) -> None:
    arguments = RewardConfig(
        str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        center_rewards_coefficient=centering,
    )  # fmt: skip
    trainer = TrlRewardTrainer(
        build(tiny_model, adapter=adapter), args=arguments, train_dataset=Dataset.from_list(PAIRS_OF_TOKENS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )  # fmt: skip
    expected = trainer.compute_loss(trainer.model.train(), DataCollatorForPreference(PADDING)(PAIRS_OF_TOKENS))
    expected.backward()
    model = build(tiny_model, adapter=adapter)
    section = PreferenceSection(loss="reward", center_rewards_coefficient=centering)
    loss, metrics = evaluate(model, pack(PAIRS_OF_TOKENS), section)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics.pop("loss") == pytest.approx(expected.item(), rel=1e-5)
    for name, value in metrics.items():
        assert value == pytest.approx(trainer._metrics["train"][name][0], rel=1e-5, abs=1e-5), name
    assert_same_gradients(model, trainer.model)


def test_packed_pairs_equal_one_pair_at_a_time(tiny_model: Path) -> None:
    """With the step's number of pairs as divisor, which accumulation shares."""
    section = PreferenceSection(loss="reward", center_rewards_coefficient=0.1)
    packed, alone = (build(tiny_model, adapter=False) for _ in range(2))
    loss, _ = evaluate(packed, pack(PAIRS_OF_TOKENS), section)
    loss.backward()
    divisors = torch.tensor([len(PAIRS_OF_TOKENS), 1])
    parts = [evaluate(alone, pack([pair]), section, divisors)[0] for pair in PAIRS_OF_TOKENS]
    for part in parts:
        part.backward()
    assert sum(part.item() for part in parts) == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(packed, alone)


# Runs

STEPS = 6


def write_pairs(path: Path, seed: int, rows: int) -> Path:
    """Write pairs: the chosen answers speak of rivers, the rejected ones of stones."""
    rng = random.Random(seed)
    text = lambda count: " ".join(rng.choice(WORDS.split()) for _ in range(count))  # noqa: E731
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            row = {"system": text(rng.randint(1, 9)), "prompt": text(rng.randint(1, 9))}
            answers = {name: " ".join([word] * rng.randint(1, 9)) for name, word in
                       (("chosen", "river"), ("rejected", "stone"))}  # fmt: skip
            lines.write(json.dumps(row | answers) + "\n")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return write_pairs(folder / "train.jsonl", 5, 32), write_pairs(folder / "validation.jsonl", 6, 8)


def write_recipe(folder: Path, model: Path, files: tuple[Path, Path], **sections: Any) -> Path:
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "chat": {"template": "chatml"},
        "data": {
            "sources": [{"path": str(files[0])}], "validation": [{"path": str(files[1])}], "max_length": 64,
            "cache_dir": str(folder / "cache"),
        },
        "preference": {"loss": "reward"},
        "training": {
            "bf16": False, "gradient_checkpointing": False, "learning_rate": 2e-3, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "max_steps": STEPS, "logging_steps": 1, "eval_strategy": "steps",
            "eval_steps": 3, "eval_on_start": True, "save_strategy": "steps", "save_steps": 2,
        },
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | sections), encoding="utf-8")
    return path


KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapter": {"r": 4}}}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, files: tuple[Path, Path]
) -> Callable[[str], Path]:
    """Return a function that trains a kind of run once, and returns its output_dir."""
    folders: dict[str, Path] = {}

    def train(kind: str) -> Path:
        if kind not in folders:
            folder = folders[kind] = tmp_path_factory.mktemp("trained")
            assert main(["--recipe", str(write_recipe(folder, tiny_model, files, **KINDS[kind]))]) == 0
        return folders[kind] / "run"

    return train


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_the_pairs_and_plain_transformers_gives_its_rewards(
    kind: str, trained: Callable[[str], Path], files: tuple[Path, Path]
) -> None:
    run = trained(kind)
    evaluations = read_evaluations(run)
    assert [line["step"] for line in evaluations] == [0, 3, STEPS]
    assert evaluations[-1]["eval_loss"] < evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[-1]["eval_accuracy"] > 0.9
    assert not (run / "generation_config.json").exists()

    kind_of_model = AutoPeftModelForSequenceClassification if kind == "lora" else AutoModelForSequenceClassification
    model = kind_of_model.from_pretrained(run, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    texts = []
    for line in files[1].read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}]
        for answer in ("chosen", "rejected"):
            messages = [*prompt, {"role": "assistant", "content": row[answer]}]
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts])
        model.config.pad_token_id = tokenizer.pad_token_id  # an adapter's base may have none
        for side in "left", "right":
            padded = model(**tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")).logits[:, 0]
            torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)
    margins = alone[0::2] - alone[1::2]
    assert evaluations[-1]["eval_margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert evaluations[-1]["eval_mean_reward"] == pytest.approx(alone.mean().item(), rel=1e-4, abs=1e-5)
    assert evaluations[-1]["eval_accuracy"] == (margins > 0).float().mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    kind: str, trained: Callable[[str], Path], tiny_model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    expected = trained(kind)
    recipe = write_recipe(tmp_path, tiny_model, files, **KINDS[kind])
    shutil.copytree(expected / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    assert main(["--recipe", str(recipe)]) == 0
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    weights, others = load_file(tmp_path / "run" / name), load_file(expected / name)
    assert any("score" in key for key in weights)
    assert weights.keys() == others.keys()
    assert [key for key in weights if not torch.equal(weights[key], others[key])] == []


def test_a_new_head_comes_from_the_seed_and_a_reward_model_is_trained_on(
    trained: Callable[[str], Path],
    tiny_model: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from train.model.load import load_model
    from train.recipe import load_recipe

    model = load_model(load_recipe(write_recipe(tmp_path, tiny_model, files), ["seed=9"]))
    torch.manual_seed(9)
    with suppress_seqcls_warning():
        expected = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    torch.testing.assert_close(model.score.weight, expected.score.weight, rtol=0, atol=0)

    before = read_evaluations(trained("full"))[-1]
    capsys.readouterr()
    assert main(["--recipe", str(write_recipe(tmp_path, trained("full"), files))]) == 0
    after = read_evaluations(tmp_path / "run")[0]
    for name in ("eval_loss", "eval_margin", "eval_mean_reward"):
        assert after[name] == pytest.approx(before[name], rel=1e-5)
    output = capsys.readouterr()
    assert "LOAD REPORT" not in output.out + output.err + caplog.text
    assert "packed documents are isolated" in output.out


def test_a_check_reports_and_plans_a_reward_model(
    tiny_model: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model, files)
    assert main(["--recipe", str(recipe), "--check", "--gpus", "1x80GB"]) == 0
    assert "reward" in capsys.readouterr().out
    assert main(["--recipe", str(recipe), "--check", "adapter={r: 4}"]) == 0


def test_a_finished_run_is_found_again_and_its_files_are_written_again(
    trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("full")
    command = ["--recipe", str(run.parent / "recipe.yaml")]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "already finished" in output
    assert "missing" not in output
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").unlink()
    assert main(command) == 0
    assert "config.json is missing" in capsys.readouterr().out
    assert side_files.main([str(run)]) == 0
    written = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert written == config | {"use_cache": written["use_cache"]}  # training switches it off


def test_an_adapter_is_not_merged_without_its_head(trained: Callable[[str], Path], tiny_model: Path) -> None:
    with pytest.raises(UserError, match="adapter of a reward model"):
        merge_adapter(tiny_model, trained("lora"), trained("lora") / "merged")


def test_supervised_training_refuses_a_reward_model_and_reward_training_a_classifier(
    trained: Callable[[str], Path], tiny_model: Path, files: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    for folder, overrides, error in (
        (trained("full"), ["preference={loss: dpo}"], "so the layer that predicts tokens would be random"),
        (tmp_path / "labels", [], "is a classifier with 3 labels, and a reward model has one"),
    ):
        if not folder.exists():
            with suppress_seqcls_warning():
                AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(folder)
            AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        recipe = write_recipe(tmp_path / "recipe", folder, files)
        assert main(["--recipe", str(recipe), *overrides]) == 2
        assert error in " ".join(capsys.readouterr().err.split())
