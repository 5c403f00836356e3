"""Process that makes measurements of `benchmark.py train` one after the other, and appends a line for each to a file.

    python -m benchmarks.training_worker '{"names": ["machine", "full"], "folder": "/tmp/x", ...}'

A measurement that fails is a line with its reason. The process ends when the device is not clean again after one
(memory that is still held, or a CUDA error that stays); the next process continues with the others.
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_inputs import (
    Workload,
    fit_layers,
    model_config,
    optimizer_overrides,
    planned_bytes,
    setting_recipe,
    write_rows,
    write_tokenizer,
)
from benchmarks.training_probes import (
    describe_device,
    device,
    measure_attention,
    measure_bandwidth,
    measure_matmul,
    synchronize,
)
from benchmarks.training_settings import PROFILE, Setting, parse_setting
from benchmarks.training_steps import measure_steps, profile_step
from train.errors import UserError
from train.model.load import disable_bars_in_logs
from train.preflight.plan.activations import ActivationTracer
from train.preflight.plan.cluster import RESERVE
from train.storage.jsonl import read_json_lines
from train.warning_filters import filter_known_warnings

_TOO_MUCH = 1.1
"""Times the device's memory from which a setting is not tried; the plan may be wrong by less."""
_LEFT_OVER = 0.02
"""Share of the device's memory that may still be allocated after a measurement."""
_FIRST_GUESS = {"eager": 20.0, "compiled": 60.0}
"""Seconds of a setting until the first of its kind has run: our own estimate for a 7B on an H200."""

Line = dict[str, Any]


class Worker:
    """Measurements by name. `task`: the workload, the folder, the end of the time, and where the profile is written."""

    def __init__(self, task: dict[str, Any]) -> None:
        """Write rows and tokenizer, unless an earlier process has."""
        self.workload = Workload(**task["workload"])
        self.folder, self.trace, self.ends = Path(task["folder"]), Path(task["trace"]), task["ends"]
        self._tracers: dict[tuple[str, str], ActivationTracer] = {}
        self.results = self.folder / "results.jsonl"
        self.lines: list[Line] = read_json_lines(self.results) if self.results.exists() else []
        if not (self.folder / "model").exists():
            write_rows(self.workload, self.folder / "rows.jsonl")
            model_config(self.workload).save_pretrained(self.folder / "model")
            write_tokenizer(self.folder / "model")

    def run(self, names: list[str]) -> None:
        """Measure `names` until the device is not clean any more."""
        for name in names:
            began = time.monotonic()
            line: Line = {"name": name}
            left = self.ends - time.time()
            if left < (needed := self.expected_seconds(name)):
                line["skipped"] = f"{max(left, 0):.0f} s are left, and it takes about {needed:.0f}"
            else:
                try:
                    line |= self.measure(name)
                except UserError as error:
                    line["reason"] = str(error)
                except Exception as error:  # of compilers, kernels and drivers, which share no class
                    line["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            line["took"] = time.monotonic() - began
            self.lines.append(line)
            with self.results.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
            if not _is_clean():
                return

    def expected_seconds(self, name: str) -> float:
        """Return the longest time of such a measurement so far, and a fifth; a first guess until there is one."""
        kind = self._kind(name)
        if kind is None:
            return 0.0
        lines = [line for line in self.lines if self._kind(line["name"]) == kind]
        guess = 0.0 if device().type == "cpu" or any("seconds" in line for line in lines) else _FIRST_GUESS[kind]
        return max(guess, 1.2 * max((line["took"] for line in lines), default=0.0))

    def _kind(self, name: str) -> str | None:
        setting = self._best() if name == PROFILE else parse_setting(name)
        if setting is None:
            return None
        return "compiled" if setting.changes.get("compile") == "on" else "eager"

    def measure(self, name: str) -> Line:
        """Return the facts of one measurement. Raises whatever it fails with."""
        if name == "machine":
            facts = describe_device()
            recipe = self._recipe(Setting("largest", "full", {"checkpointing": "none"}, trl=False))
            memory = facts["memory_bytes"]
            layers = model_config(self.workload).get_text_config().num_hidden_layers
            usable = memory * (1 - RESERVE) if memory else None
            return facts | {
                "layers": fit_layers(recipe, self.workload, usable) if usable else layers,
                "of_layers": layers,
            }
        if name == "matmul":
            return measure_matmul()
        if name == "bandwidth":
            return measure_bandwidth()
        if name == PROFILE:
            best = self._best()
            facts = profile_step(self._recipe(best), self._config(), self.workload, self.trace)
            return {"setting": best.name, **facts}
        probe, _, kernel = name.partition(" ")
        if probe == "attention":
            recipe = self._recipe(Setting("attention", "full", {}, trl=False))
            return measure_attention(kernel, recipe, model_config(self.workload, layers=1))
        setting = parse_setting(name)
        assert setting is not None  # names are checked before
        return self._measure_setting(setting)

    def _measure_setting(self, setting: Setting) -> Line:
        recipe, config = self._recipe(setting), self._config()
        traces = (setting.method, recipe.model.attention)
        tracer = self._tracers.setdefault(traces, ActivationTracer(recipe, config))
        planned = None if setting.trl else planned_bytes(recipe, config, tracer)
        memory = self._machine()["memory_bytes"]
        if memory and planned and planned > _TOO_MUCH * memory:
            gib = f"{planned / 2**30:.1f} GiB of the GPU's {memory / 2**30:.1f}"
            return {"planned_bytes": planned, "reason": f"the plan is {gib}, so it is not tried"}
        line = {
            "planned_bytes": planned,
            "layers": self._machine()["layers"],
            "overrides": setting.overrides + optimizer_overrides(setting),
            "recipe": recipe.model_dump(mode="json", include={"adapter", "quantization", "training"})
            | {"model": recipe.model.model_dump(mode="json", exclude={"name_or_path"})},
        }
        try:
            return line | measure_steps(recipe, config, self.workload, trl=setting.trl)
        except torch.OutOfMemoryError as error:
            detail = " ".join(str(error).split())[:120]
            return {"planned_bytes": planned, "reason": f"out of memory: {detail}"}

    def _machine(self) -> Line:
        return next(line for line in self.lines if line["name"] == "machine")

    def _config(self) -> Any:
        return model_config(self.workload, self._machine()["layers"])

    def _recipe(self, setting: Setting) -> Any:
        return setting_recipe(setting, self.workload, self.folder, on_cpu=device().type == "cpu")

    def _best(self) -> Setting:
        """Return the fastest full fine-tuning so far, or the recipe."""
        speeds = {line["name"]: line["tokens_per_second"] for line in self.lines if "tokens_per_second" in line}
        settings = [setting for name in speeds if (setting := parse_setting(name)) and not setting.trl]
        full = [setting for setting in settings if setting.method == "full"] or settings
        return max(full, key=lambda setting: speeds[setting.name], default=Setting("full", "full", {}, trl=False))


def _is_clean() -> bool:
    """Free what a measurement has left; return whether the device works and its memory is free."""
    gc.collect()
    torch.compiler.reset()
    if not torch.cuda.is_available():
        return True
    try:
        synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        return torch.cuda.memory_allocated() < _LEFT_OVER * total
    except RuntimeError:  # after an illegal access every call fails
        return False


def main() -> None:
    """Make the measurements of the task in the first argument."""
    filter_known_warnings()
    disable_bars_in_logs()
    task = json.loads(sys.argv[1])
    Worker(task).run(task["names"])


if __name__ == "__main__":
    main()
