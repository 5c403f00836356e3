"""Pairs: rows with a chosen and a rejected answer -> two conversations with the same prompt.

| `chosen` and `rejected`                   | the prompt                                                              |
|-------------------------------------------|-------------------------------------------------------------------------|
| conversations (Multifaceted Collection)   | the messages that both begin with, up to the first answer that differs  |
| answers: lists of turns, turns, or texts  | `PROMPTS` or `TURN_COLUMNS`: a text, or a list of turns                 |

Conversations may be transcripts: texts with `\\n\\nHuman:` or `\\n\\nAssistant:` before each turn (hh-rlhf).
A list that begins with an answer is one of answers. A prompt of text may have `input` or `context` (as of alpaca) and
`history` beside it; some data sets have `input` alone. The other columns of all formats are read too: a system message
beside the pair is that of both halves. A prompt column beside complete conversations is not read again.

The answers of the prompt are not trained (`train: false`), as those of prompt_completion. What differs must begin with
an answer in both halves.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from train.data.sources.columns import (
    CONTEXTS,
    RawRow,
    choose_column,
    is_list_of_turns,
    read_history,
    read_variables,
    require,
    require_text,
    with_context,
)
from train.data.sources.formats import BESIDE, Conversation, complete, detect, without
from train.data.sources.loss_weights import LOSS_WEIGHT, weight_of
from train.data.sources.row_errors import RowError, check_text, first_filled
from train.data.sources.turns import Message, new_message, read_turns
from train.data.sources.unread_text import Unread

PREFERENCE = "preference"
"""The format of pairs."""
HALVES = ("chosen", "rejected")
TURN_COLUMNS = ("prompt", "conversations", "messages")
PROMPTS = ("prompt", "user_prompt", "instruction", "question", "query")
_TURN_OF_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
_WITH_CONTEXT = ("instruction", "question", "query")
_WEIGHT_KEYS = frozenset(("train", LOSS_WEIGHT))


class Pair(NamedTuple):
    """The two conversations of a pair. `answer`: the number of the first message, from 0, in which they differ."""

    chosen: Conversation
    rejected: Conversation
    answer: int


def detect_with_pairs(columns: Iterable[str]) -> str:
    """Return the format with these columns, `PREFERENCE` before all others. Raises UserError if no format fits."""
    names = list(columns)
    return PREFERENCE if set(HALVES) <= set(names) else detect(names)


def read_pair(row: RawRow, place: str, *, ignore: Collection[str] = (), unread: Unread | None = None) -> Pair:
    """Return the two conversations of a row. Raises RowError.

    `ignore`, `unread`: as of `read_row`.
    """
    unread = {} if unread is None else unread
    row = without(row, ignore, unread)
    chosen_turns, rejected_turns = (_read_half(row, column, unread) for column in HALVES)
    columns = {*BESIDE, *HALVES}
    if "assistant" in (chosen_turns[0]["role"], rejected_turns[0]["role"]):
        prompt, prompt_columns = _read_prompt(row, unread)
        columns |= prompt_columns
    else:  # the column repeats a message
        prompt = []
        texts = {turn["content"].strip() for turn in chosen_turns}
        columns |= {name for name in PROMPTS if isinstance(row.get(name), str) and row[name].strip() in texts}
    conversations = []
    for number, turns in enumerate((chosen_turns, rejected_turns)):
        before = [dict(turn) for turn in prompt] if turns[0]["role"] == "assistant" else []
        messages, tools = complete(row, before + turns, columns, {} if number else unread)
        conversations.append(Conversation(messages, tools, place, read_variables(row)))
    answer = _find_answers(conversations[0].messages, conversations[1].messages)
    return Pair(conversations[0], conversations[1], answer)


def _read_half(row: RawRow, column: str, unread: Unread) -> list[Message]:
    """Return the turns of `chosen` or `rejected`: at least one."""
    value = require(row, column)
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        parts = _TURN_OF_TRANSCRIPT.split(value)[1:]
        value = [{"role": role, "content": text.strip()} for role, text in zip(parts[::2], parts[1::2], strict=True)]
    if isinstance(value, str) and not is_list_of_turns(value):
        return [new_message("assistant", check_text(value, f"`{column}`"))]
    turns = read_turns([value] if isinstance(value, dict) else value, column, unread)
    if not turns:
        raise RowError("empty content", f"`{column}` has no message")
    return turns


def _read_prompt(row: RawRow, unread: Unread) -> tuple[list[Message], set[str]]:
    """Return the messages before the answers, and the columns that they were read from."""
    has_text = any(isinstance(row.get(name), str) and row[name].strip() for name in (*PROMPTS, *CONTEXTS))
    turns = next((name for name in TURN_COLUMNS if is_list_of_turns(row.get(name))), None)
    if turns == "prompt" or (turns and not has_text):  # beside a text, `messages` may be the chosen conversation
        return read_turns(row[turns], turns, unread), {turns}
    column = choose_column(row, PROMPTS)
    columns = {"history", *PROMPTS}
    question = require_text(row, column) if column in row or not first_filled(row, CONTEXTS) else ""
    if not question or column in _WITH_CONTEXT:
        question = with_context(row, question)
        columns |= {*CONTEXTS}
    return [*read_history(row), new_message("user", question)], columns


def _find_answers(chosen: list[Message], rejected: list[Message]) -> int:
    """Return the number of the first message that differs, and turn off the training of answers before it.

    Raises RowError if none differs, if it isn't an answer, if it follows an answer, or if no answer from there on is
    trained.
    """
    same = 0
    for own, other in zip(chosen, rejected, strict=False):
        if _without_weight(own) != _without_weight(other):
            break
        same += 1
    if same == len(chosen) == len(rejected):
        raise RowError("identical answers", "`chosen` and `rejected` are the same")
    for column, messages in zip(HALVES, (chosen, rejected), strict=True):
        if same == len(messages) or messages[same]["role"] != "assistant":
            role = messages[same]["role"] if same < len(messages) else "missing"
            detail = f"the first message that differs, {same + 1}, is no answer in `{column}` ({role})"
            raise RowError("different prompts", detail)
        if same and messages[same - 1]["role"] == "assistant":
            detail = f"message {same}, before the answers, is an answer too: a prompt ends with what is answered"
            raise RowError("different prompts", detail)
        if messages[-1]["role"] != "assistant":
            raise RowError("no assistant turn", f"`{column}` ends with a message of the role {messages[-1]['role']}")
        for message in messages[:same]:
            if message["role"] == "assistant":
                message["train"] = False
                message.pop(LOSS_WEIGHT, None)
        if not any(weight_of(message) for message in messages[same:] if message["role"] == "assistant"):
            raise RowError("no assistant turn", f"each answer of `{column}` has a loss switch that turns it off")
    return same


def _without_weight(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in _WEIGHT_KEYS}
