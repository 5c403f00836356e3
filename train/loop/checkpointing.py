"""Trainer that writes complete checkpoints and resumes from them.

From save to resume: `_save_checkpoint` -> checkpoint/writer.py -> `_finish_save`; `begin_run`, `_load_from_checkpoint`,
`_load_optimizer_and_scheduler` and, when training begins, `_restore_run_state`.
"""

import math
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config
from transformers import TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput
from trl import SFTConfig

from train.errors import UserError
from train.loop.arguments import as_user_error
from train.loop.checkpoint.best_model import BestModel
from train.loop.checkpoint.deepspeed import (
    convert_to_universal,
    deferred_writes,
    expect_universal,
    finish_loading,
    format_of,
    is_universal,
    remove_universal,
)
from train.loop.checkpoint.fingerprint import run_fingerprint
from train.loop.checkpoint.manifest import Checkpoint, read_checkpoint
from train.loop.checkpoint.position import DataPosition
from train.loop.checkpoint.resume import as_resume_error
from train.loop.checkpoint.resumed_settings import FixedSchedule, ResumedSettings, is_wrapped
from train.loop.checkpoint.trainer_state import RunState, build_manifest, expected_files, read_run_states
from train.loop.saving import SavingTrainer
from train.ranks import is_first_rank
from train.recipe import Recipe


