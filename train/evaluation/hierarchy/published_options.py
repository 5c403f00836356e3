"""Options of the published sets in `evaluate.py hierarchy`."""

from pydantic import Field

from train.errors import UserError
from train.evaluation.answer_options import AnswerOptions
from train.evaluation.judge_options import JudgeOptions
from train.llm.request import Decoding
from train.recipe import PathText


class PublishedOptions(JudgeOptions, AnswerOptions):
    """The published sets to measure besides ours, and the judge of RealGuardrails."""

    tensortrust: PathText | None = None
    """Folder with extraction.jsonl, hijacking.jsonl and helpful.jsonl, from normster/SystemCheck on GitHub."""
    realguardrails: PathText | None = None
    """Hub id normster/SystemCheck, or a folder with its handwritten.jsonl and distractors.jsonl; needs a judge."""
    published_max_new_tokens: int = Field(default=1024, ge=1)
    """Maximum tokens of an answer in the published sets; we found no limit of their authors'."""

    def refuse_unused(self) -> None:
        """Raise UserError for options of sets that are not measured."""
        if not self.realguardrails:
            self.refuse_judge(
                "a program judges all sets but RealGuardrails. Leave it out, or name that set: --realguardrails PATH."
            )
        is_published = self.tensortrust or self.realguardrails
        if "published_max_new_tokens" in self.model_fields_set and not is_published:
            raise UserError(
                "--published-max-new-tokens: no published set is measured. Leave it out, or name one: --tensortrust "
                "PATH, --realguardrails PATH. --max-new-tokens is the limit of the built-in set."
            )

    def published_decoding(self) -> Decoding:
        """Return the sampling settings of the answers in the published sets: greedy, as their authors decode."""
        return Decoding.from_settings(self.published_max_new_tokens, temperature=0.0, extra=self.extra)
