"""Options of the published sets in `evaluate.py hierarchy`."""

from pydantic import Field

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

    def published_decoding(self) -> Decoding:
        """Return the sampling settings of the answers in the published sets: greedy, as their authors decode."""
        return Decoding.from_settings(self.published_max_new_tokens, temperature=0.0, extra=self.extra)
