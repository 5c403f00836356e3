"""Trains a recipe as train/sft.py does, and writes the bytes that DeepSpeed holds on each rank after a step.

    accelerate launch ... tests/integration/state_bytes.py FOLDER --recipe FILE

Counted on the tensors of DeepSpeed's engine; nothing here knows a formula.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from train.loop import trainer as loop
from train.sft import main


def bytes_of(tensors) -> int:
    """Bytes of the storages behind the tensors, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure(engine) -> dict[str, int]:
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    states = optimizer.optimizer.state.values()
    found = {"states": bytes_of(value for state in states for value in state.values() if torch.is_tensor(value))}
    if engine.zero_optimization_stage() == 3:
        found["partitions"] = bytes_of(one.ds_tensor for one in parameters)
        found["persistent"] = bytes_of(one.data for one in parameters if one.ds_persist)
        found["gradients"] = bytes_of([optimizer.grad_partitions_flat_buffer])
        masters = optimizer.fp32_partitioned_groups_flat
        shared = {one.ds_tensor.untyped_storage().data_ptr() for one in parameters}
        found["masters"] = bytes_of(one for one in masters if one.untyped_storage().data_ptr() not in shared)
    else:
        found["weights"] = bytes_of(one.data for one in parameters)
        found["masters"] = bytes_of(optimizer.single_partition_of_fp32_groups)
    return found


class Measure(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        file = folder / f"{args.process_index}.json"
        file.write_text(json.dumps(measure(trainer.model_wrapped)))


class MeasuredTrainer(loop.JanusTrainer):
    def __init__(self, *arguments) -> None:
        global trainer
        trainer = self
        super().__init__(*arguments)
        self.add_callback(Measure())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    loop.JanusTrainer = MeasuredTrainer
    sys.exit(main(sys.argv[2:]))