class CheckpointingTrainer(SavingTrainer):
    """SavingTrainer with checkpoints that are verified before they get their name, and resumed bit-identically.

    Subclasses add their figures to a checkpoint: `figures_to_save` and `load_figures`.
    """

    control: TrainerControl
    lr_scheduler: Any
    _resumed_settings: ResumedSettings | None = None
    _resume_from: Checkpoint | None = None
    """The checkpoint to resume from, until its state is restored."""
    _loaded_from = Path()
    """Its folder, or that of its universal form."""

    def __init__(self, recipe: Recipe, arguments: SFTConfig, run: Mapping[str, Any], **keywords: Any) -> None:
        """Set up TRL's trainer. `run`: fingerprint of the data; `keywords`: arguments of SFTTrainer."""
        super().__init__(recipe, arguments, **keywords)
        self._run = {**run_fingerprint(recipe), **run}
        self._best = BestModel(arguments, recipe, self._run)
        self._run_state = RunState(
            get_learning_rate=self._get_learning_rate,
            advance_schedule=self._advance_schedule,
            resume=self._restore_run_state,
        )

    @cached_property
    def _position(self) -> DataPosition:
        sharing = self._recipe.model.sequence_parallel
        return DataPosition.from_arguments(self.args, len(self.train_dataset), sharing)

    def figures_to_save(self) -> dict[str, Any]:
        """Return this process's figures since the last logging step, as JSON."""
        return {}

    def load_figures(self, states: list[Mapping[str, Any]]) -> None:
        """Restore the figures of these processes: its own, on the first rank also those of processes that are gone."""

    @property
    def is_stopping(self) -> bool:
        """Return whether the run ends with the next checkpoint."""
        return False

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder for checkpoints that are not complete yet."""
        return str(self._writer.staging_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write transformers' checkpoint and the run state; the background renames it once all of it is on the disk."""
        self._finish_save()
        step, best = self.state.global_step, self.state.best_global_step
        name, best_name = f"checkpoint-{step}", f"checkpoint-{best}" if best else None

        def write() -> None:
            # torch.save would compute a CRC32 of each tensor, which torch.load doesn't compare; the manifest has hashes
            with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                super(CheckpointingTrainer, self)._save_checkpoint(model, trial)
            folder = self._writer.staging_dir / name
            if best_name and (best == step or Path(self.args.output_dir, best_name).is_dir()):
                # transformers records the path in the staging folder
                self.state.best_model_checkpoint = str(Path(self.args.output_dir, best_name))
                if self.args.should_save:
                    self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            figures = {
                "loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged, **self.figures_to_save()
            }  # fmt: skip
            self._run_state.write(folder, self.args.process_index, figures)

        def check(folder: Path) -> None:
            if self.is_world_process_zero():
                patterns = expected_files(self.args, deepspeed=self.is_deepspeed_enabled, fsdp=self.is_fsdp_enabled)
                for pattern in patterns:
                    if not any(folder.glob(pattern)):
                        raise UserError(f"{pattern} was not written")
            self._check_weights(folder)

        def manifest() -> dict[str, Any]:
            return build_manifest(self._recipe, self._run, self.args, self.state, self._position)

        if not self._writer.save(step, write, check, manifest, best_name, stopping=self.is_stopping):
            self._best.on_save_failed(self.state, step)
            return
        if self.is_stopping:
            self._finish_save()
        if self._uploads_checkpoints or self._logs_checkpoints:
            self._writer.wait()
        if self._uploads_checkpoints and (folder := Path(self.args.output_dir, name)).is_dir():
            self._push_from_checkpoint(str(folder))

    def _finish_save(self) -> None:
        """Wait for the save that is completed in the background, if any, and note whether there is a checkpoint."""
        step = self._writer.step_under_way
        if step is None:
            return
        if self._writer.finish(stopping=self.is_stopping):
            self._best.on_saved(self.state)
        else:
            self._best.on_save_failed(self.state, step)

    @property
    def _uploads_checkpoints(self) -> bool:
        return self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END

    @property
    def _logs_checkpoints(self) -> bool:
        """Return whether transformers' callback for wandb reads each checkpoint as soon as it is saved."""
        return "wandb" in self.args.report_to and os.environ.get("WANDB_LOG_MODEL", "").lower() == "checkpoint"

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a complete checkpoint; transformers would upload its files before they are renamed."""
        if Path(checkpoint_folder).parent != self._writer.staging_dir:
            super()._push_from_checkpoint(checkpoint_folder)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return whether this is the best model: better than the best that was saved, so the last save must be over."""
        if self.args.metric_for_best_model is not None:
            self._finish_save()
        return super()._determine_best_metric(metrics, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Load the best model, if the run ends with it, once the last checkpoint is complete."""
        self._finish_save()
        return super()._finalize_training(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write transformers' files; DeepSpeed's at the end, where no process waits for another."""
        self._writer.raise_on_all_ranks(self._writer.check_room_for_small_files)
        with deferred_writes(self.model_wrapped) if self.is_deepspeed_enabled else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def begin_run(self, resume_from: Checkpoint | None) -> Path | None:
        """Set older checkpoints aside. Return the folder to load, if the run resumes."""
        self._writer.begin(resume_from)
        if resume_from is None:
            return None
        self._resume_from, self._loaded_from = resume_from, self._loadable_folder(resume_from)
        if is_universal(self._loaded_from):
            expect_universal(self.accelerator.state.deepspeed_plugin)
        self._resumed_settings = ResumedSettings(resume_from, self._recipe)
        return self._loaded_from

    def _loadable_folder(self, checkpoint: Checkpoint) -> Path:
        """Return the checkpoint's folder; that of its universal form if DeepSpeed wrote it on other processes."""
        if not self.is_deepspeed_enabled or checkpoint.manifest["processes"] == self.args.world_size:
            return checkpoint.folder
        return convert_to_universal(checkpoint, self.args.output_dir, self.args.world_size)

    def _remove_universal(self) -> None:
        """Delete universal forms once all processes have loaded them."""
        self.accelerator.wait_for_everyone()
        if is_first_rank():
            remove_universal(self.args.output_dir)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple[Any, ...]:
        """Return numbers of epochs and steps as transformers does; remaining steps are counted from those done."""
        epochs, per_epoch, *rest, max_steps = super().set_initial_training_values(args, dataloader)
        if self._resume_from:
            self._position.resume(self._resume_from, per_epoch)
        shift = self._position.shift
        if shift and args.max_steps > 0:
            epochs = math.ceil((max_steps - shift) / per_epoch)
        elif shift:
            max_steps += shift
        return epochs, per_epoch, *rest, max_steps

    def _init_training_state(self, max_steps: int, num_update_steps_per_epoch: int, *args: Any) -> tuple[int, int]:
        """Return the epochs trained, and the micro-batches trained in the current one.

        transformers keeps the checkpoint's logging_steps, eval_steps and save_steps; here those of this run apply.
        """
        position = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args)
        self.state.compute_steps(self.args, max_steps)
        shift = self._position.shift
        if not shift:
            return position
        epochs, steps = divmod(self.state.global_step - shift, num_update_steps_per_epoch)
        return epochs, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """Return transformers' schedule. Raises UserError for settings that it refuses only here."""
        key = "training.lr_scheduler_type"
        given = self.args.lr_scheduler_kwargs
        with as_user_error(f"{key}: {self.args.lr_scheduler_type.value} (lr_scheduler_kwargs: {given})"):
            schedule = super().create_scheduler(*args, **kwargs)
        if self._resumed_settings:
            self._resumed_settings.note_new(kwargs.get("optimizer") or self.optimizer, schedule)
        return schedule

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Load the model. Raises UserError if the checkpoint doesn't fit it."""
        with as_resume_error(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load states, which follows DeepSpeed's loading; settings are those of this run's recipe."""
        resumed, schedule = self._resumed_settings, self.lr_scheduler
        if checkpoint is None or resumed is None:
            return
        with as_resume_error(checkpoint):
            saved = resumed.read_schedule(schedule, Path(checkpoint))
            if not is_wrapped(schedule):
                self.lr_scheduler = FixedSchedule()
            try:
                if resumed.fresh_states:
                    resumed.print_fresh_states()
                else:
                    super()._load_optimizer_and_scheduler(checkpoint)
                    if self.is_deepspeed_enabled:
                        finish_loading(self.model_wrapped, Path(checkpoint))
            finally:
                self.lr_scheduler = schedule
            resumed.apply(self.optimizer, schedule, saved)
            if self.is_deepspeed_enabled and "training.max_grad_norm" in resumed.changed:
                engine: Any = self.model_wrapped
                if hasattr(engine.optimizer, "clip_grad"):  # ZeRO-1 and -2 load this setting, too
                    engine.optimizer.clip_grad = self.args.max_grad_norm

    def _load_best_model(self) -> None:
        """Load the best model, under DeepSpeed also one that another number of processes wrote."""
        if self._best.is_in_memory(self.state):
            return
        if not self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        folder = self._loadable_folder(read_checkpoint(Path(str(best))))
        self.state.best_model_checkpoint = str(folder)
        with format_of(self.model_wrapped, folder):
            super()._load_best_model()
        self.state.best_model_checkpoint = best
        self._remove_universal()

    def _advance_schedule(self) -> None:
        engine: Any = self.model_wrapped
        schedule: Any = engine.lr_scheduler or self.lr_scheduler
        schedule.step()

    def _restore_run_state(self) -> None:
        """Restore the figures of the checkpoint that the run resumes from, and do its pending work.

        On other processes than before, the first one continues from the states of those that are gone.
        """
        if self._resume_from is None:
            return
        checkpoint, self._resume_from = self._resume_from, None
        rank, ranks, state = self.args.process_index, self.args.world_size, self.state
        self._run_state.is_over = state.global_step >= state.max_steps
        if self._run_state.is_over and is_first_rank() and self._length_has_changed():
            print(
                f"nothing is trained: this recipe ends at step {state.max_steps:,}, and {checkpoint.folder.name} has "
                f"done {state.global_step:,} already. Its model is saved as the finished one.",
                flush=True,
            )
        states = read_run_states(self._loaded_from)
        losses = [saved["loss"] for saved in states.values()]
        # the mean over the processes is logged
        self._tr_loss.fill_(states[rank]["loss"] if len(states) == ranks else sum(losses) / len(losses))
        self._globalstep_last_logged = states[0]["last_logged"]
        self.load_figures(
            [saved for number, saved in states.items() if number == rank or (rank == 0 and number >= ranks)]
        )
        self._remove_universal()
        self._best.resume(checkpoint, state)
        if states[0]["evaluation_is_due"]:
            metrics = self._evaluate(None, None)
            if self._determine_best_metric(metrics, None) and self.args.save_strategy == "best":
                self._save_checkpoint(self.model_wrapped, None)
        if states[0]["epoch_ends"]:
            is_over, self._run_state.is_over = self._run_state.is_over, False
            self._end_epoch(states[0]["grad_norm"], states[0]["learning_rate"])
            self._run_state.is_over = is_over

    def _length_has_changed(self) -> bool:
        keys = {"training.max_steps", "training.num_train_epochs"}
        return self._resumed_settings is not None and not keys.isdisjoint(self._resumed_settings.changed)

    def _end_epoch(self, grad_norm: float, learning_rate: float | None) -> None:
        """Do what is due at the end of an epoch, if the run was killed after its last step."""
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        epoch, model, started = int(self.state.epoch or 0), self.model_wrapped, time.time()
        self._maybe_log_save_evaluate(self._tr_loss, grad_norm, model, None, epoch, None, started, learning_rate)
