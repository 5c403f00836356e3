"""Options of `turns`: the model, the conversations, and the judge of SysBench's."""

from pydantic import Field

from train.errors import UserError
from train.evaluation.answer_options import AnswerOptions
from train.evaluation.command_options import option_of
from train.evaluation.judge_options import JudgeOptions
from train.evaluation.turns.histories import History
from train.formatting import format_count
from train.recipe import PathText

CONVERSATIONS = 60
"""Default number of the built-in conversations."""
MAX_NEW_TOKENS, SYSBENCH_MAX_NEW_TOKENS = 96, 2048
"""Default limits of an answer. The second is that of SysBench's own code."""


class TurnsOptions(JudgeOptions, AnswerOptions):
    """One run: the model, the conversations and the results."""

    turns: int = Field(default=5, ge=1)
    """User turns of a conversation, at most the number of held-out questions."""
    push_back_at: int | None = Field(default=3, ge=1)
    """Turn in which the user asks to drop the rule, from 1 (the default is at most the last turn); null = only
    conversations without such a turn."""
    history: History = "own"
    """Answers that stand before a turn: own = the model's; reference = right answers that obey the rule."""
    conversations: int | None = Field(default=None, ge=1)
    """Conversations (default 60, each of them with and without the push-back; all of SysBench, from the first)."""
    sysbench: PathText | None = None
    """SysBench's file, to measure its conversations in place of the built-in ones. Needs a judge."""
    no_gain: bool = False
    """Leave out the system gain of a local model, which scores the reference answers."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens of an answer (default 96, for SysBench 2048)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the conversations, of the intervals and of sampled answers."""

    def token_limit(self) -> int:
        """Return the maximum tokens of an answer."""
        return self.max_new_tokens or (SYSBENCH_MAX_NEW_TOKENS if self.sysbench else MAX_NEW_TOKENS)

    def push_back_turn(self) -> int | None:
        """Return the turn of the push-back. Raises UserError if it is named and no conversation has it."""
        if self.push_back_at is None or self.push_back_at <= self.turns:
            return self.push_back_at
        if "push_back_at" not in self.model_fields_set:
            return self.turns
        raise UserError(
            f"--push-back-at {self.push_back_at}: a conversation has {format_count(self.turns, 'turn')} (--turns). "
            "Name one of them, or null for none."
        )

    def refuse_contradictions(self) -> None:
        """Raise UserError for options that belong to the other conversations, and for fields of --extra."""
        of_set = [name for name in ("turns", "push_back_at", "no_gain") if name in self.model_fields_set]
        if not self.sysbench:
            self.refuse_judge(
                "a program judges the built-in conversations. Leave it out, or name SysBench's file: --sysbench FILE."
            )
        if of_set and self.sysbench:
            raise UserError(
                f"{option_of(of_set[0])}: only the built-in conversations have that. Leave it out, or leave --sysbench "
                "out."
            )
        self.refuse_extra()
