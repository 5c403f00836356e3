"""Answers to conversations of several turns, each after the answers before it.

Turn k of all conversations is one batch. Under `own`, the history is what the model has answered; a turn without an
answer ends its conversation. Under `reference` all turns are asked at once, each after the reference answers. The
journal keeps every answer, so a run that was killed continues at the turn that it had reached.
"""

import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.llm.failures import RequestFailed
from train.llm.options import WAIT_FOR_SERVER
from train.llm.refusals import option_formatter
from train.llm.request import Answer, Decoding
from train.pressure.conversations import Message
from train.pressure.turns import join_turns

if TYPE_CHECKING:  # imports torch
    from train.evaluation.models.responses import OpenModel

History = Literal["own", "reference"]

NOT_ASKED = "not asked"
"""The ending of a turn after one without an answer."""


@dataclass(frozen=True)
class Dialogue:
    """System message and user turns. `references`: the answers of the history `reference`, one for each turn."""

    message: str
    user_turns: tuple[str, ...]
    references: tuple[str, ...] = ()


Answers = list[Answer | RequestFailed | None]
"""An answer for each turn, or why there is none; None for a turn that was not asked."""


def answer_turns(
    model: "OpenModel",
    dialogues: Sequence[Dialogue],
    decoding: Decoding,
    journal: Path,
    *,
    history: History = "own",
    stage: str = "turns",
    wait_for_server: float = WAIT_FOR_SERVER,
    before_asking: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> list[Answers]:
    """Return the answers to all turns of all dialogues: [dialogues][turns].

    Equal conversations are asked once, also where two dialogues share their first turns. `before_asking`: as of
    `generate_answers`, for each batch. Raises UserError.
    """
    answers: list[Answers] = [[None] * len(dialogue.user_turns) for dialogue in dialogues]
    rounds = [
        [(number, turn) for number, of_dialogue in enumerate(answers) if turn < len(of_dialogue)]
        for turn in range(max(map(len, answers), default=0))
    ]
    if history == "reference":
        rounds = [[place for of_turn in rounds for place in of_turn]]
    for round_number, asked in enumerate(rounds, 1):
        description = "answers" if history == "reference" else f"answers of turn {round_number} of {len(rounds)}"
        prompts: dict[tuple[int, int], list[Message]] = {}
        for number, turn in asked:
            dialogue = dialogues[number]
            texts = dialogue.references[:turn] if history == "reference" else _texts(answers[number][:turn])
            if texts is not None:
                prompts[number, turn] = join_turns(dialogue.message, dialogue.user_turns, texts)
        answered = _ask_once(model, prompts, decoding, journal, stage, description, wait_for_server, before_asking)
        for (number, turn), answer in answered.items():
            answers[number][turn] = answer
    return answers


def text_of(answer: Answer) -> str:
    """Return the text that stands in the history and is judged; a refusal that a server marks as one is text too."""
    return answer.text or answer.refusal or ""


def _texts(answers: Answers) -> list[str] | None:
    """Return the texts of the turns before, or None if one has no answer."""
    texts = [text_of(answer) for answer in answers if isinstance(answer, Answer)]
    return texts if len(texts) == len(answers) else None


def _ask_once(
    model: "OpenModel",
    prompts: dict[tuple[int, int], list[Message]],
    decoding: Decoding,
    journal: Path,
    stage: str,
    description: str,
    wait_for_server: float,
    before_asking: Callable[[], Coroutine[Any, Any, None]] | None,
) -> dict[tuple[int, int], Answer | RequestFailed]:
    from train.evaluation.models.responses import generate_answers

    keys = {place: json.dumps(messages) for place, messages in prompts.items()}
    distinct = {keys[place]: messages for place, messages in prompts.items()}
    if not distinct:
        return {}
    answered = generate_answers(
        model,
        list(distinct.values()),
        decoding,
        journal,
        stage=stage,
        description=description,
        wait_for_server=wait_for_server,
        before_asking=before_asking,
        format_setting=option_formatter(("temperature",)),
    )
    answer_of = {key: answer for key, [answer] in zip(distinct, answered, strict=True)}
    return {place: answer_of[key] for place, key in keys.items()}
