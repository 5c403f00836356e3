"""System gain at turn k: how much likelier the reference answer of a turn is under the conversation's own message.

    L(k | s) = sum of ln p over the tokens of reference answer k, after message s and the reference answers before it
    gain     = (L(k | own message) - L(k | another rule's message)) / tokens of answer k       nats per token

and the same over no message. One forward pass scores all turns of a conversation under one message. Nothing is
generated and nobody judges.

Earlier reference answers obey the rule too, so they show its form. The gain therefore falls from turn to turn even in a
model that never forgets its message: compare models at the same turn, not turns of one model.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from train.data.loss_mask import EncodedRow
from train.data.sources.formats import Conversation, RowError
from train.data.tokens.workers import RowTokenizer
from train.errors import UserError
from train.evaluation.models.local import LocalGenerator
from train.pressure.conversations import Message
from train.pressure.rules import RULES
from train.pressure.turns import TurnsConversation, join_turns
from train.progress import progress_bar
from train.system_gain.log_likelihood import compute_span_log_likelihoods
from train.system_gain.metric import measure_row
from train.system_gain.score_cache import ScoreCache

Gains = tuple[tuple[float, ...], ...]
"""For each turn the four MEASURES of train/system_gain/metric.py."""


def measure_gains(
    generator: LocalGenerator, conversations: Sequence[TurnsConversation], cache: Path, seed: int = 0
) -> list[Gains]:
    """Return the gains of each conversation. Scores are kept in `cache`, and not computed again.

    Raises UserError if a conversation cannot be encoded as one answer for each turn, or a likelihood is not finite.
    """
    rows = [
        Conversation(_with_message(conversation, message), None, f"conversation {number}")
        for number, conversation in enumerate(conversations, 1)
        for message in (conversation.message, draw_other_message(conversation, seed), "")
    ]
    encoded = _encode(generator, rows)
    sums = iter(_score(generator, [piece for pieces in encoded for piece in pieces], cache))
    spans = [[span for _ in pieces for span in next(sums)] for pieces in encoded]
    gains: list[Gains] = []
    for number in range(0, len(rows), 3):
        own, other, none = spans[number : number + 3]
        tokens = [int(end - start) for piece in encoded[number] for start, end in piece.trained]
        turns = range(len(tokens))
        gains.append(tuple(measure_row(own[turn], [other[turn]], none[turn], tokens[turn]) for turn in turns))
    if broken := [number for number, of_turns in enumerate(gains, 1) if not np.isfinite(of_turns).all()]:
        raise UserError(
            f"system gain: the model gives answers of conversation {broken[0]} no finite likelihood ({len(broken)} of "
            f"{len(gains)} conversations). Check its weights, try --dtype float32, or leave the gain out: --no-gain."
        )
    return gains


def draw_other_message(conversation: TurnsConversation, seed: int) -> str:
    """Return a held-out message of another rule, the same for a conversation with and without a push-back."""
    rule = conversation.rule
    messages = [
        message
        for other in RULES.values()
        if other.name != rule.name and other.held_out == rule.held_out
        for message in other.messages("held_out")
    ]
    return random.Random(f"{seed} {conversation.message} {conversation.questions[0].question}").choice(messages)


def _with_message(conversation: TurnsConversation, message: str) -> list[Message]:
    """Return the complete conversation with its reference answers under another message, or under none."""
    return join_turns(message, conversation.user_turns, conversation.references)


def _encode(generator: LocalGenerator, rows: Sequence[Conversation]) -> list[list[EncodedRow]]:
    """Return the pieces of each row, which together have one span for each answer. Raises UserError."""
    encoded: list[list[EncodedRow]] = []
    try:
        results = list(RowTokenizer(generator.tokenizer, "assistant").encode(rows))
    except UserError as error:  # a template under which nothing can be trained
        reason = str(error).removeprefix("chat.template: ").rstrip(".")
        raise UserError(f"system gain: {reason}; or leave the gain out: --no-gain.") from error
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, RowError):
            raise UserError(f"system gain: {row.place}: {result}. Leave the gain out: --no-gain.")
        turns = sum(message["role"] == "assistant" for message in row.messages)
        if (spans := sum(len(piece.trained) for piece in result)) != turns:
            raise UserError(
                f"system gain: {row.place}: {turns} answers are {spans} under the template. Leave the gain out: "
                "--no-gain."
            )
        encoded.append(result)
    return encoded


def _score(generator: LocalGenerator, pieces: Sequence[EncodedRow], cache: Path) -> list[list[float]]:
    """Return the sums of ln p over each answer: [pieces][answers]."""
    answers = [
        [EncodedRow(piece.ids, piece.trained[span : span + 1]) for span in range(len(piece.trained))]
        for piece in pieces
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        ScoreCache(cache, json.dumps([generator.name, device])) as scores,
        progress_bar("scoring answers", total=len(pieces), unit="conversations") as scoring,
    ):
        sums = [[scores.find(answer) for answer in of_piece] for of_piece in answers]
        missing = [number for number, of_piece in enumerate(sums) if None in of_piece]
        scoring.advance(len(pieces) - len(missing))
        remaining = [pieces[number] for number in missing]
        for batch in compute_span_log_likelihoods(generator.weights, remaining) if remaining else ():
            for index, of_piece in batch.items():
                sums[missing[index]] = list(of_piece)
                scores.add(answers[missing[index]], of_piece)
            scoring.advance(len(batch))
    return [[score for score in of_piece if score is not None] for of_piece in sums]
