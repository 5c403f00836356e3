"""What a model answers, from its own files or from servers; every answer is written down as soon as it is there.

    answers = respond(Checkpoint("outputs/janus-7b"), conversations, Decoding(1024, temperature=0.0), Path("a.sqlite"))

A second call finds the answers of the first in the journal, also where the first was killed. The journal knows a
checkpoint by its files and its template, so that one trained anew in the same folder is asked anew.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

from train.errors import UserError, naming
from train.evaluation.checkpoint import KNOWN_EXTRA, Messages, OpenCheckpoint
from train.evaluation.respondent import Checkpoint, Served, server_options
from train.evaluation.vllm_server import vllm_server
from train.llm.client import Client, NoAnswerError
from train.llm.journal import Answer, Decoding, Journal, Request
from train.llm.refusals import NameSetting, config_setting
from train.llm.rows import in_order, progress
from train.llm.system_role import merge_into_user
from train.progress import job


def respond(
    respondent: Checkpoint | Served,
    conversations: Sequence[Messages],
    decoding: Decoding,
    journal: Path,
    *,
    samples: int = 1,
    stage: str = "respond",
    description: str = "answers",
    name_setting: NameSetting = config_setting,
) -> list[list[Answer | NoAnswerError]]:
    """`samples` answers to each conversation, which ends with a user's turn: [conversations][samples].

    Where there is none, the reason stands in its place. Of `decoding`, temperature 0 is greedy; None is the model's or
    the server's own. `name_setting`: the command's words for a setting that a server refuses. Raises UserError for what
    the user can fix; what was answered until then is in the journal.
    """
    with Journal(journal) as written:
        if isinstance(respondent, Served):
            if respondent.system_role == "merge_into_user":
                conversations = [merge_into_user(messages) for messages in conversations]
            asked = _requests(conversations, decoding, samples, stage)
            with naming(server_options()):
                return asyncio.run(_from_servers(respondent, asked, samples, written, description, name_setting))
        opened = OpenCheckpoint(respondent)
        if respondent.engine == "vllm":
            with vllm_server(opened) as server:
                served = Served(opened.name, (server,))
                asked = _requests(conversations, decoding, samples, stage)
                return asyncio.run(_from_servers(served, asked, samples, written, description, name_setting))
        for name in decoding.extra:
            if name not in KNOWN_EXTRA:
                raise UserError(f"{name} is no setting of a model's own generation. Known: {', '.join(KNOWN_EXTRA)}.")
        asked = _requests(conversations, decoding, samples, stage)
        return asyncio.run(_from_checkpoint(opened, asked, samples, written, description))


def _requests(conversations: Sequence[Messages], decoding: Decoding, samples: int, stage: str) -> list[Request]:
    return [Request(stage, messages, decoding, sample) for messages in conversations for sample in range(samples)]


def _by_conversation(answers: Sequence[Answer | NoAnswerError], samples: int) -> list[list[Answer | NoAnswerError]]:
    return [list(answers[start : start + samples]) for start in range(0, len(answers), samples)]


async def _from_servers(
    served: Served,
    asked: Sequence[Request],
    samples: int,
    journal: Journal,
    description: str,
    name_setting: NameSetting,
) -> list[list[Answer | NoAnswerError]]:
    async with Client(served.servers, served.model, journal, name_setting=name_setting) as client:

        async def one(request: Request) -> Answer | NoAnswerError:
            try:
                return await client.ask(request)
            except NoAnswerError as failure:
                return failure

        answers = []
        async with (
            progress(description, len(asked), client) as pace,
            aclosing(in_order(asked, one, at_once=2 * client.concurrency)) as found,
        ):
            async for answer in found:
                answers.append(answer)
                pace.advance()
    return _by_conversation(answers, samples)


async def _from_checkpoint(
    opened: OpenCheckpoint, asked: Sequence[Request], samples: int, journal: Journal, description: str
) -> list[list[Answer | NoAnswerError]]:
    keys = [request.key(opened.name) for request in asked]
    found: dict[bytes, Answer | NoAnswerError] = {}
    missing: dict[bytes, Request] = {}
    for key, request in zip(keys, asked, strict=True):
        answer = journal.find(key, request.decoding.max_tokens)
        if answer is not None:
            found[key] = answer
        else:
            missing.setdefault(key, request)
    with job(description, total=len(found) + len(missing), unit="answers", done=len(found)) as answering:
        waiting = {key: request.messages for key, request in missing.items()}
        for batch in opened.answers(waiting, asked[0].decoding) if waiting else ():
            await asyncio.gather(
                *(
                    journal.add(key, opened.name, missing[key], answer)
                    for key, answer in batch.items()
                    if isinstance(answer, Answer)
                )
            )
            found |= batch
            answering.advance(len(batch))
    return _by_conversation([found[key] for key in keys], samples)
