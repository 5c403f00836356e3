"""Losses, gradients and metrics of packed pairs against TRL's trainers on the same pairs, padded, in float32."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from train.loop.batch_info import BATCH_INFO
from train.loop.loss import score_labels
from train.loop.preference.losses import compute_losses, step_loss
from train.loop.preference.pairs import DOCUMENTS, PAIR_METRICS, PAIRS, PairCollator, score_answers, sum_pairs
from train.recipe.preference import PreferenceSection

PROMPT, CHOSEN, REJECTED = "prompt_ids", "chosen_ids", "rejected_ids"
Pair = dict[str, list[int]]

DPO = [
    {"beta": 0.1},
    {"beta": 0.01},
    {"beta": 1.0},
    {"loss_type": ["hinge"], "beta": 0.5},
    {"loss_type": ["ipo"]},
    {"loss_type": ["robust"], "label_smoothing": 0.2, "beta": 0.3},
    {"loss_type": ["apo_zero"]},
    {"loss_type": ["apo_down"], "beta": 0.4},
    {"loss_type": ["sigmoid_norm"], "beta": 1.0},
    {"loss_type": ["sft"]},
    {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.8, 0.1, 0.5], "beta": 0.2},
]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Return pairs of random tokens, of very different lengths."""
    rng = random.Random(3)
    draw = lambda count: [rng.randrange(3, 250) for _ in range(count)]  # noqa: E731
    lengths = [(7, 5, 9), (3, 10, 2), (12, 1, 1), (1, 6, 12), (20, 8, 4)]
    return [{PROMPT: draw(a), CHOSEN: draw(b), REJECTED: draw(c)} for a, b, c in lengths]


def build(folder: Path, *, adapter: bool = False, moved: float = 0.0) -> Any:
    """Return the model; with `moved`, away from the saved one at random."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += moved * torch.randn(parameter.shape, generator=generator)
    return model.train()


def pack(pairs: list[Pair], *, trained: str = "answers") -> dict[str, Any]:
    """Return all pairs as one packed batch. `trained`: the answers, or all tokens."""
    item: dict[str, Any] = {"input_ids": [], "labels": [], "seq_lengths": [], PAIRS: range(len(pairs)), "sequence": 0}
    for pair in pairs:
        for answer in (CHOSEN, REJECTED):
            ids = pair[PROMPT] + pair[answer]
            item["input_ids"] += ids
            item["labels"] += ids if trained == "all" else [-100] * len(pair[PROMPT]) + pair[answer]
            item["seq_lengths"].append(len(ids))
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return PairCollator(collate)([item])


def evaluate(
    model: Any, batch: dict[str, Any], section: PreferenceSection, reference: torch.Tensor | None, divisors: Any = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return our loss and metrics of a batch."""
    batch = dict(batch)
    numbers, documents = batch.pop(PAIRS), batch.pop(DOCUMENTS)
    batch.pop(BATCH_INFO)
    outputs = score_labels(model, model, batch)
    scores = score_answers(outputs, documents, len(numbers))
    losses = compute_losses(section, scores, None if reference is None else reference[numbers])
    sums = sum_pairs(outputs, documents, scores, losses)
    return step_loss(losses, scores, divisors), PAIR_METRICS.means(sums.tolist())


def fused(model: Any) -> Any:
    add_fused_lm_head(getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model,
                      outputs=("log_probs", "entropy", "is_top1"))  # fmt: skip
    return model


def reference_of(model: Any, pairs: list[Pair]) -> torch.Tensor:
    """Return the log-probabilities of both answers of each pair, one document at a time from all logits: [pairs, 2]."""
    rows = []
    for pair in pairs:
        for answer in (CHOSEN, REJECTED):
            ids = torch.tensor([pair[PROMPT] + pair[answer]])
            with torch.no_grad():
                log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            rows.append(log_probs.gather(1, ids[0, 1:, None])[len(pair[PROMPT]) - 1 :].sum())
    return torch.stack(rows).reshape(-1, 2)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.fixture(scope="module")
def dpo_trainer(tiny_model: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    folder = tmp_path_factory.mktemp("dpo")

    def make(model: Any, **settings: Any) -> DPOTrainer:
        arguments = DPOConfig(
            str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", **settings
        )
        return DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)

    return make


