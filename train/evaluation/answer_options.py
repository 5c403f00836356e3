"""Options of a command that asks a model and judges its answers: sampling settings and the folder of the results."""

from pathlib import Path

from pydantic import Field

from train.evaluation.measured_models import warn_of_other_models
from train.evaluation.models.options import ModelOptions, refuse_extra_fields
from train.evaluation.required_paths import require_model
from train.evaluation.results_dir import fingerprint_of, output_folder
from train.llm.request import Decoding
from train.recipe import PathText


class AnswerOptions(ModelOptions):
    """The model, its answers and the results. A command declares a key again for another default or description."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens of an answer."""
    temperature: float | None = Field(default=0.0, ge=0)
    """Sampling temperature; 0 = greedy; null = not sent, so the server's own."""
    seed: int = Field(default=0, ge=0)
    """Seed of the intervals and of sampled answers."""
    output_dir: PathText | None = None
    """Folder for all results (default the folder of --model)."""

    def token_limit(self) -> int:
        """Return the maximum tokens of an answer. A command whose `max_new_tokens` may be null overrides this."""
        assert self.max_new_tokens is not None
        return self.max_new_tokens

    def decoding(self) -> Decoding:
        """Return the sampling settings of the answers."""
        return Decoding.from_settings(
            max_tokens=self.token_limit(),
            temperature=self.temperature,
            seed=self.seed if self.temperature else None,
            extra=self.extra,
        )

    def refuse_extra(self) -> None:
        """Raise UserError for a request field that --extra cannot set."""
        own = {
            "max_tokens": ("--max-new-tokens", self.token_limit()),
            "temperature": ("--temperature", self.temperature),
            "seed": ("--seed", self.seed if self.temperature else None),
        }
        refuse_extra_fields("--extra", self.extra, own)

    def results_folder(self) -> Path:
        """Return the folder for the results, created if it is missing; print a warning if another model's are there.

        Raises UserError, also for a missing model.
        """
        if not self.server:
            require_model("--model", self.model)
        remedy = "For a hub id or a server, add --output-dir FOLDER."
        folder = output_folder(self.model, self.output_dir, remedy=remedy)
        warn_of_other_models(folder, self.model)
        return folder

    def model_files(self) -> str | None:
        """Return a checksum of the files of a local model, which another training in the same folder changes."""
        if self.server:
            return None
        from train.evaluation.models.local import fingerprint  # imports torch

        return fingerprint_of(fingerprint(self.model))
