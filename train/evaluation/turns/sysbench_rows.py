"""Conversations of SysBench (arXiv:2408.10943): a system message, five user turns, and criteria for each answer.

The file is system_benchmark_eval_datas.json as the authors publish it. It has no licence: nothing of it is shipped.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from train.errors import UserError
from train.evaluation.required_paths import require_file
from train.evaluation.turns.histories import Dialogue
from train.storage.jsonl_rows import ChatMessage, check_row

OPTION = "--sysbench"
TURNS = 5
"""User turns of a conversation."""
Alignment = Literal["align", "misalign"]
_ROLES = ["system", *["user", "assistant"] * TURNS]
_CONTENTS = (
    "The file is a list of conversations with system_id, rounds_related, messages (a system message, then "
    f"{TURNS} times a user turn and its reference answer) and prompt_infos (user turn -> alignment and criteria)."
)


@dataclass(frozen=True)
class Criterion:
    """A criterion of an answer, and its type (format, style, role, ...)."""

    text: str
    type: str


@dataclass(frozen=True)
class Turn:
    """A user turn, the reference answer to it, and the criteria of an answer.

    `alignment`: `misalign` if the user asks for something that the system message forbids.
    """

    user: str
    reference: str
    alignment: Alignment
    criteria: tuple[Criterion, ...]


@dataclass(frozen=True)
class Conversation:
    """A system message and its user turns. `dependent`: later turns build on earlier ones."""

    id: int | str
    system: str
    dependent: bool
    turns: tuple[Turn, ...]

    @property
    def dialogue(self) -> Dialogue:
        """The system message, the user turns and the reference answers."""
        users, references = ([getattr(turn, part) for turn in self.turns] for part in ("user", "reference"))
        return Dialogue(self.system, tuple(users), tuple(references))


class _Published(BaseModel):
    """An object of the file; further keys are ignored."""

    model_config = ConfigDict(strict=True)


class _PublishedCriterion(_Published):
    criteria_content: str
    criteria_type: str


class _PublishedTurn(_Published):
    alignment: Alignment
    criteria: dict[str, _PublishedCriterion] = Field(min_length=1)


class _PublishedConversation(_Published):
    system_id: int | str
    rounds_related: bool
    messages: list[ChatMessage]
    prompt_infos: dict[str, _PublishedTurn]

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        roles = [message.role for message in self.messages]
        if roles != _ROLES:
            raise ValueError(f"`messages` has the roles {', '.join(roles) or 'of no message'}")
        for turn, message in enumerate(self.messages[1::2], 1):
            if message.content not in self.prompt_infos:
                raise ValueError(f"`prompt_infos` has no entry for user turn {turn}, {message.content[:60]!r}")
        return self


def read_conversations(path: str) -> list[Conversation]:
    """Return the conversations of a published file. Raises UserError that names the conversation and the key."""
    require_file(OPTION, path)
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{OPTION} {path}: not UTF-8: {error}. {_CONTENTS}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{OPTION} {path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}. {_CONTENTS}"
        ) from error
    except OSError as error:
        raise UserError(f"{OPTION} {path}: cannot be read: {error.strerror}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{OPTION} {path}: holds no list of conversations. {_CONTENTS}")
    places: dict[int | str, int] = {}
    conversations = []
    for number, row in enumerate(rows, 1):
        place = f"{OPTION} {path}: conversation {number}"
        published = check_row(place, row, _PublishedConversation, _CONTENTS)
        first = places.setdefault(published.system_id, number)
        if first != number:
            raise UserError(f"{place}: system_id {published.system_id} is that of conversation {first}, too.")
        conversations.append(_conversation(published))
    return conversations


def _conversation(published: _PublishedConversation) -> Conversation:
    system, *rest = (message.content for message in published.messages)
    turns = []
    for user, reference in zip(rest[::2], rest[1::2], strict=True):
        details = published.prompt_infos[user]
        criteria = tuple(Criterion(each.criteria_content, each.criteria_type) for each in details.criteria.values())
        turns.append(Turn(user, reference, details.alignment, criteria))
    return Conversation(published.system_id, system, published.rounds_related, tuple(turns))
