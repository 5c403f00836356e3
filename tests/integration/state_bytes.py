"""DeepSpeed's memory: train a recipe as train/sft.py does, and write the bytes that each rank holds.

Counted on the tensors of DeepSpeed's engine in two steps of two micro-batches, and not computed from a formula.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from live_bytes import LiveBytes, bytes_of


def partitions_of_gradients(optimizer) -> Iterator[torch.Tensor | None]:
    """Yield the gradients that DeepSpeed keeps beside those of the parameters, for each of its optimizers."""
    yield getattr(optimizer, "grad_partitions_flat_buffer", None)  # stage 3
    yield getattr(optimizer, "grads_in_partition", None)  # stages 1 and 2, in the weights' dtype
    yield from getattr(optimizer, "fp32_groups_gradients_flat", ())  # BF16_Optimizer
    for kept in "averaged_gradients", "all_grad_tensors":  # stages 1 and 2
        for group in getattr(optimizer, kept, {}).values():
            yield from group or ()
    yield from (tensor.grad for tensor in masters_of(optimizer))  # offloaded


def gradients_of(engine) -> list[torch.Tensor]:
    """Return all gradients except those being reduced: in buckets, and from stage 2 on with the parameters."""
    buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
    buffers = [tensor for bucket in buckets for tensor in (bucket.buffer if isinstance(bucket.buffer, list) else ())]
    of_buckets = {tensor.untyped_storage().data_ptr() for tensor in buffers}
    gradients = list(partitions_of_gradients(engine.optimizer))
    if engine.zero_optimization_stage() == 1:
        gradients += [tensor.grad for tensor in engine.module.parameters()]
    return [
        tensor for tensor in gradients if tensor is not None and tensor.untyped_storage().data_ptr() not in of_buckets
    ]


def masters_of(optimizer) -> list[torch.Tensor]:
    for name in "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition":
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise AssertionError(f"no masters in {type(optimizer).__name__}")


class Measurement:
    """Measurement of one rank, attached to its engine; each number is a maximum."""

    def __init__(self, engine) -> None:
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        self.engine = engine
        self.gradients = self._grew = self._steps = 0
        self._around(engine.optimizer, "step", self._see_step)
        if isinstance(engine.optimizer, BF16_Optimizer):
            self._around(engine, "allreduce_gradients", self._see_growth)
        elif engine.zero_optimization_stage() < 3:
            self._around(engine.optimizer, "_release_ipg_buffers", self._see_gradients_before)
            self._around(engine.optimizer, "copy_grads_in_partition", self._see_gradients_after)

    @staticmethod
    def _around(owner, name: str, measured: Callable[[Callable[[], None]], None]) -> None:
        then = getattr(owner, name)
        setattr(owner, name, lambda *arguments, **keywords: measured(lambda: then(*arguments, **keywords)))

    def _see_gradients_before(self, then: Callable[[], None]) -> None:
        self.see_gradients()
        then()

    def _see_gradients_after(self, then: Callable[[], None]) -> None:
        then()
        self.see_gradients()

    def _see_step(self, then: Callable[[], None]) -> None:
        self._see_growth(then)
        self._steps += 1

    def _see_growth(self, then: Callable[[], None]) -> None:
        self.see_gradients()
        held = gradients_of(self.engine)
        at_start, live = (
            bytes_of(held),
            LiveBytes([*held, *(tensor.data for tensor in self.engine.module.parameters())]),
        )
        del held
        with live:
            then()
        if self._steps:  # the first one makes the optimizer's states
            self._grew = max(self._grew, at_start + live.peak)

    def see_gradients(self) -> None:
        self.gradients = max(self.gradients, bytes_of(gradients_of(self.engine)))

    def parts(self) -> dict[str, int | str]:
        """Return bytes by part. `grew`: maximum of gradients plus allocations of their reduction and of a step."""
        engine = self.engine
        optimizer, parameters = engine.optimizer, list(engine.module.parameters())
        states = optimizer.optimizer.state.values()
        masters = masters_of(optimizer)
        parts = {
            "kind": type(optimizer).__name__,
            "states": bytes_of(value for state in states for value in state.values() if torch.is_tensor(value)),
            "gradients": self.gradients,
            "grew": self._grew,
        }
        if engine.zero_optimization_stage() == 3:
            parts["partitions"] = bytes_of(tensor.ds_tensor for tensor in parameters)
            parts["persistent"] = bytes_of(tensor.data for tensor in parameters if tensor.ds_persist)
            shared = {tensor.ds_tensor.untyped_storage().data_ptr() for tensor in parameters}
            parts["masters"] = bytes_of(
                tensor for tensor in masters if tensor.untyped_storage().data_ptr() not in shared
            )
        else:
            parts["weights"] = bytes_of(tensor.data for tensor in parameters)
            parts["masters"] = bytes_of(masters)
        return parts


def train_and_measure(folder: str, *arguments: str) -> int:
    """Run train/sft.py with `arguments` and write FOLDER/RANK.json. torch's AdamW uses foreach as on a GPU."""
    from train.loop.trainer import JanusTrainer
    from train.sft import main

    measurements = []
    training_step = JanusTrainer.training_step

    def measured_step(self: JanusTrainer, *inputs, **keywords):
        engine = self.model_wrapped
        if not measurements:
            measurements.append(Measurement(engine))
            for group in engine.optimizer.optimizer.param_groups:
                group["foreach"] = not group.get("fused")
        loss = training_step(self, *inputs, **keywords)
        measurements[0].see_gradients()
        return loss

    JanusTrainer.training_step = measured_step
    code = main(list(arguments))
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(measurements[0].parts()))
    return code
