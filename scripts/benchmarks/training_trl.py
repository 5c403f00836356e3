"""The TRL baseline of `benchmark.py train`: SFTTrainer with its defaults, in a process of its own.

    python -m benchmarks.training_trl '{"recipe": "recipe.yaml", "rows": "rows.jsonl", "dtype": "bfloat16", ...}'

Writes metrics.jsonl under the keys of train/sft.py, and settings.json with the settings that TRL chose.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from train.model.adapters import lora_config
from train.model.architecture import inspect_architecture
from train.model.flops import count_training_flops
from train.recipe import load_recipe
from train.warning_filters import filter_known_warnings


class StepTimer(TrainerCallback):
    """Writer of one metrics line per step; a step ends when the device has finished all of its work."""

    def __init__(self, folder: Path, architecture: Any) -> None:
        """Write to metrics.jsonl in `folder`."""
        self.file = folder / "metrics.jsonl"
        self.architecture = architecture
        self.inputs: dict[str, torch.Tensor] = {}
        self.loss = torch.zeros(())
        self.began = 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of the first step."""
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the step's metrics, and start the clock of the next one."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        positions = self.inputs["position_ids"].flatten().cpu().numpy()
        documents = np.diff(np.flatnonzero(positions == 0), append=positions.size)
        trained_tokens = int((self.inputs["labels"] >= 0).sum())
        metrics = {
            "step": state.global_step,
            "loss": float(self.loss),
            "seconds_per_step": seconds,
            "tokens_per_second": positions.size / seconds,
            "trained_tokens_per_second_per_gpu": trained_tokens / seconds,
            "documents": documents.tolist(),
            "flops": count_training_flops(self.architecture, documents).total,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        }
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(metrics) + "\n")
        self.began = time.perf_counter()


class TimedTrainer(SFTTrainer):
    """SFTTrainer that hands the inputs and the loss of each step to its timer."""

    timer: StepTimer

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train as SFTTrainer does."""
        self.timer.inputs = {name: inputs[name] for name in ("labels", "position_ids")}
        self.timer.loss = super().training_step(model, inputs, *args, **kwargs)
        return self.timer.loss


def chosen_settings(trainer: SFTTrainer) -> dict[str, Any]:
    """Return the settings that the trainer runs with."""
    arguments, model = trainer.args, trainer.model
    return {
        "attention": model.config._attn_implementation,
        "checkpointing": "full" if arguments.gradient_checkpointing else "none",
        "liger": "on" if arguments.use_liger_kernel else "off",
        "compile": "on" if arguments.torch_compile else "off",
        "optim": str(getattr(arguments.optim, "value", arguments.optim)),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "logging_steps": arguments.logging_steps,
    }


def main() -> None:
    """Train the steps of the task in the first argument. Its recipe names model, batch, steps and adapter."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    task = json.loads(sys.argv[1])
    recipe = load_recipe(Path(task["recipe"]))
    folder, model = Path(task["folder"]), recipe.model.name_or_path
    timer = StepTimer(folder, inspect_architecture(recipe, AutoConfig.from_pretrained(model)))
    arguments = SFTConfig(
        output_dir=str(folder),
        model_init_kwargs={"dtype": task["dtype"]},
        assistant_only_loss=True,
        packing=True,
        max_length=recipe.data.max_length,
        per_device_train_batch_size=recipe.training["per_device_train_batch_size"],
        max_steps=recipe.training["max_steps"],
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    )
    trainer = TimedTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=task["rows"], split="train"),
        peft_config=lora_config(recipe.adapter),
        callbacks=[timer],
    )
    trainer.timer = timer
    (folder / "settings.json").write_text(json.dumps(chosen_settings(trainer)), encoding="utf-8")
    trainer.train()


if __name__ == "__main__":
    main()
