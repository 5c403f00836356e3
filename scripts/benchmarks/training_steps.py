"""Training steps of `benchmark.py train`: JanusTrainer and TRL's SFTTrainer under the same clock, and a profile.

Each setting gets a new model of random weights, initialized on the device: a 7B takes a second or two, where loading
it from files would take more time than its steps. From there on it is the trainer of train/finetune.py, with its data,
optimizer, metrics and guards, so that a figure is one that a run has too.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.training_inputs import Workload
from benchmarks.training_probes import device, synchronize
from train.data.chat.template import without_generation_marks
from train.data.prepare import prepare
from train.loop.arguments import training_arguments
from train.loop.throughput import TIMING_METRICS
from train.loop.trainer import JanusTrainer
from train.model.adapters import lora_config
from train.model.architecture import inspect_architecture
from train.model.attention.selection import select_attention
from train.model.float8 import convert
from train.model.flops import count_training_flops
from train.model.tokenizer import load_chat_tokenizer
from train.recipe import Recipe

_TOP_KERNELS = 15


@dataclass
class Steps:
    """Times of a training, and for each step references to its position ids and loss, which stay on the device.

    - `began`: the beginning of the training; `ends`: of the first step, then the end of each;
    - `logs`: what the trainer logged, janus-sft after each step.
    """

    began: float = 0.0
    ends: list[float] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)

    def seconds(self) -> list[float]:
        """Return the seconds of each step: from the end of the one before, so that data and logging count."""
        return np.diff(self.ends).tolist()

    def documents(self, step: int) -> np.ndarray:
        """Return the tokens of each document that a step trained."""
        positions = self.positions[step].flatten().cpu().numpy()
        return np.diff(np.flatnonzero(positions == 0), append=positions.size)


class StepClock(TrainerCallback):
    """Callback that notes the end of each step, when the device has done all of its work, and the trainer's metrics."""

    def __init__(self, steps: Steps) -> None:
        """Note the ends in `steps`; the first of them is the beginning of the first step."""
        self._steps = steps

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of the first step."""
        self._steps.ends = self._steps.ends or [time.perf_counter()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the device and note the time."""
        synchronize()
        self._steps.ends.append(time.perf_counter())

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Note the metrics."""
        self._steps.logs.append(logs)


class StepProfile(TrainerCallback):
    """Callback that profiles one step, the first after `warmup`."""

    def __init__(self, warmup: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profile = profile(activities=activities, acc_events=True)
        self.seconds = 0.0
        self._warmup = warmup

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the profile."""
        if state.global_step == self._warmup:
            synchronize()
            self.profile.start()
            self.seconds = -time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the profile once the device has done the step."""
        if state.global_step == self._warmup + 1:
            synchronize()
            self.seconds += time.perf_counter()
            self.profile.stop()


class _NotesSteps(SFTTrainer):
    """Mixin that notes position ids and loss of each step."""

    steps: Steps

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train as the trainer does."""
        self.steps.positions.append(inputs["position_ids"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.steps.losses.append(loss.detach())
        return loss


class _TimedTrl(_NotesSteps):
    pass


class TimedJanus(_NotesSteps, JanusTrainer):
    """JanusTrainer that notes its steps."""


def build_model(recipe: Recipe, config: PreTrainedConfig, attention: str | None) -> PreTrainedModel:
    """Return a model of random weights on the device. `attention`: None = transformers' choice."""
    torch.manual_seed(recipe.seed)
    with device():
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, recipe.model.dtype), attn_implementation=attention
        )
    if recipe.model.float8 is not None and attention is not None:
        convert(model, recipe.model.float8)
    return model


def build_trainer(
    recipe: Recipe,
    config: PreTrainedConfig,
    callbacks: list[TrainerCallback],
    trainer: type[TimedJanus] = TimedJanus,
) -> TimedJanus:
    """Return the trainer of train/finetune.py, of a class that notes its steps, on a model of random weights."""
    tokenizer, _, _ = load_chat_tokenizer(recipe.model, recipe.chat)
    data = prepare(recipe, tokenizer)
    tokenizer.chat_template = without_generation_marks(tokenizer.chat_template)
    attention = select_attention(recipe, config).kernel
    arguments = training_arguments(recipe)
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    model = build_model(recipe, config, attention)
    return trainer(recipe, arguments, model, tokenizer, data, callbacks)


