"""Trainer whose evaluations measure more than the loss, can be interrupted, and leave training as it is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig

from train.loop.checkpointing import CheckpointingTrainer
from train.loop.loss import TOKEN_METRICS, MeanMetrics
from train.loop.metrics_log import StepLog
from train.loop.preemption import Preemption
from train.loop.preemption_callback import EvaluationStoppedError, PreemptionCallback
from train.loop.source_figures import SourceFigures
from train.loop.tracking import log_samples
from train.recipe import Recipe
from train.samples.evaluator import ValidationSamples
from train.samples.rows import SampledRow
from train.system_gain.evaluator import ValidationGain
from train.system_gain.variants import VariantRows


class Measurement(Protocol):
    """A measurement of the model at each evaluation, besides the loss. `answers`: number that it handles."""

    name: str
    answers: int

    def measure(
        self, model: Any, accelerator: Accelerator, step: int, prefix: str, on_progress: Callable[[int], None]
    ) -> Mapping[str, float]:
        """Return the metrics by name: the same on all processes, which must all call it.

        `on_progress` is called with numbers of answers, as often on each process.
        """


class EvaluatingTrainer(CheckpointingTrainer):
    """CheckpointingTrainer with our evaluation.

    Its loss is the mean over TOKENS, independent of the batches. System gain and samples are measured beside it.
    """

    mean_metrics: MeanMetrics = TOKEN_METRICS
    """Metrics of training and evaluation that the model's outputs decide."""
    _evaluated: torch.Tensor
    """Their sums in the evaluation that is running."""
    _evaluated_sources: SourceFigures
    """Those of each source, set up by the subclass."""

    def __init__(
        self,
        recipe: Recipe,
        arguments: SFTConfig,
        run: Mapping[str, Any],
        *,
        callbacks: list[TrainerCallback],
        preemption: Preemption | None,
        gain: VariantRows | None,
        samples: Sequence[SampledRow],
        **keywords: Any,
    ) -> None:
        """Set up the trainer; arguments as of JanusTrainer and CheckpointingTrainer."""
        super().__init__(recipe, arguments, run, callbacks=callbacks, **keywords)
        self._preemption = preemption or Preemption(recipe.output_dir, recipe.save)
        self._preemption_callback = PreemptionCallback(self._preemption, self.accelerator)
        self._step_log = next((callback for callback in callbacks if isinstance(callback, StepLog)), None)
        self._measurements = list(self._set_up_measurements(recipe, gain, samples))

    def _set_up_measurements(
        self, recipe: Recipe, gain: VariantRows | None, samples: Sequence[SampledRow]
    ) -> Iterator[Measurement]:
        if gain:
            yield ValidationGain(recipe, gain.rows, self.args.per_device_eval_batch_size)
        if recipe.evaluation and samples:

            def log(step: int, of_step: Sequence[Mapping[str, Any]]) -> None:
                log_samples(self.callback_handler.callbacks, step, of_step)

            show: Callable[[str], None] = self._step_log.show if self._step_log else print
            yield ValidationSamples(
                recipe.evaluation, samples, self.processing_class, recipe.output_dir, show=show, log=log
            )

    @property
    def is_stopping(self) -> bool:
        """Return whether the run ends with the next checkpoint."""
        return self._preemption.reason is not None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and leave the random state of training unchanged."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Run an evaluation that is due in training; if the run has to stop, it is left to the next start.

        That of training.eval_on_start is due when a run begins, not when it resumes.
        """
        if kwargs.get("skip_scheduler") and self._resumed_settings:  # at step 0 too, where one may be pending
            return {}
        try:
            if self._preemption.reason:
                raise EvaluationStoppedError
            self._run_state.evaluation_is_due = False
            return super()._evaluate(*args, **kwargs)
        except EvaluationStoppedError:
            self._run_state.evaluation_is_due = True
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return whether this is the best model. One whose evaluation is pending is kept like the best."""
        return self._run_state.evaluation_is_due or super()._determine_best_metric(metrics, trial)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. transformers weighs each batch alike; here each token counts once, in the loss with its weight."""
        size = self.mean_metrics.sums
        self._evaluated = torch.zeros(size, dtype=torch.float64, device=self.args.device)
        self._evaluated_sources.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        own_sums = torch.cat([self._evaluated, self._evaluated_sources.sums.flatten()])
        sums = self.accelerator.reduce(own_sums, reduction="sum").tolist()
        means = {f"{metric_key_prefix}_{name}": mean for name, mean in self.mean_metrics.means(sums[:size]).items()}
        output.metrics.update(means | self._evaluated_sources.metrics(sums[size:], f"{metric_key_prefix}_"))
        for measurement in self._measurements:
            output.metrics.update(self._measure(measurement, metric_key_prefix))
        return output

    def _measure(self, measurement: Measurement, prefix: str) -> Mapping[str, float]:
        """Return the metrics of a measurement. Raises EvaluationStoppedError if the run has to stop."""
        progress = self._step_log.part(measurement.name, measurement.answers, "answers") if self._step_log else None

        def on_progress(answers: int) -> None:
            if progress:
                progress.advance(answers)
            self._preemption_callback.on_prediction_step(self.args, self.state, self.control)

        try:
            step = self.state.global_step
            return measurement.measure(self.model_wrapped, self.accelerator, step, prefix, on_progress)
        finally:
            if progress:
                progress.finish()
