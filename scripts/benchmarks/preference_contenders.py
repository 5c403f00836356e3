"""Contenders of `benchmark.py preference`: DPO over an epoch of the same pairs, one training per process.

    python -m benchmarks.preference_contenders '{"contender": "ours", "rows_file": "pairs.jsonl", ...}'

Ours is the trainer of train/finetune.py with recipes/janus-7b/preference/dpo.yaml, TRL's is DPOTrainer. Both start from
the same float32 weights and train without gradient checkpointing. Writes result.json into the task's folder.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.data_contenders import Clock
from benchmarks.training_inputs import OTHER_OPTIMIZER
from benchmarks.training_steps import StepClock, Steps
from train.cli import print_error
from train.data.chat.template import without_generation_marks
from train.data.loss_mask import NOT_TRAINED
from train.data.prepare import prepare
from train.errors import UserError
from train.loop.arguments import training_arguments
from train.loop.checkpoint.fingerprint import data_fingerprint
from train.loop.preference.trainer import PreferenceTrainer
from train.model.cpu_memory import keep_freed_memory
from train.model.load import disable_bars_in_logs, load_model
from train.model.tokenizer import load_chat_tokenizer
from train.recipe import load_recipe
from train.warning_filters import filter_known_warnings

RECIPE = Path(__file__).parents[2] / "recipes" / "janus-7b" / "preference" / "dpo.yaml"

Task = dict[str, Any]
"""Settings of the benchmark; contender, rows_file, model (a folder) and folder."""


@dataclass
class Training:
    """Times of a training, and its micro-batches: the optimizer step of each, its inputs and its share of the loss."""

    steps: Steps = field(default_factory=Steps)
    reference: Clock = field(default_factory=Clock)
    batches: list[tuple[int, dict[str, torch.Tensor], torch.Tensor]] = field(default_factory=list)

    def add(self, step: int, inputs: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Note a micro-batch: references to its tensors, which are read after the training."""
        self.batches.append((step, {**inputs}, loss.detach()))


def ours(task: Task, training: Training) -> Any:
    """Return the trainer of train/finetune.py."""

    class Timed(PreferenceTrainer):
        def _load_reference(self) -> None:
            with training.reference.running():
                super()._load_reference()

        def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            batch = dict(inputs)
            loss = super().training_step(model, inputs, *args, **kwargs)
            training.add(self.state.global_step, batch, loss)
            return loss

    folder = Path(task["folder"])
    overrides = {
        "model.name_or_path": task["model"],
        "model.dtype": "float32",
        "data.sources": [{"path": task["rows_file"]}],
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": task["max_length"],
        "data.validation": None,
        "training.bf16": False,
        "training.gradient_checkpointing": False,
        "training.gradient_accumulation_steps": task["sequences_per_step"],
        "training.num_train_epochs": task["epochs"],
        "training.learning_rate": task["learning_rate"],
        "training.optim": OTHER_OPTIMIZER,
        "training.eval_strategy": "no",
        "training.save_strategy": "no",
        "tracking.wandb": None,
        "output_dir": str(folder / "run"),
        "seed": task["seed"],
    }
    recipe = load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    tokenizer, _, _ = load_chat_tokenizer(recipe.model, recipe.chat)
    data = prepare(recipe, tokenizer)
    facts = data_fingerprint(data, tokenizer)
    arguments = training_arguments(recipe)
    if arguments.use_cpu:
        keep_freed_memory()
    tokenizer.chat_template = without_generation_marks(tokenizer.chat_template)
    Path(recipe.output_dir).mkdir(parents=True)
    callbacks: list[TrainerCallback] = [StepClock(training.steps)]
    return Timed(recipe, arguments, load_model(recipe), tokenizer, data, callbacks, about=facts)


