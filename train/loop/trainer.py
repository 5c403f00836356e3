"""TRL's SFTTrainer on prepared rows, and the little that it lacks."""

import math
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from train.data.loss_mask import NOT_TRAINED
from train.data.prepare import Part, Prepared
from train.errors import UserError
from train.loop.tracking import integrations
from train.model.adapters import lora_config
from train.recipe import Recipe


def training_arguments(recipe: Recipe, end_token: str | None = None) -> SFTConfig:
    """TRL's own arguments, with what the recipe's other sections own filled in. Starts the process group, if any.

    `end_token`: what ends an answer; tokenizer and generation settings are saved to stop at it.

    Raises UserError where TRL or transformers refuses a combination of them.
    """
    settings: dict[str, Any] = {
        "use_cpu": not torch.accelerator.is_available(),
        "logging_nan_inf_filter": False,  # a loss that is not finite shall show, no mean in its place (trl#6702)
        **recipe.training,
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "max_length": None,
        "packing": False,
        "padding_free": recipe.data.packing,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "eos_token": end_token,
        "report_to": integrations(recipe.tracking),
        "disable_tqdm": True,
    }
    try:
        return SFTConfig(**settings)
    except (ValueError, TypeError, ImportError) as fault:
        raise UserError(f"training: {' '.join(str(fault).split())}") from fault


class JanusTrainer(SFTTrainer):
    """SFTTrainer whose evaluation loss is the mean over TOKENS, however they fall into batches."""

    _eval_loss_sum: torch.Tensor | float = 0.0
    _eval_tokens: torch.Tensor | float = 0.0

    def __init__(
        self,
        recipe: Recipe,
        arguments: SFTConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Prepared,
        callbacks: list[TrainerCallback],
    ) -> None:
        """Set up a run; the rows of `data` are trained as they are, already tokenized, labelled and packed.

        Raises UserError for settings that TRL or peft refuses.
        """
        try:
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=data.train.rows,
                eval_dataset=data.validation.rows if isinstance(data.validation, Part) else None,
                processing_class=tokenizer,
                peft_config=lora_config(recipe.adapter),
                callbacks=callbacks,
            )
        except ValueError as fault:  # TRL's and peft's word on settings that don't go together
            raise UserError(f"{'adapter' if recipe.adapter else 'training'}: {' '.join(str(fault).split())}") from fault
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """transformers' optimizer. Raises UserError where its package is missing: that shows only here."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except ImportError as fault:
            raise UserError(f"training.optim: {' '.join(str(fault).split())}") from fault

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """TRL's loss. In evaluation, where it is a mean over this batch, its tokens are counted beside it."""
        tokens = (inputs["labels"][:, 1:] != NOT_TRAINED).sum()
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            loss = result[0] if isinstance(result, tuple) else result
            self._eval_loss_sum = self._eval_loss_sum + loss.detach().double() * tokens
            self._eval_tokens = self._eval_tokens + tokens
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop weighs each batch alike; the loss reported here weighs each token alike."""
        self._eval_loss_sum = self._eval_tokens = 0.0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.tensor([self._eval_loss_sum, self._eval_tokens], dtype=torch.float64, device=self.args.device)
        loss_sum, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / tokens
        return output


def sequences_per_step(arguments: SFTConfig) -> int:
    """Rows of all processes and all accumulation steps in one optimizer step."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def optimizer_steps(rows: Dataset, arguments: SFTConfig) -> int:
    """Optimizer steps of the whole run, as transformers counts them: a last, smaller step ends each epoch."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    micro_batches = -(-len(rows) // (arguments.train_batch_size * arguments.world_size))
    steps_an_epoch = max(-(-micro_batches // arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.num_train_epochs * steps_an_epoch)
