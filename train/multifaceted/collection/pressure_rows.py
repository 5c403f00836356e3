"""Rows of the collection under pressure: the constraint behind the message, the answers, and the aligned twin."""

import random
from collections.abc import Sequence

from train.datagen.stage_client import StageClient
from train.multifaceted.collection import prompts
from train.multifaceted.collection.config import CollectionConfig
from train.multifaceted.collection.instructions import Instruction
from train.multifaceted.collection.result import InstructionResult, SetResult
from train.pressure.generated import Exchange, ask_row, ask_unless_refused, draw_setting, plan_row, plan_twin


async def answer_under_pressure(
    client: StageClient,
    config: CollectionConfig,
    result: InstructionResult,
    current: SetResult,
    further: Sequence[str],
) -> bool:
    """Draw whether a set is under pressure; if so, answer it and its twin. Return True: the set stays in any case.

    The reference of an answer is the set's own one to the instruction. A further instruction is asked for by itself
    first, under the same message.

    Args:
        client, config: those of the pipeline.
        result, current: the instruction and its set, with its system message and answer.
        further: instructions of earlier rows.

    Raises RequestFailed as the client does.
    """
    settings = config.pressure
    rng = random.Random(f"{config.seed} pressure {result.instruction.number} {current.number}")
    setting = draw_setting(settings, rng)
    if setting is None:
        return True
    own = Exchange(result.instruction.prompt, current.output)
    references = []
    for instruction in further if setting == "turns" else ():
        request = client.request("answer", prompts.answer(current.system, instruction))
        answer = await ask_unless_refused(client, request, result, continues_if_empty=True)
        if answer and not answer.unfinished:
            references.append(Exchange(instruction, answer.text))
    # The message says how to answer already, so that no constraint may ask for another form.
    row = plan_row(setting, [own], references, rng, shaped=True)
    current.pressure.append(row)
    if row.reason:
        return True
    sentences = [current.system, row.constraint.text if row.constraint else "", row.clause]
    system = {"role": "system", "content": " ".join(filter(None, sentences))}
    is_kept = await ask_row(client, result, row, [system], settings.attempts)
    if is_kept and setting == "conflict" and settings.aligned_twins:
        twin = plan_twin(row, own.reference, rng)
        current.pressure.append(twin)
        await ask_row(client, result, twin, row.messages[:-2], settings.attempts)
    return True


def further_instruction(instruction: Instruction) -> str | None:
    """Return the text of a kept instruction, which may follow another; None for a dropped one."""
    return None if instruction.number is None else instruction.prompt