def trl(task: Task, training: Training) -> Any:
    """Return TRL's trainer with its defaults, except for what both have in common."""

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            with training.reference.running():
                return super()._precompute_ref_logps(*args, **kwargs)

        def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            training.add(self.state.global_step, inputs, loss)
            return loss

    batch = 1 if task["contender"] == "trl-single" else task["batch"]
    arguments = DPOConfig(
        output_dir=str(Path(task["folder"], "run")),
        precompute_ref_log_probs=task["contender"] != "trl-beside",
        beta=load_recipe(RECIPE).preference.beta,  # type: ignore[union-attr]
        max_length=task["max_length"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=max(1, task["pairs_per_step"] // batch),
        num_train_epochs=task["epochs"],
        learning_rate=task["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=10,
        optim=OTHER_OPTIMIZER,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        seed=task["seed"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Timed(
        model=task["model"],
        args=arguments,
        train_dataset=load_dataset("json", data_files=task["rows_file"], split="train"),
        callbacks=[StepClock(training.steps)],
    )


def documents(batch: Mapping[str, torch.Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the ids and labels of each answer with its prompt: chosen, rejected, chosen, rejected, ..."""
    ids = batch["input_ids"].cpu().numpy()
    if "attention_mask" not in batch:  # packed: positions restart with each
        starts = np.flatnonzero(batch["position_ids"][0].cpu().numpy() == 0)[1:]
        return list(zip(np.split(ids[0], starts), np.split(batch["labels"][0].cpu().numpy(), starts), strict=True))
    kept, trained = (batch[name].cpu().numpy() == 1 for name in ("attention_mask", "completion_mask"))
    rows = [(row[mask], np.where(is_trained, row, NOT_TRAINED)[mask])
            for row, mask, is_trained in zip(ids, kept, trained, strict=True)]  # fmt: skip
    chosen, rejected = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return [half for pair in zip(chosen, rejected, strict=True) for half in pair]


def digests(batch: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield a digest of each pair: the ids and labels of both of its halves."""
    arrays = iter(np.concatenate(half).astype("<i4").tobytes() for half in documents(batch))
    for chosen, rejected in zip(arrays, arrays, strict=True):
        yield "-".join(blake2b(half, digest_size=8).hexdigest() for half in (chosen, rejected))


def summarize(training: Training) -> dict[str, Any]:
    """Return lists over the optimizer steps, the pairs of all steps, and the seconds of the reference.

    - `seconds`, `pairs`, `losses`.
    - `tokens`: of the pairs, without padding; `trained_tokens`: those of answers; `computed_tokens`: of the batches.
    """
    names = ("pairs", "losses", "tokens", "trained_tokens", "computed_tokens")
    result: dict[str, Any] = {name: [0] * len(training.steps.seconds()) for name in names}
    for step, batch, loss in training.batches:
        halves = documents(batch)
        result["pairs"][step] += len(halves) // 2
        result["losses"][step] += float(loss)
        result["tokens"][step] += sum(len(ids) for ids, _ in halves)
        result["trained_tokens"][step] += sum(int((labels != NOT_TRAINED).sum()) for _, labels in halves)
        result["computed_tokens"][step] += batch["input_ids"].numel()
    return result | {
        "seconds": training.steps.seconds(),
        "digests": sorted(digest for _, batch, _ in training.batches for digest in digests(batch)),
        "reference_seconds": training.reference.seconds,
    }


RUNS: Mapping[str, Callable[[Task, Training], Any]] = {
    "ours": ours,
    "trl": trl,
    "trl-beside": trl,
    "trl-single": trl,
}


def main() -> int:
    """Run one task and return its exit code."""
    filter_known_warnings()
    disable_bars_in_logs()
    task: Task = json.loads(sys.argv[1])
    training = Training()
    try:
        trainer = RUNS[task["contender"]](task, training)
        trainer.train()
    except UserError as error:
        print_error(error)
        return 2
    Path(task["folder"], "result.json").write_text(json.dumps(summarize(training)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