def build_trl_trainer(recipe: Recipe, config: PreTrainedConfig, callbacks: list[TrainerCallback]) -> SFTTrainer:
    """Return TRL's trainer with its defaults, on the recipe's rows, weights, adapter, batch and number of steps."""
    tokenizer, _, _ = load_chat_tokenizer(recipe.model, recipe.chat)
    arguments = SFTConfig(
        output_dir=recipe.output_dir,
        assistant_only_loss=True,
        packing=True,
        max_length=recipe.data.max_length,
        per_device_train_batch_size=recipe.training["per_device_train_batch_size"],
        max_steps=recipe.training["max_steps"],
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return _TimedTrl(
        model=build_model(recipe, config, None),
        args=arguments,
        train_dataset=load_dataset("json", data_files=recipe.data.sources[0].path, split="train"),
        processing_class=tokenizer,
        peft_config=lora_config(recipe.adapter),
        callbacks=callbacks,
    )


def train(recipe: Recipe, config: PreTrainedConfig, *, trl: bool, callbacks: list[TrainerCallback]) -> dict[str, Any]:
    """Train, and return the steps, the attention kernel and the peak of allocated and reserved bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    steps = Steps()
    build = build_trl_trainer if trl else build_trainer
    trainer = build(recipe, config, [StepClock(steps), *callbacks])
    trainer.steps, steps.began = steps, time.perf_counter()
    trainer.train()
    optimizer = str(trainer.args.optim.value)
    line = {"attention": trainer.model.config._attn_implementation, "optimizer": optimizer, "steps": steps}
    if torch.cuda.is_available():
        line |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return line


def measure_steps(recipe: Recipe, config: PreTrainedConfig, workload: Workload, *, trl: bool) -> dict[str, Any]:
    """Return speed and peak memory of the timed steps."""
    line = train(recipe, config, trl=trl, callbacks=[])
    return summarize(line.pop("steps"), recipe, config, workload) | line


def summarize(steps: Steps, recipe: Recipe, config: PreTrainedConfig, workload: Workload) -> dict[str, Any]:
    """Return medians of the timed steps, and the seconds until they begin, in which torch compiles."""
    shape, seconds = inspect_architecture(recipe, config), steps.seconds()
    timed = range(workload.warmup, workload.warmup + workload.steps)
    documents = {step: steps.documents(step) for step in timed}
    logged = [steps.logs[step] for step in timed if len(steps.logs) > step]  # TRL logs every tenth step
    parts = [name for name in TIMING_METRICS if name.startswith("seconds_") and all(name in line for line in logged)]
    flops = {step: count_training_flops(shape, documents[step]).total for step in timed}
    return {
        "seconds": statistics.median(seconds[step] for step in timed),
        "fastest": min(seconds[step] for step in timed),
        "slowest": max(seconds[step] for step in timed),
        "start_seconds": steps.ends[workload.warmup] - steps.began,
        "tokens_per_second": statistics.median(int(documents[step].sum()) / seconds[step] for step in timed),
        "flops_per_second": statistics.median(flops[step] / seconds[step] for step in timed),
        "logged": {name: statistics.median(line[name] for line in logged) for name in parts if logged},
        "first_loss": float(steps.losses[0]),
        "last_loss": float(steps.losses[-1]),
    }


def busy_seconds(intervals: list[tuple[float, float]]) -> float:
    """Return the time in which at least one interval runs. Kernels of several streams overlap."""
    total, until = 0.0, -np.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return float(total)


def profile_step(recipe: Recipe, config: PreTrainedConfig, workload: Workload, trace: Path) -> dict[str, Any]:
    """Profile a step: the kernels that take most of it, and the share in which the device has nothing to do.

    Writes the profile to `trace`, which https://ui.perfetto.dev and chrome://tracing open.
    """
    callback = StepProfile(workload.warmup)
    train(recipe, config, trl=False, callbacks=[callback])
    callback.profile.export_chrome_trace(str(trace))
    on_gpu = torch.cuda.is_available()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU

    def is_work(event: Any) -> bool:
        return event.device_type == kind and not event.is_user_annotation

    events = filter(is_work, callback.profile.events() or [])
    busy = busy_seconds([(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events])
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = sorted(filter(is_work, callback.profile.key_averages()), key=lambda event: -getattr(event, time_of))
    top = [
        {"kernel": event.key, "seconds": getattr(event, time_of) / 1e6, "calls": event.count}
        for event in kernels[:_TOP_KERNELS]
    ]
    return {
        "seconds": callback.seconds,
        "idle_share": max(0.0, 1 - busy / callback.seconds),
        "kernels": top,
        "trace": str(trace),
    }
