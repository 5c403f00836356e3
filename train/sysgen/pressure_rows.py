"""Rows of SYSGEN under pressure: the constraint as a phrase of the message, the answers, and the aligned twin."""

import random
from collections.abc import Sequence

from train.data.sources.formats import Message, RowError
from train.datagen.source_rows import NumberedRow
from train.datagen.stage_client import StageClient
from train.pressure.generated import Exchange, PressureRow, ask_row, draw_setting, plan_row, plan_twin
from train.sysgen.config import SysgenConfig
from train.sysgen.result import RowResult
from train.sysgen.tags import Phrase


async def answer_under_pressure(
    client: StageClient,
    config: SysgenConfig,
    result: RowResult,
    exchanges: Sequence[Sequence[Message]],
    further: Sequence[Exchange],
) -> bool:
    """Draw whether a row is under pressure; if so, answer it and its twin. Return True if the row is kept.

    A kept row has the constraint in its message, and its conversation in `messages`.

    Args:
        client, config: those of the pipeline.
        result: the row, with its system message.
        exchanges: the turns of the data up to each answer.
        further: exchanges of earlier rows.
    """
    settings = config.pressure
    rng = random.Random(f"{config.seed} pressure {result.index}")
    setting = draw_setting(settings, rng)
    if setting is None:
        return False
    own = [exchange for turns in exchanges if (exchange := _to_exchange(turns))]
    if len(own) < len(exchanges):
        result.pressure.append(PressureRow(setting).give_up("turns other than questions and answers"))
        return False
    row = plan_row(setting, own, further, rng, shaped="Format" in result.message.tags)
    result.pressure.append(row)
    message = result.message.with_phrases(_phrases(row))
    system: Message = {"role": "system", "content": message.text}
    if row.reason or not await ask_row(client, result, row, [system], settings.attempts):
        return False
    if setting == "conflict" and settings.aligned_twins:
        twin = plan_twin(row, own[-1].reference, rng)
        result.pressure.append(twin)
        await ask_row(client, result, twin, row.messages[:-2], settings.attempts)
    result.message, result.system, result.messages = message, message.text, row.messages
    if row.constraint is not None:
        result.constraints = [{"kind": row.constraint.kind, "tag": row.constraint.tag, "text": row.constraint.text}]
    return True


def further_exchange(row: NumberedRow) -> Exchange | None:
    """Return the first exchange of a row, which may follow another row's; None if it needs a context of its own."""
    conversation = row[2]
    if isinstance(conversation, RowError) or conversation.tools:
        return None
    turns = [turn for turn in conversation.messages if turn["role"] != "system"]
    return _to_exchange(turns[:2])


def _to_exchange(turns: Sequence[Message]) -> Exchange | None:
    """Return a question and its answer; None if there are other turns."""
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        return None
    return Exchange(turns[0]["content"], turns[1]["content"])


def _phrases(row: PressureRow) -> list[Phrase]:
    """Return what a row adds to its message: the constraint, and a sentence on a secret or a choice."""
    phrases = [Phrase(row.constraint.tag, row.constraint.text)] if row.constraint else []
    if row.clause:  # Format is last: "If the user asks for another form, ..." follows what it is about
        phrases.append(Phrase("Format" if row.tactic == "choice" else "Background", row.clause))
    return phrases