@pytest.mark.parametrize(
    ("settings", "adapter"),
    [*((settings, False) for settings in DPO), *((settings, True) for settings in (DPO[0], DPO[2], DPO[-1]))],
    ids=str,
)
def test_dpo_equals_trl(
    settings: dict[str, Any], adapter: bool, tiny_model: Path, pairs: list[Pair], dpo_trainer: Callable[..., Any]
) -> None:
    trainer = dpo_trainer(build(tiny_model, adapter=adapter), **settings)
    moved = build(tiny_model, adapter=adapter, moved=0.02)
    trainer.model.load_state_dict(moved.state_dict(), strict=False)  # its reference stays at the start
    batch = DataCollatorForPreference(pad_token_id=0)(pairs)
    expected = trainer._compute_loss(trainer.model.train(), batch, return_outputs=False)
    expected.backward()

    reference = reference_of(build(tiny_model), pairs)
    model, section = fused(moved), PreferenceSection(loss="dpo", **settings)
    loss, metrics = evaluate(model, pack(pairs), section, reference)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    assert metrics.pop("loss") == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    for name, value in metrics.items():
        assert value == pytest.approx(trainer._metrics["train"][name][0], rel=1e-5, abs=1e-5), name
    assert_same_gradients(gradients(model), gradients(trainer.model))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_orpo_equals_trl(beta: float, tiny_model: Path, pairs: list[Pair], tmp_path: Path) -> None:
    """On pairs of which all tokens are trained: TRL's negative log-likelihood covers the prompt, ours does not."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    arguments = ORPOConfig(
        str(tmp_path), beta=beta, use_cpu=True, bf16=False, report_to="none", max_length=64,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    model = build(tiny_model)
    trainer = ORPOTrainer(copy.deepcopy(model), args=arguments, train_dataset=rows, processing_class=tokenizer)
    batch: dict[str, Any] = {}
    for name, answer in (("chosen", CHOSEN), ("rejected", REJECTED)):
        ids = [torch.tensor(pair[PROMPT] + pair[answer]) for pair in pairs]
        pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, True, value)  # noqa: E731
        batch |= {
            f"{name}_input_ids": pad(ids, 0),
            f"{name}_labels": pad(ids, -100),
            f"{name}_attention_mask": pad([torch.ones_like(row) for row in ids], 0),
        }
    expected, theirs = trainer.get_batch_loss_metrics(trainer.model.train(), batch)
    expected.backward()

    section = PreferenceSection(loss="orpo", beta=beta)
    loss, metrics = evaluate(fused(model), pack(pairs, trained="all"), section, None)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert metrics[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert_same_gradients(gradients(model), gradients(trainer.model))


@pytest.mark.parametrize(
    "settings",
    [{"loss": "orpo"}, *({"loss": "dpo", **settings} for settings in DPO[-2:])],
    ids=["orpo", "sft", "sigmoid, ipo and sft"],
)
def test_packed_pairs_equal_one_pair_at_a_time(settings: dict[str, Any], tiny_model: Path, pairs: list[Pair]) -> None:
    """With the step's numbers of pairs and of chosen tokens as divisors, which accumulation shares."""
    section, reference = PreferenceSection(**settings), reference_of(build(tiny_model), pairs)
    packed, alone = (fused(build(tiny_model, moved=0.02)) for _ in range(2))
    loss, _ = evaluate(packed, pack(pairs), section, reference)
    loss.backward()
    divisors = torch.tensor([len(pairs), sum(len(pair[CHOSEN]) for pair in pairs)])
    parts = []
    for number, pair in enumerate(pairs):
        part, _ = evaluate(alone, pack([pair]), section, reference[[number]], divisors)
        part.backward()
        parts.append(part.item())
    assert sum(parts) == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients(packed), gradients(alone))


def test_pairs_without_labels_do_not_count(tiny_model: Path, pairs: list[Pair]) -> None:
    """They fill the last batches of an evaluation."""
    model, reference = fused(build(tiny_model, moved=0.02)), reference_of(build(tiny_model), pairs)
    unlabelled = pack(pairs)
    starts = [0, *unlabelled[BATCH_INFO].documents.cumsum().tolist()]
    unlabelled["labels"][0, starts[4] :] = -100
    for section in (PreferenceSection(loss="orpo"), PreferenceSection(loss="dpo", loss_type=["sigmoid", "sft"])):
        loss, metrics = evaluate(model, unlabelled, section, reference)
        expected, expected_metrics = evaluate(model, pack(pairs[:2]), section, reference[:2])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)
        unlabelled_alone = {**unlabelled, "labels": torch.full_like(unlabelled["labels"], -100)}
        loss, metrics = evaluate(model, unlabelled_alone, section, reference)
        assert (loss.item(), metrics) == (0, {})
