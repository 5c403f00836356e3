"""What a model answers, from its own files or from servers; every answer is written down as soon as it is there.

    answers = respond(Checkpoint("outputs/janus-7b"), conversations, Decoding(1024, temperature=0.0), Path("a.sqlite"))

Each answer comes without the reasoning before it and the control tokens around it (train/llm/reasoning/answer.py). The journal
keeps it as it was sent, so a second call finds the answers of the first, also where the first was killed. It knows a
checkpoint by its files and its template, so that one trained anew in the same folder is asked anew.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from train.errors import UserError, replace_in_errors
from train.evaluation.models.local import KNOWN_EXTRA, LocalGenerator, Messages
from train.evaluation.models.options import LocalModel, ServedModel, server_options
from train.evaluation.models.vllm_server import vllm_server
from train.llm.client import Client
from train.llm.failures import RequestFailed
from train.llm.journal import Answer, Decoding, Journal, Request
from train.llm.options import WAIT_FOR_SERVER
from train.llm.ordered_map import map_ordered
from train.llm.progress import progress
from train.llm.reasoning.answer import format_advice, list_events, read_answer
from train.llm.refusals import SettingFormatter, format_config_key
from train.llm.system_role import merge_into_user
from train.progress import progress_bar


def generate_answers(
    respondent: LocalModel | ServedModel,
    conversations: Sequence[Messages],
    decoding: Decoding,
    journal: Path,
    *,
    samples: int = 1,
    stage: str = "respond",
    description: str = "answers",
    wait_for_server: float = WAIT_FOR_SERVER,
    before_asking: Callable[[], Coroutine[Any, Any, None]] | None = None,
    format_setting: SettingFormatter = format_config_key,
) -> list[list[Answer | RequestFailed]]:
    """`samples` answers to each conversation, which ends with a user's turn: [conversations][samples].

    Where there is none, the reason stands in its place. A model may say nothing: a checkpoint's empty answer is its
    answer, and so is a server's that is empty twice, unless its text went into a field of reasoning. One that was cut
    counts as it is; one that the server broke off is asked again, and is no answer in the end.

    Of `decoding`, temperature 0 is greedy; None is the model's or the server's own. `wait_for_server`: as of `Client`.
    `before_asking` is awaited before the first answer is asked for, and not where all are in the journal.
    `format_setting`: the command's words for a setting that a server refuses. Raises UserError for what the user can fix;
    what was answered until then is in the journal.
    """
    with Journal(journal) as written:
        if isinstance(respondent, ServedModel):
            if respondent.system_role == "merge_into_user":
                conversations = [merge_into_user(messages) for messages in conversations]
            asked = _requests(conversations, decoding, samples, stage)
            with replace_in_errors(server_options()):
                return asyncio.run(
                    _from_servers(
                        respondent, asked, samples, written, description, wait_for_server, format_setting, before_asking
                    )
                )
        opened = LocalGenerator(respondent)
        asked = _requests(conversations, decoding, samples, stage)
        if respondent.engine == "vllm":
            if before_asking and not _all_answered(asked, opened.name, written):
                asyncio.run(before_asking())
            with vllm_server(opened) as server:
                served = ServedModel(opened.name, (server,))
                return asyncio.run(
                    _from_servers(served, asked, samples, written, description, wait_for_server, format_setting)
                )
        for name in decoding.extra:
            if name not in KNOWN_EXTRA:
                raise UserError(f"{name} is no setting of a model's own generation. Known: {', '.join(KNOWN_EXTRA)}.")
        return asyncio.run(_from_checkpoint(opened, asked, samples, written, description, before_asking))


def _requests(conversations: Sequence[Messages], decoding: Decoding, samples: int, stage: str) -> list[Request]:
    return [Request(stage, messages, decoding, sample) for messages in conversations for sample in range(samples)]


def _all_answered(asked: Sequence[Request], model: str, journal: Journal) -> bool:
    return all(journal.find(request.key(model), request.decoding.max_tokens) for request in asked)


def _read(
    answers: Sequence[Answer | RequestFailed], asked: Sequence[Request], description: str
) -> list[Answer | RequestFailed]:
    """Return the answers without reasoning and control tokens, and print what a user has to know of these."""
    found: list[Answer | RequestFailed] = []
    events: Counter[str] = Counter()
    for answer, request in zip(answers, asked, strict=True):
        if isinstance(answer, Answer):
            answer, said = read_answer(answer, request.messages)
            events.update(f"{description}: {event}" for event in list_events(said))
        found.append(answer)
    for line in format_advice(events):
        print(f"warning: {line}", flush=True)
    return found


def _by_conversation(answers: Sequence[Answer | RequestFailed], samples: int) -> list[list[Answer | RequestFailed]]:
    return [list(answers[start : start + samples]) for start in range(0, len(answers), samples)]


async def _from_servers(
    served: ServedModel,
    asked: Sequence[Request],
    samples: int,
    journal: Journal,
    description: str,
    wait_for_server: float,
    format_setting: SettingFormatter,
    before_asking: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> list[list[Answer | RequestFailed]]:
    async with Client(
        served.servers,
        served.model,
        journal,
        accept_empty=True,
        wait_for_server=wait_for_server,
        format_setting=format_setting,
    ) as client:
        if before_asking and not _all_answered(asked, served.model, journal):
            await before_asking()

        async def one(request: Request) -> Answer | RequestFailed:
            try:
                return await client.ask(request)
            except RequestFailed as failure:
                return failure

        answers = []
        async with (
            progress(description, len(asked), client) as pace,
            aclosing(map_ordered(asked, one, at_once=2 * client.concurrency)) as found,
        ):
            async for answer in found:
                answers.append(answer)
                pace.advance()
    for line in client.counts.bad_servers:
        print(f"warning: {line}", flush=True)
    return _by_conversation(_read(answers, asked, description), samples)


async def _from_checkpoint(
    opened: LocalGenerator,
    asked: Sequence[Request],
    samples: int,
    journal: Journal,
    description: str,
    before_asking: Callable[[], Coroutine[Any, Any, None]] | None,
) -> list[list[Answer | RequestFailed]]:
    keys = [request.key(opened.name) for request in asked]
    found: dict[bytes, Answer | RequestFailed] = {}
    missing: dict[bytes, Request] = {}
    for key, request in zip(keys, asked, strict=True):
        answer = journal.find(key, request.decoding.max_tokens, accept_empty=True)
        if answer is not None:
            found[key] = answer
        else:
            missing.setdefault(key, request)
    if before_asking and missing:
        await before_asking()
    with progress_bar(description, total=len(found) + len(missing), unit="answers", done=len(found)) as answering:
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
    return _by_conversation(_read([found[key] for key in keys], asked, description), samples)
