"""Gradients on their way between two ranks: the dtype and the number of elements that each configuration reduces."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import launch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

MICRO_BATCHES, STEPS = 3, 2
SMALL = 8
"""Elements; more than norms, flags and counts of a step have."""


def count_reductions(report: str, *arguments: str) -> int:
    """Run train/sft.py; write the number of elements that were reduced while it trained, by dtype."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from train.loop.trainer import JanusTrainer
    from train.sft import main

    elements: Counter[str] = Counter()

    class Reductions(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.name() in ("c10d::allreduce_", "c10d::_reduce_scatter_base_"):
                tensors = args[0] if isinstance(args[0], list) else [args[1]]  # reduce_scatter: the output, the input
                for tensor in tensors:
                    if tensor.numel() > SMALL:
                        elements[str(tensor.dtype)] += tensor.numel()
            return op(*args, **(kwargs or {}))

    training_step = JanusTrainer.training_step

    def recorded_step(self: JanusTrainer, *inputs: Any, **keywords: Any) -> torch.Tensor:
        with Reductions():
            return training_step(self, *inputs, **keywords)

    JanusTrainer.training_step = recorded_step
    code = main(list(arguments))
    Path(f"{report}-{os.environ['RANK']}.json").write_text(json.dumps(elements))
    return code


@pytest.mark.parametrize(
    ("config", "dtype", "times"),
    [
        (None, "float32", STEPS),  # DDP: in the dtype of the weights, which full fine-tuning holds in float32
        ("zero1.yaml", "float32", STEPS),
        ("zero2.yaml", "bfloat16", STEPS * MICRO_BATCHES),
        ("zero3.yaml", "bfloat16", STEPS * MICRO_BATCHES),
    ],
)
def test_gradients_are_reduced_in_the_dtype_that_the_readme_states(
    config: str | None, dtype: str, times: int, recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    recipe = recipe_file(
        model={"dtype": "bfloat16" if config else "float32"},
        training={
            **{"bf16": True, "gradient_accumulation_steps": MICRO_BATCHES, "per_device_train_batch_size": 1},
            **{"num_train_epochs": ..., "max_steps": STEPS},
        },
    )
    report, logs = tmp_path / "reductions", tmp_path / "logs"
    launch(2, config, report, "--recipe", recipe, job=count_reductions, logs=logs).succeeded()
    parameters = sum(weight.numel() for weight in load_file(tiny_model / "model.safetensors").values())
    for rank in (0, 1):
        reduced = json.loads(Path(f"{report}-{rank}.json").read_text())
        assert reduced == {f"torch.{dtype}": pytest.approx(times * parameters, rel=0.01)}  # shares are padded
