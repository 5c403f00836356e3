"""Trainer that saves complete models: weights that are verified, the files beside them, and the upload to the hub."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trl import SFTConfig, SFTTrainer

from train.errors import UserError
from train.loop.checkpoint.verification import check_saved
from train.loop.checkpoint.weights import save_weights
from train.loop.checkpoint.writer import CheckpointWriter
from train.loop.side_files import (
    describe_error,
    is_disk_error,
    list_final_files,
    list_side_files,
    write_side_files,
)
from train.model.inference import has_partitioned_weights
from train.recipe import Recipe


class SavingTrainer(SFTTrainer):
    """SFTTrainer whose saved models are complete, or the run says what is missing."""

    def __init__(self, recipe: Recipe, arguments: SFTConfig, **keywords: Any) -> None:
        """Set up TRL's trainer. `keywords`: further arguments of SFTTrainer."""
        super().__init__(args=arguments, **keywords)
        self._recipe = recipe
        self._writer = CheckpointWriter(recipe.output_dir, recipe.save, recipe.training.get("save_total_limit"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the finished model with its side files, or with `_internal_call` a checkpoint's model.

        Raises OSError for a checkpoint and UserError for a finished model, on every rank, if the weights can't be
        written or are incomplete. Side files that can't be written and failed uploads are warnings.
        """
        save = super().save_model
        if _internal_call:
            if output_dir is not None:  # None: push_to_hub saves again what has just been saved
                self._writer.raise_on_all_ranks(lambda: save(output_dir, True))
            return
        folder = Path(output_dir or self.args.output_dir)
        for act in (lambda: save(str(folder), True), lambda: self._check_weights(folder)):
            if error := self._writer.first_error_on_any_rank(act):
                raise UserError(
                    f"output_dir: the model couldn't be saved in {folder}: {error}. {self._writer.next_start_hint()}"
                )
        self.create_model_card()
        if self.args.push_to_hub:
            self._warn_if_upload_fails(
                lambda: self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the weights, then the files beside them, without training_args.bin.

        That file is a pickle, which runs code when it is opened; recipe.yaml holds the same as text.
        A side file that fails is a warning, as it can be written again. Raises OSError for the weights, and in a
        checkpoint, which needs all files, for any disk error.
        """
        if not self.args.should_save:
            return
        if state_dict and not self._recipe.adapter:
            # accelerate copies each tensor of a ZeRO-1 or -2 model, which hides which of them are tied
            untied = {name for name, _ in self.model.named_parameters()}
            for name, _ in self.model.named_parameters(remove_duplicate=False):
                if name not in untied:
                    state_dict.pop(name, None)
        folder, model = Path(output_dir or self.args.output_dir), self._unwrap()
        in_checkpoint = folder.parent == self._writer.staging_dir
        save_weights(model, folder, state_dict, sync=not in_checkpoint)
        errors = write_side_files(list_side_files(model, self.processing_class), folder)
        for error in errors.values():
            if in_checkpoint and is_disk_error(error):
                raise error
        self._warn_of_missing_files(errors, folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md and the processor into output_dir: the recipe in place of TRL's generic page."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            self._warn_of_missing_files(write_side_files(list_final_files(self._recipe), folder), folder)

    def save_after_error(self) -> None:
        """Save a model that has done all of its steps, if an evaluation or a checkpoint after them failed.

        Only on the first rank, as the others may be waiting elsewhere; never if they hold partitions of the weights.
        """
        done = 0 < self.state.max_steps <= self.state.global_step
        if not done or has_partitioned_weights(self.accelerator) or not self.is_world_process_zero():
            return
        with suppress(Exception):  # the original error says more
            self._save(self.args.output_dir)
            print(f"all {self.state.max_steps:,} steps are done: the model is in {self.args.output_dir}", flush=True)

    def _unwrap(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _check_weights(self, folder: Path) -> None:
        if self.is_world_process_zero():
            check_saved(self._unwrap(), folder)

    def _warn_of_missing_files(self, errors: Mapping[str, Exception], folder: Path) -> None:
        for name, error in errors.items():
            print(
                f"warning: {folder}: {name} couldn't be written: {describe_error(error)}. The weights are not affected."
                f" Fix that; `python -m train.loop.side_files {self.args.output_dir}` then writes it beside the "
                "finished model.",
                flush=True,
            )

    def init_hf_repo(self, token: str | None = None) -> None:
        """Create the repository on the hub. Raises UserError if that fails."""
        try:
            super().init_hf_repo(token)
        except Exception as error:  # of the network, the hub and its client, which share no class
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"training.push_to_hub: {first_line} Set HF_TOKEN in the environment to a token with write access, or "
                "remove the key and upload the finished model."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint; a failure is a warning."""
        self._warn_if_upload_fails(lambda: super(SavingTrainer, self)._push_from_checkpoint(checkpoint_folder))

    def _warn_if_upload_fails(self, upload: Callable[[], object]) -> None:
        try:
            upload()
        except Exception as error:  # of the network, the hub and its client, which share no class
            folder = self.args.output_dir
            name = self.hub_model_id or self.args.hub_model_id or Path(folder).name
            print(
                f"warning: training.push_to_hub: {folder} was not uploaded: {describe_error(error)}. The local files "
                f"are complete: after the run, `hf upload {name} {folder}` uploads the model.",
                flush=True,
            )
