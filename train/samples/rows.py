"""Rows of a run's samples: conversations that the model continues, and the programs that judge its answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator
from transformers import PreTrainedTokenizerBase

from train.errors import UserError
from train.formatting import format_count
from train.ifeval.checkers import Checkers
from train.ifeval.rows import SKIPPED, IFEvalRow, read_rows
from train.pressure.conversations import Message, result_in_user_turn
from train.pressure.evaluation_set import PressureRow, build_rows
from train.pressure.rule_rows import read_rule_rows
from train.pressure.rules import RULES
from train.pressure.selection import select_rows
from train.pressure.tool_results import why_no_tool_turns
from train.pressure.turns import TurnsConversation, build_turns_set
from train.recipe import EvaluationSection, Recipe
from train.storage.jsonl_rows import ChatMessage, read_jsonl_rows

Row = TypeVar("Row")
_PROMPT_CONTENTS = "A row holds messages, which have a user turn."


@dataclass(frozen=True)
class SampledRow:
    """A conversation of one or more user turns.

    - `kind`: key of section `evaluation`; `key`: name of the row in samples.jsonl.
    - `messages`: returns the conversation up to the next user turn, given the answers to the turns before.
    - `judge`: returns whether the answer to a turn, counted from 0, follows the system message; None = not judged.
    """

    kind: str
    key: str
    messages: Callable[[Sequence[str]], list[Message]]
    judge: Callable[[int, str], bool] | None = None
    turns: int = 1


class _PromptRow(BaseModel):
    """A line of the file of `prompts`."""

    model_config = ConfigDict(strict=True)

    messages: list[ChatMessage] = Field(min_length=1)

    @field_validator("messages")
    @classmethod
    def _drop_answer(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1].role != "user":
            raise ValueError("must end with a user turn, or with an answer to one")
        return messages


def load_sample_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[SampledRow]:
    """Return the rows that each evaluation samples; empty if the recipe names none.

    `tokenizer`: with the template of the run. Raises UserError for a file that can't be read, and for a prompt that the
    template refuses.
    """
    section = recipe.evaluation
    if section is None:
        return []
    rows = [
        *_rule_rows(section),
        *_hierarchy_rows(section, tokenizer),
        *_turns_rows(section),
        *_ifeval_rows(section),
        *_prompt_rows(section),
    ]
    for row in rows:
        try:
            render_prompt(tokenizer, row.messages([]))
        except Exception as error:  # templates raise errors of their own
            raise UserError(f"evaluation.{row.kind}: {row.key}: the chat template refuses it: {error}") from error
    return rows


def describe_samples(recipe: Recipe, rows: Sequence[SampledRow]) -> str | None:
    """Return a sentence on the answers of an evaluation; None if the recipe names none."""
    if recipe.evaluation is None or not rows:
        return None
    kinds = dict.fromkeys(row.kind for row in rows)
    counts = (f"{sum(row.turns for row in rows if row.kind == kind):,} of {kind}" for kind in kinds)
    answers = format_count(sum(row.turns for row in rows), "answer")
    return (
        f"each evaluation generates {answers} ({', '.join(counts)}) of at most "
        f"{format_count(recipe.evaluation.max_new_tokens, 'token')}"
    )


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Return the text that the model continues."""
    prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return str(prompt)


def _rule_rows(section: EvaluationSection) -> Iterator[SampledRow]:
    if section.rules is None:
        return
    path = Path(section.rules.path)
    for place, row in _spread([*read_rule_rows(path, RULES, "evaluation.rules.path: ")], section.rules.rows):
        *prompt, _ = row["messages"]
        held = partial(RULES[row["rule"]].check, prompt[-1]["content"])
        yield _single_turn("rules", _key(path, place), prompt, held)


def _hierarchy_rows(section: EvaluationSection, tokenizer: PreTrainedTokenizerBase) -> Iterator[SampledRow]:
    if section.hierarchy is None:
        return
    in_user_turn = bool(why_no_tool_turns(tokenizer, {}))
    for row in select_rows(build_rows(), section.hierarchy.settings, per_setting=section.hierarchy.rows):
        messages = result_in_user_turn(row.messages) if in_user_turn else row.messages
        yield _single_turn("hierarchy", row.key, messages, partial(_is_held, row))


def _turns_rows(section: EvaluationSection) -> Iterator[SampledRow]:
    settings = section.turns
    if settings is None:
        return
    try:
        rows = build_turns_set(settings.conversations, settings.turns, settings.push_back_at)
    except ValueError as error:
        raise UserError(f"evaluation.turns.turns: {error}. Write fewer turns.") from error
    for row in rows:
        conversation = row.push_back or row.plain
        held = partial(_is_held_in_turn, conversation)
        yield SampledRow("turns", row.key, conversation.messages, held, settings.turns)


def _ifeval_rows(section: EvaluationSection) -> Iterator[SampledRow]:
    """Yield the rows that the official scoring doesn't skip."""
    if section.ifeval is None:
        return
    path = Path(section.ifeval.path)
    try:
        checkers = Checkers()
        rows = [row for row in read_rows(path) if not row.skipped]
        for row in rows:
            checkers.is_randomized(row)  # raises for arguments that no checker takes
        if not rows:
            raise UserError(f"{path}: every row has a rule that is skipped ({', '.join(SKIPPED)})")
    except UserError as error:
        raise UserError(f"evaluation.ifeval: {error}") from error
    for row in _spread(rows, section.ifeval.rows):
        yield _single_turn("ifeval", str(row.key), list(row.messages), partial(_follows_all, checkers, row))


def _prompt_rows(section: EvaluationSection) -> Iterator[SampledRow]:
    if section.prompts is None:
        return
    path = Path(section.prompts.path)
    rows = [*read_jsonl_rows(path, _PromptRow, _PROMPT_CONTENTS, "evaluation.prompts.path: ")]
    for place, _, row in _spread(rows, section.prompts.rows):
        yield _single_turn("prompts", _key(path, place), [message.model_dump() for message in row.messages])


def _single_turn(kind: str, key: str, messages: list[Message], held: Callable[[str], bool] | None = None) -> SampledRow:
    judge = None if held is None else (lambda turn, answer: held(answer))
    return SampledRow(kind, key, lambda answers: messages, judge)


def _follows_all(checkers: Checkers, row: IFEvalRow, answer: str) -> bool:
    return all(checkers.verdict(row, answer).strict)


def _is_held(row: PressureRow, answer: str) -> bool:
    return row.judge(answer).held


def _is_held_in_turn(conversation: TurnsConversation, turn: int, answer: str) -> bool:
    return conversation.judge(turn, answer).held


def _spread(rows: list[Row], limit: int) -> list[Row]:
    """Return at most `limit` rows at even distances, from the first."""
    count = min(limit, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def _key(path: Path, place: str) -> str:
    """Return the name of a row of a file: `held_out.jsonl:12`."""
    return f"{path.name}:{place.rpartition(':')[2]}"
