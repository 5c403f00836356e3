"""Trainer of pairs: JanusTrainer with the losses of preference training."""

from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig
from trl.trainer.utils import disable_dropout_in_model

from train.data.loss_mask import NOT_TRAINED
from train.data.prepared_data import PreparedData
from train.errors import UserError
from train.formatting import format_count
from train.loop.batch_info import BATCH_INFO, BatchInfo
from train.loop.loss import needs_logits, score_labels
from train.loop.preemption_callback import EvaluationStoppedError
from train.loop.preference.losses import AnswerScores, PairLosses, compute_losses, step_loss
from train.loop.preference.pairs import (
    DOCUMENTS,
    PAIR_METRICS,
    PAIRS,
    PairCollator,
    count_items,
    place_losses,
    score_answers,
    sum_pairs,
)
from train.loop.preference.reference import ReferenceFiles, Table, fill_table, list_missing, share_table
from train.loop.trainer import JanusTrainer
from train.model.inference import evaluation_mode
from train.ranks import is_first_rank
from train.recipe import Recipe


class PreferenceTrainer(JanusTrainer):
    """JanusTrainer on pairs of a chosen and a rejected answer. The loss of a step is the mean over its pairs.

    Dropout is off, as in TRL's DPOTrainer and ORPOTrainer.
    """

    collator = PairCollator
    mean_metrics = PAIR_METRICS
    _reference: torch.Tensor | None = None
    """Log-probabilities of the reference, float32 [pairs, 2] on the device: training pairs, then validation pairs."""

    def __init__(
        self,
        recipe: Recipe,
        arguments: SFTConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        callbacks: list[TrainerCallback],
        **keywords: Any,
    ) -> None:
        """Set up a run. Arguments and errors: as of JanusTrainer; `recipe` has the section `preference`."""
        super().__init__(recipe, arguments, model, tokenizer, data, callbacks, **keywords)
        if needs_logits(self):
            raise UserError(
                "training.router_aux_loss_coef: pairs are trained without the auxiliary loss of a mixture of experts. "
                "Write 0."
            )
        disable_dropout_in_model(self.model)
        assert recipe.preference is not None
        self._section = recipe.preference
        self._splits = [split.dataset for split in (data.train, data.validation) if split]

    def _set_signature_columns_if_needed(self) -> None:
        """Let the numbers of the pairs through to the collator, too."""
        super()._set_signature_columns_if_needed()
        if PAIRS not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, PAIRS]

    def _get_num_items_in_batch(self, batches: list[dict[str, Any]], device: torch.device) -> Any:
        """Return the divisors of the losses of these batches: pairs, and trained tokens of chosen answers."""
        if not batches:
            return None
        items = torch.stack([count_items(batch) for batch in batches]).sum(0).to(device)
        return self.accelerator.reduce(items) if self.args.average_tokens_across_devices else items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Return the loss of the pairs of a micro-batch, and add its sums on the device."""
        batch: BatchInfo = inputs.pop(BATCH_INFO)  # type: ignore[assignment]
        numbers, documents = inputs.pop(PAIRS), inputs.pop(DOCUMENTS)
        training, trained = self.model.training, inputs["labels"][:, 1:] != NOT_TRAINED
        with self._throughput.timed("forward"):
            outputs, scores = self._score(model, inputs, documents, len(numbers))
            losses = compute_losses(self._section, scores, self._reference_of(numbers, training=training))
            loss = step_loss(losses, scores, num_items_in_batch)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        sums = self._sum(outputs, documents, scores, losses)
        token_losses, has_loss = place_losses(losses, scores, len(documents))
        if training:
            self._count(batch, sums)
            self._guards.add(replace(batch, trained_tokens=len(numbers)), token_losses, has_loss)
            self._sources.add(batch, token_losses, trained, weights=has_loss)  # one for each pair
        else:
            self._evaluated += sums
            self._evaluated_sources.add(batch, token_losses, trained, weights=has_loss)
        return loss

    def _score(
        self, model: torch.nn.Module, inputs: dict[str, Any], documents: torch.Tensor, pairs: int
    ) -> tuple[Any, AnswerScores]:
        """Return the model's outputs on a batch, and the scores of its answers."""
        outputs = score_labels(model, self._unwrap(), inputs)
        return outputs, score_answers(outputs, documents, pairs)

    def _sum(self, outputs: Any, documents: torch.Tensor, scores: AnswerScores, losses: PairLosses) -> torch.Tensor:
        """Return the sums of `mean_metrics`."""
        return sum_pairs(outputs, documents, scores, losses)

    # Reference

    def _reference_of(self, numbers: torch.Tensor, *, training: bool) -> torch.Tensor | None:
        """Return the reference's log-probabilities of the pairs with these numbers, [pairs, 2]; None for ORPO."""
        if self._reference is None:
            return None
        return self._reference[numbers if training else numbers + len(self._splits[0].lengths)]

    def _restore_run_state(self) -> None:
        """Load the reference when training begins, before an evaluation that is pending.

        If the run has to stop meanwhile, it trains no step, and the next start continues.
        """
        with suppress(EvaluationStoppedError):
            if self._section.loss == "dpo":
                self._load_reference()
        super()._restore_run_state()

    def _load_reference(self) -> None:
        """Read the reference's log-probabilities, or compute those that are missing.

        Raises UserError if they are missing in a run that has changed the weights, or are not finite.
        """
        pairs = sum(len(split.lengths) for split in self._splits)
        files = ReferenceFiles(self._recipe, self._run, self._computation(), pairs)
        table, file = files.read(resumed=self.state.global_step > 0)
        table = share_table(table, self.accelerator)
        missing = list_missing(table, self._splits)
        adapter = isinstance(self._unwrap(), PeftModel)
        if missing and self.state.global_step and not adapter:
            raise UserError(
                f"output_dir: {files.of_run} is missing or damaged, or is of other pairs. It holds the "
                f"log-probabilities of the model before training, and at step {self.state.global_step} its weights "
                "have changed: a run without an adapter resumes with the same pairs alone. Copy the file beside the "
                "checkpoints, take the changes of rows and data.max_length back, or start again with --resume never."
            )
        if is_first_rank():
            computed = f"computing {len(missing):,} of {sum(map(len, self._splits)):,} sequences, " if missing else ""
            print(f"reference: {computed}kept in {file if file and not missing else files.cached}", flush=True)
        if missing:
            self._compute_reference(table, missing, files)
            if self._step_log:
                self._step_log.restart_clock()
        if broken := list_missing(table, self._splits):
            split, sequence = broken[0]
            places = ", ".join(self._splits[split].places(sequence)[::2][:3])
            raise UserError(
                "model: before training its log-probabilities of answers are not finite in "
                f"{format_count(len(broken), 'sequence')}, the first of which has {places}. Inspect them, or load "
                "the model in another model.dtype."
            )
        self._write_reference(files, table, cached=False)
        self._reference = torch.from_numpy(table).to(self.args.device)

    def _computation(self) -> dict[str, Any]:
        """Return all besides model, tokens and pairs that changes the reference's numbers."""
        model, config = self._unwrap(), self.model.config
        recipe = self._recipe.model_dump(mode="json", include={"quantization": True, "model": {"dtype", "float8"}})
        return {
            **recipe,
            "commit": getattr(config, "_commit_hash", None),
            "dtype": str(model.dtype),
            "mixed_precision": self.accelerator.mixed_precision,
            "attention": config._attn_implementation,
        }

    def _write_reference(self, files: ReferenceFiles, table: Table, *, cached: bool) -> None:
        """Write one of the files on the first process. Raises UserError on all processes if that fails."""
        write = partial(files.write, table, cached=cached)
        if error := self._writer.first_error_on_any_rank(write if is_first_rank() else lambda: None):
            raise UserError(f"{error}.")

    def _compute_reference(self, table: Table, missing: list[tuple[int, int]], files: ReferenceFiles) -> None:
        """Compute what is missing with the model that will be trained; an adapter is switched off."""
        model = self._unwrap()
        bar = self._step_log.part("reference", len(missing), "sequences") if self._step_log else None

        def score(item: dict[str, Any]) -> torch.Tensor:
            inputs = self._prepare_inputs(self.data_collator([item]))
            numbers, documents, _ = inputs.pop(PAIRS), inputs.pop(DOCUMENTS), inputs.pop(BATCH_INFO)
            with self.compute_loss_context_manager():
                _, scores = self._score(self.model_wrapped, inputs, documents, len(numbers))
            if bar:
                bar.advance(self.accelerator.num_processes)
            self._preemption_callback.on_prediction_step(self.args, self.state, self.control)
            return torch.stack([scores.chosen, scores.rejected], dim=1)

        without_adapter = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        try:
            with evaluation_mode(self.model_wrapped), torch.no_grad(), without_adapter:
                write = partial(self._write_reference, files, cached=True)
                fill_table(table, missing, self._splits, score, self.accelerator, write)
        finally:
            if bar:
                bar.finish()
