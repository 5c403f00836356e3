"""Trainer of a run: TRL's SFTTrainer on prepared rows, with token losses, metrics, guards and preemption."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig

from train.data.dataset import LOSS_WEIGHTS, PackedDataset, PaddedDataset
from train.data.prepared_data import PreparedData
from train.errors import UserError
from train.loop.arguments import as_user_error, without_zero3
from train.loop.batch_info import BATCH_INFO, BatchInfo, CountingCollator, sum_loss_weights
from train.loop.checkpoint.manifest import read_checkpoint
from train.loop.checkpoint.weights import check_savable
from train.loop.compilation import compile_layers
from train.loop.evaluating import EvaluatingTrainer
from train.loop.fsdp import gather_output_layer
from train.loop.guards.anomalies import Guards
from train.loop.guards.packing_isolation import PackingIsolationTest
from train.loop.layer_kernels import LayerKernels
from train.loop.loss import check_weighable, fused_loss, needs_logits, score_labels, sum_losses
from train.loop.preemption import Preemption
from train.loop.sampler import BalancedSampler, share_batches
from train.loop.sequence_slice import make_group
from train.loop.source_figures import SourceFigures
from train.loop.throughput import Throughput
from train.model.adapters import check_adapter, lora_config
from train.model.architecture import try_inspect_architecture
from train.model.attention.document_borders import takes_borders
from train.model.attention.sequence_parallel import GROUP
from train.model.text_part import build_meta_model, find_idle_parameters, freeze
from train.recipe import Recipe
from train.recipe.schedule import data_parallel
from train.samples.rows import SampledRow
from train.system_gain.variants import VariantRows


class JanusTrainer(EvaluatingTrainer):
    """SFTTrainer on sequences that are packed on the fly, in an order that balances the ranks."""

    collator: type[CountingCollator] = CountingCollator
    data_collator: Any
    _signature_columns: list[str]  # transformers' own
    sampler: BalancedSampler | None = None
    """The order of training, once it has begun."""
    grad_norm: torch.Tensor | float = math.nan
    """Gradient norm of the last step."""
    _tokens_since_saved: int = 0

    def __init__(
        self,
        recipe: Recipe,
        arguments: SFTConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        callbacks: list[TrainerCallback],
        *,
        preemption: Preemption | None = None,
        gain: VariantRows | None = None,
        samples: Sequence[SampledRow] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Set up a run.

        Args:
            recipe: the recipe of the run.
            arguments: TRL's arguments of the recipe.
            model: the model to train.
            tokenizer: its tokenizer, with the template that is saved.
            data: rows that are already tokenized, labelled and packed.
            callbacks: further callbacks of the trainer.
            preemption: requests to stop.
            gain: rows on which each evaluation measures the system gain.
            samples: rows for which each evaluation generates answers.
            about: fingerprint of the data, for the checkpoints.

        Raises UserError for settings that TRL or peft refuses, or that leave nothing to train.
        """
        self._groups = data_parallel(arguments.world_size, sharing := recipe.model.sequence_parallel)
        rows, batch = len(data.train.dataset), arguments.train_batch_size * self._groups
        if arguments.dataloader_drop_last and rows < batch:
            raise UserError(
                f"training.dataloader_drop_last: the {rows:,} sequences are fewer than the {batch:,} of one batch on "
                "all processes, so all of them would be dropped. Write false, or lower per_device_train_batch_size."
            )
        with without_zero3(arguments):
            shape = try_inspect_architecture(recipe, model.config)
            idle = find_idle_parameters(build_meta_model(model.config, recipe.model))
        arguments.padding_free = recipe.joins_documents or sharing > 1 or takes_borders(model)
        check_adapter(recipe.adapter, model, idle)
        freeze(model, idle)
        with as_user_error("adapter" if recipe.adapter else "training"):
            super().__init__(
                recipe,
                arguments,
                about or {},
                model=model,
                train_dataset=_first_sequence(data.train.dataset),
                eval_dataset=_first_sequence(data.validation.dataset) if data.validation else None,
                processing_class=tokenizer,
                peft_config=lora_config(recipe.adapter, model, idle),
                callbacks=callbacks,
                preemption=preemption,
                gain=gain,
                samples=samples,
            )
        self.train_dataset = data.train.dataset
        check_weighable(self, data)
        self.sequence_group = make_group(sharing)
        # Losses that TRL computes are transformers' means of batches: one without labels would have no mean.
        eval_batch = 1 if needs_logits(self) else arguments.eval_batch_size * self._groups
        self.eval_dataset = PaddedDataset(data.validation.dataset, eval_batch) if data.validation else None
        self.data_collator = self.collator(self.data_collator, self.sequence_group)
        self._sources = SourceFigures(data.train.dataset, self.accelerator.device)
        self._evaluated_sources = SourceFigures((data.validation or data.train).dataset, self.accelerator.device)
        self._throughput = Throughput(self.accelerator, shape, self._sources, self.mean_metrics)
        self._guards = Guards(recipe.guards, self.accelerator, data.train.dataset.places, recipe.output_dir)
        self.remove_callback(PrinterCallback)
        if recipe.model.use_kernels:
            self.add_callback(LayerKernels(self))
        if arguments.padding_free:
            documents = "packed documents" if recipe.data.packing else "rows of a batch, joined without padding,"
            self.add_callback(PackingIsolationTest(self, documents))
        for callback in (self._throughput, self._run_state, self._preemption_callback):
            self.add_callback(callback)

    # Training

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, and wait for checkpoints and copies that are completed in the background.

        `resume_from_checkpoint`: folder of a complete checkpoint. Raises UserError if a package that a setting needs
        is missing (some report it only here), and if the checkpoint can't be loaded on the present processes.
        """
        check_savable(self._unwrap())
        folder = self.begin_run(read_checkpoint(Path(resume_from_checkpoint)) if resume_from_checkpoint else None)
        try:
            output = super().train(str(folder) if folder else None, *args, **kwargs)
            self._best.warn_if_lost(self.state)
            return output
        except ImportError as error:
            raise UserError(f"training: {' '.join(str(error).split())}") from error
        except Exception as error:
            self.save_after_error()
            if not isinstance(error, UserError):  # which all processes raise
                self._writer.expect_lost_peers()
            raise
        except KeyboardInterrupt:
            self._writer.abandon()
            raise
        finally:
            self._writer.close()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, Any]:
        """Return the model as accelerate wraps it, and the data loader."""
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if self.accelerator.is_fsdp2:
            gather_output_layer(model)
        return model, loader

    def _get_train_sampler(self, train_dataset: PackedDataset | None = None) -> Sampler[int] | None:
        """Return our order in place of a random one."""
        sequences = train_dataset or self.train_dataset
        if self.args.train_sampling_strategy == "random":
            self.sampler = BalancedSampler(sequences, self.args, self.model.config, ranks=self._groups)
        sampler = super()._get_train_sampler(sequences) if self.sampler is None else self.sampler
        return share_batches(sampler, self.args.train_batch_size, self.sequence_group, self.args)

    def _get_eval_sampler(self, eval_dataset: PaddedDataset) -> Sampler[int] | None:
        """Return transformers' order, which is the data set's."""
        sampler = super()._get_eval_sampler(eval_dataset) or SequentialSampler(eval_dataset)
        return share_batches(sampler, self.args.eval_batch_size, self.sequence_group, self.args)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch. accelerate doesn't tell the sampler its number if several processes resume within one."""
        if self.sampler is not None and self.state.epoch is not None:
            self.sampler.set_epoch(int(self.state.epoch))
        super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Return transformers' optimizer. Raises UserError for settings that it refuses only here."""
        with as_user_error(f"training.optim: {self.args.optim.value} (optim_args: {self.args.optim_args})"):
            return super().create_optimizer(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs on the device; slices of a sequence with the group that shares it."""
        prepared = super()._prepare_inputs(inputs)
        return {**prepared, GROUP: self.sequence_group} if "shift_labels" in prepared else prepared

    def _set_signature_columns_if_needed(self) -> None:
        """Let what the data set says of its sequences through to the collator."""
        super()._set_signature_columns_if_needed()
        if "sequence" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "sequence", LOSS_WEIGHTS]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the batches of one step, whose time begins here; none for a run that is over or has to stop.

        transformers would train a step first, also if a run that ended within an epoch resumes, or one whose pending
        evaluation is abandoned again.
        """
        if self.state.global_step >= self.state.max_steps or self._preemption.reason:
            return [], None
        self._throughput.begin_step()
        return super().get_batch_samples(self._throughput.time_batches(epoch_iterator), *args, **kwargs)

    def _get_num_items_in_batch(self, batches: list[dict[str, Any]], device: torch.device) -> Any:
        """Return the divisor of the losses of these batches: trained tokens or, with loss weights, their sum."""
        total = sum_loss_weights(batches)
        if total is None:
            return super()._get_num_items_in_batch(batches, device)
        total = total.to(device)
        return self.accelerator.reduce(total) if self.args.average_tokens_across_devices else total

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Return the accelerator's arguments; training.torch_compile compiles the layers."""
        arguments = super()._build_accelerator_args(**kwargs)
        if self.args.torch_compile:
            compile_layers(arguments["dynamo_plugin"])
        return arguments

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss of a micro-batch after its forward and backward pass."""
        if not self.model.training:  # an evaluation set it, and transformers resets the wrapped model: of one that is
            self.model.train()  # compiled by layer that is a copy, which shares the layers
        with self._throughput.timed("backward"):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return TRL's loss, and add its sums on the device; TRL gathers metrics at each micro-batch.

        Losses that need all logits or a router's are left to TRL, metrics included.
        """
        batch: BatchInfo = inputs.pop(BATCH_INFO)  # type: ignore[assignment]
        weights = inputs.pop(LOSS_WEIGHTS, None)
        if return_outputs or needs_logits(self):
            if self.model.training:
                self._count(batch, None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._throughput.timed("forward") if self.model.training else nullcontext():  # no part of a step else
            outputs = score_labels(model, self._unwrap(), inputs)
            processes = self.accelerator.num_processes
            loss, token_losses = fused_loss(outputs, self.args, num_items_in_batch, processes, weights)
        sums = sum_losses(outputs, weights)
        if self.model.training:
            self._count(batch, sums)
            self._guards.add(batch, token_losses, outputs.label_mask)
            self._sources.add(batch, token_losses, outputs.label_mask, weights)
        else:
            self._evaluated += sums
            self._evaluated_sources.add(batch, -outputs.log_probs, outputs.label_mask, weights)
        return loss

    def _count(self, batch: BatchInfo, sums: torch.Tensor | None) -> None:
        self._tokens_since_saved += int(batch.documents.sum()) if batch.is_counted_here else 0
        self._throughput.add(batch, sums)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float:
        """Return transformers' norm; if it is not finite, the step changes no weight.

        The only place where a step waits for the device, once for all that has to be known.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):  # FSDP2's, of which each process has a part
            norm = norm.full_tensor()
        deepspeed = self.is_deepspeed_enabled  # its step is done by now, or was skipped
        if deepspeed and self.accelerator.optimizer_step_was_skipped:
            norm = math.nan
        self.grad_norm = norm
        scaled = self.accelerator.mixed_precision == "fp16"  # overflows are normal until the scale is found
        loss_sum = self._guards.loss_sum(self.sequence_group)
        judged = self.accelerator.reduce(loss_sum) if scaled else torch.as_tensor(norm, device=loss_sum.device)
        requested = self.accelerator.reduce(
            torch.tensor(float(self._preemption.is_requested()), device=loss_sum.device)
        )
        *judgement, requests = torch.stack([judged.double(), loss_sum, requested.double()]).tolist()
        self._preemption.requested_on_any_rank = requests > 0
        if not self._guards.check_step(self.state.global_step + 1, *judgement) and not scaled:
            if deepspeed:
                self._run_state.schedule_was_held = True
            else:
                model.zero_grad(set_to_none=True)  # optimizers skip parameters without a gradient
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log transformers' and TRL's metrics, and those of the steps since the last such line."""
        if "loss" in logs:
            self._tr_loss.zero_()  # transformers subtracts it from itself, which leaves NaN in all later means
            metrics, extra = self._throughput.gather_metrics([self._tokens_since_saved, self._guards.unreported_spikes])
            self.state.num_input_tokens_seen += int(sum(tokens for tokens, _ in extra))
            self._tokens_since_saved = 0
            logs |= {"num_tokens": self.state.num_input_tokens_seen, **metrics}
            if any(spikes for _, spikes in extra):
                self._guards.report_spikes()
        super().log(logs, start_time)

    # Checkpoints

    def figures_to_save(self) -> dict[str, Any]:
        """Return this process's figures since the last logging step, as JSON."""
        return {
            "throughput": self._throughput.state(),
            "recent_losses": self._guards.state(),
            "grad_norm": float(self.grad_norm),
        }

    def load_figures(self, states: list[Mapping[str, Any]]) -> None:
        """Restore the figures of these processes, the first of which is its own."""
        self._throughput.load([state["throughput"] for state in states])
        for state in states[:1]:
            self._guards.load(state["recent_losses"])

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint, with the tokens of all processes counted up to it."""
        tokens = torch.tensor(self._tokens_since_saved, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens))
        self._tokens_since_saved = 0
        super()._save_checkpoint(model, trial)


def _first_sequence(sequences: PackedDataset) -> Dataset:
    """Return a Dataset of one sequence: TRL's constructor takes nothing else, and all rows may exceed the memory."""
    return Dataset.from_list([sequences[0]])
