"""TRL's SFTTrainer on prepared rows, and the little that it lacks."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl import SFTConfig, SFTTrainer

from train.data.dataset import PackedDataset, PaddedDataset
from train.data.prepare import Prepared
from train.errors import UserError
from train.loop.arguments import as_user_error
from train.loop.checkpoint import deepspeed as universal
from train.loop.checkpoint.deepspeed import written_last
from train.loop.checkpoint.manifest import checkpoint_in
from train.loop.checkpoint.resume import loading
from train.loop.checkpoint.resumed_settings import ResumedSettings
from train.loop.checkpoint.side_files import finished_files, is_disk_error, reason_of, side_files, write_side_files
from train.loop.checkpoint.trainer_state import RunState, files_expected
from train.loop.checkpoint.verification import check_saved
from train.loop.checkpoint.weights import check_savable, save_weights
from train.loop.checkpoint.writer import Saver
from train.loop.guards.anomalies import Guards
from train.loop.guards.packing_isolation import IsolationTest
from train.loop.metrics_log import StepLog
from train.loop.preemption import Preemption, StopError, StopWhenAsked
from train.loop.sampler import BalancedSampler
from train.loop.throughput import BATCH_INFO, BatchInfo, CountingCollator, Sums, Throughput
from train.model.adapters import check_adapter, lora_config
from train.model.architecture import Shape, shape_of
from train.model.text_part import bare_model, freeze, idle_parameters
from train.recipe import Recipe
from train.system_gain.evaluator import ValidationGain
from train.system_gain.variants import VariantRows


def _sample(sequences: PackedDataset) -> Dataset:
    """One sequence, as TRL wants to see data: only a Dataset will do, and none of more than memory holds."""
    return Dataset.from_list([sequences[0]])


class JanusTrainer(SFTTrainer):
    """SFTTrainer on sequences that are put together as they are needed, in an order that evens out the ranks.

    Its evaluation loss is the mean over TOKENS, however they fall into batches; beside it stands the system gain.
    """

    data_collator: Any
    _signature_columns: list[str]  # transformers' own
    order: BalancedSampler | None = None
    """What training walks through, once it has begun."""
    grad_norm: torch.Tensor | float = math.nan
    """Of the last step."""
    control: TrainerControl
    _resumed: ResumedSettings | None = None
    _evaluated: Sums | None = None
    _tokens_since_saved: int = 0

    def __init__(
        self,
        recipe: Recipe,
        arguments: SFTConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Prepared,
        callbacks: list[TrainerCallback],
        *,
        preemption: Preemption | None = None,
        gain: VariantRows | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Set up a run; the rows of `data` are trained as they are, already tokenized, labelled and packed.

        `preemption`: what may ask it to stop. `gain`: rows on which each evaluation measures the system gain. `about`:
        what its checkpoints say of the run.
        Raises UserError for settings that TRL or peft refuses, or that leave nothing to train.
        """
        rows, batch = len(data.train.dataset), arguments.train_batch_size * arguments.world_size
        if arguments.dataloader_drop_last and rows < batch:
            raise UserError(
                f"training.dataloader_drop_last: the {rows:,} sequences are fewer than the {batch:,} of one batch on "
                "all processes, so all would be left out. Write false, or make per_device_train_batch_size smaller."
            )
        with _without_zero3(arguments):
            shape = _shape(recipe, model)
            idle = idle_parameters(bare_model(model.config, recipe.model))
        check_adapter(recipe.adapter, model, idle)
        freeze(model, idle)
        with as_user_error("adapter" if recipe.adapter else "training"):
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=_sample(data.train.dataset),
                eval_dataset=_sample(data.validation.dataset) if data.validation else None,
                processing_class=tokenizer,
                peft_config=lora_config(recipe.adapter, model, idle),
                callbacks=callbacks,
            )
        self.train_dataset = data.train.dataset
        # Losses that TRL works out are transformers' means of batches: one without labels would be none of a number.
        at_once = 1 if self._needs_more_than_the_head() else arguments.eval_batch_size * arguments.world_size
        self.eval_dataset = PaddedDataset(data.validation.dataset, at_once) if data.validation else None
        self.data_collator = CountingCollator(self.data_collator)
        self.remove_callback(PrinterCallback)
        if recipe.data.packing:
            self.add_callback(IsolationTest(self))
        self._recipe, self._about = recipe, dict(about or {})
        self._saver = Saver(recipe.output_dir, recipe.save, recipe.training.get("save_total_limit"))
        self._preemption = preemption or Preemption(recipe.output_dir, recipe.save)
        self._throughput = Throughput(self.accelerator, shape)
        self._run_state = RunState(self)
        self._gain = ValidationGain(recipe, gain.rows, arguments.per_device_eval_batch_size) if gain else None
        self._stop_when_asked = StopWhenAsked(self._preemption, self.accelerator)
        self._step_log = next((callback for callback in callbacks if isinstance(callback, StepLog)), None)
        for callback in (self._throughput, self._run_state, self._stop_when_asked):
            self.add_callback(callback)
        self._guards = Guards(recipe.guards, self.accelerator, data.train.dataset.places, recipe.output_dir)

    def _get_train_sampler(self, train_dataset: PackedDataset | None = None) -> Sampler[int] | None:
        """Our order in the place of a random one."""
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        self.order = BalancedSampler(train_dataset or self.train_dataset, self.args, self.model.config)
        return self.order

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """transformers' loop, and the end of what it began in the background.

        `resume_from_checkpoint`: a whole checkpoint's folder. Raises UserError where a package that a setting needs is
        missing (some ask only here), and where the checkpoint can't be loaded on the processes that there are.
        """
        check_savable(self._unwrapped())
        going_on = checkpoint_in(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        self._saver.begin(going_on)
        if going_on:
            resume_from_checkpoint = str(self._run_state.go_on_from(going_on))
            self._resumed = ResumedSettings(going_on, self._recipe)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except ImportError as fault:
            raise UserError(f"training: {' '.join(str(fault).split())}") from fault
        except Exception:
            self._save_after_error()
            raise
        finally:
            self._saver.close()

    def _save_after_error(self) -> None:
        """Save a model that has made all of its steps, where an evaluation or a checkpoint after them failed.

        On the first rank and without the others, which may wait elsewhere: not where they hold parts of the weights.
        """
        sharded = self.is_fsdp_enabled or (
            self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        )
        done = 0 < self.state.max_steps <= self.state.global_step
        if not done or sharded or not self.is_world_process_zero():
            return
        with suppress(Exception):  # the error that is on its way says more
            self._save(self.args.output_dir)
            print(f"all {self.state.max_steps:,} steps are done: the model is in {self.args.output_dir}", flush=True)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """transformers' optimizer. Raises UserError for settings that it refuses: that shows only here."""
        with as_user_error(f"training.optim: {self.args.optim.value} (optim_args: {self.args.optim_args})"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """transformers' schedule. Raises UserError for settings that it refuses: that shows only here."""
        given = self.args.lr_scheduler_kwargs
        with as_user_error(
            f"training.lr_scheduler_type: {self.args.lr_scheduler_type.value} (lr_scheduler_kwargs: {given})"
        ):
            schedule = super().create_scheduler(*args, **kwargs)
        if self._resumed:
            self._resumed.note(kwargs.get("optimizer") or self.optimizer, schedule)
        return schedule

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple[Any, ...]:
        """Return numbers of epochs and steps as transformers does; steps left are counted on from those done."""
        epochs, per_epoch, *rest, max_steps = super().set_initial_training_values(args, dataloader)
        shift = self._run_state.find_position(per_epoch)
        if shift and args.max_steps > 0:
            epochs = math.ceil((max_steps - shift) / per_epoch)
        elif shift:
            max_steps += shift
        return epochs, per_epoch, *rest, max_steps

    def _init_training_state(self, max_steps: int, num_update_steps_per_epoch: int, *args: Any) -> tuple[int, int]:
        """Return the epochs trained, and the micro-batches trained in the current one.

        transformers keeps the checkpoint's logging_steps, eval_steps and save_steps; those of this run are in force.
        """
        position = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args)
        self.state.compute_steps(self.args, max_steps)
        shift = self._run_state.shift
        if not shift:
            return position
        epochs, steps = divmod(self.state.global_step - shift, num_update_steps_per_epoch)
        return epochs, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def init_hf_repo(self, token: str | None = None) -> None:
        """transformers' repository on the hub. Raises UserError where it can't be made, whatever the reason."""
        try:
            super().init_hf_repo(token)
        except Exception as fault:  # of the network, the hub and its client, which share no class
            first_line = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise UserError(
                f"training.push_to_hub: {first_line} Set HF_TOKEN in the environment to one that may write, or take "
                "the key out and upload the finished model."
            ) from fault

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """README.md in output_dir: the recipe, in place of TRL's page that is the same for every model."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            self._warn_of(write_side_files(finished_files(self._recipe), folder), folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' saving, of checkpoints too, with a model card beside the finished model.

        Raises OSError for a checkpoint and UserError for a finished model, on every rank, where the weights can't be
        written or aren't all of the model's. Other files that can't be written are warnings, as is a failed upload.
        """
        save = super().save_model
        if _internal_call:
            if output_dir is not None:  # else push_to_hub saves again what has just been saved
                self._saver.raise_on_all_ranks(lambda: save(output_dir, True))
            return
        folder = Path(output_dir or self.args.output_dir)
        for act in (lambda: save(str(folder), True), lambda: self._check_weights(folder)):
            if fault := self._saver.first_error_on_any_rank(act):
                go_on = self._saver.how_to_go_on()
                raise UserError(f"output_dir: the model couldn't be saved in {folder}: {fault}. {go_on}")
        self.create_model_card()
        if self.args.push_to_hub:
            self._warn_of_upload(lambda: self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """transformers' upload of a checkpoint, whose failure is no reason to end a run."""
        self._warn_of_upload(lambda: super(JanusTrainer, self)._push_from_checkpoint(checkpoint_folder))

    def _warn_of_upload(self, upload: Callable[[], object]) -> None:
        try:
            upload()
        except Exception as error:  # of the network, the hub and its client, which share no class
            folder = self.args.output_dir
            name = self.hub_model_id or self.args.hub_model_id or Path(folder).name
            print(
                f"warning: training.push_to_hub: {folder} was not uploaded: {reason_of(error)}. Nothing is lost here: "
                f"after the run, `hf upload {name} {folder}` uploads the model.",
                flush=True,
            )

    def _warn_of(self, errors: Mapping[str, Exception], folder: Path) -> None:
        """Say which files beside the weights are missing, and how to write them."""
        for name, error in errors.items():
            print(
                f"warning: {folder}: {name} couldn't be written: {reason_of(error)}. The weights are not affected. "
                f"Mend that; `python -m train.loop.checkpoint.side_files {self.args.output_dir}` then writes it beside the "
                "finished model.",
                flush=True,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """transformers' files of them; DeepSpeed's are written where no process waits for another."""
        self._saver.raise_on_all_ranks(self._saver.check_room_for_small_files)
        with written_last(self.model_wrapped) if self.is_deepspeed_enabled else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load states, which follows DeepSpeed's loading; settings are those of this run's recipe."""
        if checkpoint is None or self._resumed is None:
            return
        with loading(checkpoint):
            self._resumed.load(self, Path(checkpoint))

    def length_changed(self) -> bool:
        """Return whether the run resumes with another number of steps or epochs than it had."""
        keys = {"training.max_steps", "training.num_train_epochs"}
        return self._resumed is not None and not keys.isdisjoint(self._resumed.changed)

    def load_states(self, checkpoint: str) -> None:
        """Load optimizer and schedule as transformers does, with their settings."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.is_deepspeed_enabled:
            universal.loaded(self.model_wrapped, Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """transformers' loading of the model."""
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self) -> None:
        """transformers' loading, under DeepSpeed also of one that another number of processes wrote."""
        if self._run_state.best.is_in_memory():
            return
        if not self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        folder = self._run_state.loadable(checkpoint_in(Path(str(best))))
        self.state.best_model_checkpoint = str(folder)
        with universal.loading(self.model_wrapped, folder):
            super()._load_best_model()
        self.state.best_model_checkpoint = best
        self._run_state.forget_other_forms()

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _check_weights(self, folder: Path) -> None:
        if self.is_world_process_zero():
            check_saved(self._unwrapped(), folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights first, then each file beside them, without training_args.bin: a pickle, which runs code as it is
        opened, of what recipe.yaml says in text.

        A file that fails is a warning, as it can be written again. Raises OSError for the weights, and in a checkpoint,
        of which all is needed, for any file where the disk is the cause.
        """
        if not self.args.should_save:
            return
        if state_dict and not self._recipe.adapter:
            # accelerate copies each tensor of a ZeRO-1 or -2 model, so nobody sees any more which are tied
            kept = {name for name, _ in self.model.named_parameters()}
            for name, _ in self.model.named_parameters(remove_duplicate=False):
                if name not in kept:
                    state_dict.pop(name, None)
        folder, model = Path(output_dir or self.args.output_dir), self._unwrapped()
        save_weights(model, folder, state_dict)
        errors = write_side_files(side_files(model, self.processing_class), folder)
        for error in errors.values():
            if folder.parent == self._saver.aside and is_disk_error(error):
                raise error
        self._warn_of(errors, folder)

    def _set_signature_columns_if_needed(self) -> None:
        """Lets the data set's `sequence` through to the collator."""
        super()._set_signature_columns_if_needed()
        if "sequence" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "sequence"]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """transformers' batches of one step, whose time begins here; none for a run that is over or has to stop.

        transformers trains a step first, even where a run that has ended within an epoch is gone on with, or one whose
        evaluation, made good as it goes on, is given up again.
        """
        if self.state.global_step >= self.state.max_steps or self._preemption.reason:
            return [], None
        self._throughput.begin_step()
        return super().get_batch_samples(self._throughput.waiting(epoch_iterator), *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' forward and backward of a micro-batch."""
        with self._throughput.timed("backward"):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """TRL's loss, with its figures summed on the device; TRL gathers them from all processes at each micro-batch.

        Losses that need all logits or a router's are left to TRL, figures included.
        """
        held: Any = inputs.pop(BATCH_INFO)
        if return_outputs or self._needs_more_than_the_head():
            if self.model.training:
                self._count(held, None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._throughput.timed("forward"):
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            losses = -outputs.log_probs  # 0 where a token has none
            if self.args.loss_type == "dft":  # arXiv:2508.05629
                losses = losses * outputs.log_probs.exp().detach()
            tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
            loss = losses.sum() / torch.as_tensor(tokens).clamp(min=1)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                # the tokens are those of all processes, and DDP takes the mean of their gradients
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        sums = Sums.of(outputs)
        if self.model.training:
            self._count(held, sums)
            self._guards.add(held, losses, outputs.label_mask)
        else:
            self._evaluated = sums.plus(self._evaluated)
        return loss

    def _needs_more_than_the_head(self) -> bool:
        parallelism = self.accelerator.parallelism_config
        return (
            self.aux_loss_enabled
            or self.label_smoother is not None
            or self.compute_loss_func is not None
            or self.args.loss_type not in ("nll", "dft")
            or (parallelism is not None and parallelism.sp_enabled)
        )

    def _count(self, held: BatchInfo, sums: Sums | None) -> None:
        self._tokens_since_saved += int(held.documents.sum())
        self._throughput.add(held, sums)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float:
        """transformers' norm; where it is not finite, the step that follows changes nothing.

        Here a step waits for the device, once, for all that has to be known of it.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):  # FSDP2's, of which each process has a part
            norm = norm.full_tensor()
        deepspeed = self.is_deepspeed_enabled  # there the step is done by now, or was left out
        if deepspeed and self.accelerator.optimizer_step_was_skipped:
            norm = math.nan
        self.grad_norm = norm
        scaled = self.accelerator.mixed_precision == "fp16"  # until gradients overflow, which is no fault
        loss_sum = self._guards.loss_sum()
        judged = self.accelerator.reduce(loss_sum) if scaled else torch.as_tensor(norm, device=loss_sum.device)
        asked = self.accelerator.reduce(torch.tensor(float(self._preemption.asked()), device=loss_sum.device))
        *judgement, any_asked = torch.stack([judged.double(), loss_sum, asked.double()]).tolist()
        self._preemption.all_asked = any_asked > 0
        if not self._guards.finite(self.state.global_step + 1, *judgement) and not scaled:
            if deepspeed:
                self._run_state.schedule_was_held = True
            else:
                model.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' and TRL's figures, and those of the steps since the last such line."""
        if "loss" in logs:
            self._tr_loss.zero_()  # transformers takes it from itself, which leaves NaN in all later means
            figures, told = self._throughput.figures([self._tokens_since_saved, self._guards.spikes])
            self.state.num_input_tokens_seen += int(sum(tokens for tokens, _ in told))
            self._tokens_since_saved = 0
            logs |= {"num_tokens": self.state.num_input_tokens_seen, **figures}
            if any(spikes for _, spikes in told):
                self._guards.tell_spikes()
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written: aside, until they are whole."""
        return str(self._saver.aside)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """transformers' checkpoint and what it forgets, under its name once all of it is on the disk."""
        since = torch.tensor(self._tokens_since_saved, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(since))
        self._tokens_since_saved = 0
        step, best = self.state.global_step, self.state.best_global_step
        name, best_name = f"checkpoint-{step}", f"checkpoint-{best}" if best else None

        def write() -> None:
            super(JanusTrainer, self)._save_checkpoint(model, trial)
            folder = self._saver.aside / name
            if best_name and (best == step or Path(self.args.output_dir, best_name).is_dir()):
                # transformers has it where it lies until it is whole
                self.state.best_model_checkpoint = str(Path(self.args.output_dir, best_name))
                if self.args.should_save:
                    self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            self._run_state.write(folder)

        def check(folder: Path) -> None:
            if self.is_world_process_zero():
                for file in files_expected(self):
                    if not any(folder.glob(file)):
                        raise UserError(f"{file} was not written")
            self._check_weights(folder)

        stopping = self._preemption.reason is not None
        if self._saver.save(step, write, check, self._run_state.manifest, best_name, stopping=stopping):
            self._run_state.best.was_saved()
        else:
            self._run_state.best.was_not_saved()

    def end_epoch(self, grad_norm: float, learning_rate: float | None) -> None:
        """Do what is due at the end of an epoch, after whose last step the run was killed."""
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        epoch, model, began = int(self.state.epoch or 0), self.model_wrapped, time.time()
        self._maybe_log_save_evaluate(self._tr_loss, grad_norm, model, None, epoch, None, began, learning_rate)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """transformers' evaluation; training's random numbers go on as if it had not been."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The evaluation that is due in training; where the run has to stop, it is left to the one that goes on.

        That of training.eval_on_start is due where a run begins, not where it goes on.
        """
        if kwargs.get("skip_scheduler") and self.state.global_step:
            return {}
        try:
            if self._preemption.reason:
                raise StopError
            self._run_state.evaluation_is_due = False
            return super()._evaluate(*args, **kwargs)
        except StopError:
            self._run_state.evaluation_is_due = True
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this is the best model; one that is yet to be evaluated is kept like the best."""
        return self._run_state.evaluation_is_due or super()._determine_best_metric(metrics, trial)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop weighs each batch alike; the figures reported here weigh each token alike."""
        self._evaluated = None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        own = self._evaluated or [torch.zeros((), dtype=torch.float64, device=self.args.device)] * 4
        loss, entropy, correct, tokens = self.accelerator.reduce(torch.stack(list(own)), reduction="sum").tolist()
        if tokens:
            sums = {"loss": loss, "entropy": entropy, "mean_token_accuracy": correct}
            output.metrics.update({f"{metric_key_prefix}_{name}": value / tokens for name, value in sums.items()})
        if self._gain is not None:
            scoring = self._step_log.part("system gain", self._gain.answers, "answers") if self._step_log else None

            def on_progress(answers: int) -> None:
                if scoring:
                    scoring.advance(answers)
                self._stop_when_asked.on_prediction_step(self.args, self.state, self.control)

            model, step = self.model_wrapped, self.state.global_step
            try:
                output.metrics.update(self._gain.measure(model, self.accelerator, step, metric_key_prefix, on_progress))
            finally:
                if scoring:
                    scoring.finish()
        return output


def _shape(recipe: Recipe, model: PreTrainedModel) -> Shape | None:
    """What the model is made of; None for kinds whose arithmetic isn't known here."""
    try:
        return shape_of(recipe, model.config)
    except UserError:
        return None


@contextmanager
def _without_zero3(arguments: SFTConfig) -> Iterator[None]:
    """Keep transformers from sharing out, under ZeRO-3, a model that has no weights."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin := arguments.deepspeed_plugin:  # training.deepspeed makes one that has no dschf
            set_hf_deepspeed_config(getattr(plugin, "dschf", plugin.hf_ds_config))
