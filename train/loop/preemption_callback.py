"""Preemption in the training loop: all processes agree to stop, at a step or inside an evaluation."""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.loop.preemption import Preemption


class EvaluationStoppedError(Exception):
    """An evaluation is abandoned because the run has to stop."""


class PreemptionCallback(TrainerCallback):
    """Makes a run save and stop if any of its processes is asked to."""

    def __init__(self, preemption: Preemption, accelerator: Accelerator) -> None:
        self._preemption, self._accelerator = preemption, accelerator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that there is something to save from here on."""
        self._preemption.step, self._preemption.training = state.global_step, True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that nothing is lost any more: all is in the last checkpoint or in the finished model."""
        self._preemption.training = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop here; at the end of an epoch, after what is due then. The last step ends the run anyway."""
        self._preemption.step = state.global_step
        if self._preemption.requested_on_any_rank and state.global_step < state.max_steps:
            self._preemption.agree()
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Skip what is due at the end of an epoch if the epoch was interrupted."""
        if self._preemption.reason and state.epoch is not None and state.epoch != int(state.epoch):
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._preemption.reason:
            control.should_save = control.should_training_stop = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Abandon an evaluation: raises EvaluationStoppedError on all processes at the same batch."""
        requested = torch.tensor(float(self._preemption.is_requested()), device=self._accelerator.device)
        if self._accelerator.reduce(requested).item() and state.global_step < state.max_steps:
            self._preemption.agree()
            raise EvaluationStoppedError
