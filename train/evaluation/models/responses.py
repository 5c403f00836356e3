"""Answers of the model under evaluation, local or served, each stored in a journal as soon as it exists.

    answers = generate_answers(
        LocalModel("outputs/janus-7b"), conversations, Decoding(1024, temperature=0.0), Path("a.sqlite")
    )
    with open_model(LocalModel("outputs/janus-7b")) as model:  # loaded once for several calls
        ...

Answers come without reasoning and control tokens (train/llm/reasoning/answer.py). The journal keeps them unchanged, so
a second call reuses the answers of the first, also of one that was killed. The key of a local model covers its files
and its template: a model trained again in the same folder is asked again.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from pathlib import Path
from typing import Any

from train.errors import UserError, replace_in_errors
from train.evaluation.models.local import KNOWN_EXTRA, LocalGenerator, Messages
from train.evaluation.models.options import LocalModel, ServedModel, server_options
from train.evaluation.models.vllm_server import vllm_server
from train.llm.client import Client
from train.llm.failures import RequestFailed
from train.llm.journal import Journal
from train.llm.options import WAIT_FOR_SERVER
from train.llm.ordered_map import map_ordered
from train.llm.progress import progress
from train.llm.reasoning import format_advice, list_events, read_answer
from train.llm.refusals import SettingFormatter, format_config_key
from train.llm.request import Answer, Decoding, Request
from train.llm.system_role import merge_into_user
from train.progress import progress_bar

OpenModel = LocalGenerator | ServedModel
"""A model that several calls of `generate_answers` share."""


@contextmanager
def open_model(model: LocalModel | ServedModel) -> Iterator[OpenModel]:
    """Yield the model for several calls of `generate_answers`: weights are loaded, or vLLM is started, only once.

    Raises UserError if the tokenizer cannot be loaded or vLLM does not start.
    """
    if isinstance(model, ServedModel):
        yield model
    else:
        with _started(LocalGenerator(model)) as started:
            yield started


@contextmanager
def _started(generator: LocalGenerator) -> Iterator[OpenModel]:
    """Yield the generator itself, or its vLLM server until the block ends."""
    if generator.model.engine == "vllm":
        with vllm_server(generator) as server:
            yield ServedModel(generator.name, (server,))
    else:
        yield generator


def generate_answers(
    model: LocalModel | OpenModel,
    conversations: Sequence[Messages],
    decoding: Decoding,
    journal_file: Path,
    *,
    samples: int = 1,
    stage: str = "respond",
    description: str = "answers",
    wait_for_server: float = WAIT_FOR_SERVER,
    before_asking: Callable[[], Coroutine[Any, Any, None]] | None = None,
    format_setting: SettingFormatter = format_config_key,
) -> list[list[Answer | RequestFailed]]:
    """Return `samples` answers to each conversation: [conversations][samples], with the reason for missing ones.

    An empty answer of a local model counts. An empty answer of a server counts the second time, unless its text went
    into a field of reasoning. A cut answer counts; one that the server broke off is asked for again, and finally fails.

    Args:
        model: the model under evaluation, or what `open_model` yields for it.
        conversations: each ends with a user turn.
        decoding: sampling settings. Temperature 0 is greedy; None is the model's or the server's own.
        journal_file: SQLite file with the answers.
        samples: answers to each conversation.
        stage: name of the requests in the journal; part of their key.
        description: name of the answers in the progress bar and in warnings.
        wait_for_server: as of `Client`.
        before_asking: awaited before the first request; not called if the journal has all answers.
        format_setting: the command's name for a setting that a server refuses.

    Raises:
        UserError: for errors that the user can fix. The answers so far are in the journal.
    """
    with Journal(journal_file) as journal, ExitStack() as stack:
        if isinstance(model, LocalModel):
            generator = LocalGenerator(model)
            if model.engine == "vllm" and before_asking:
                requests = _requests(conversations, decoding, samples, stage)
                if not _all_answered(requests, generator.name, journal):
                    asyncio.run(before_asking())
                before_asking = None
            model = stack.enter_context(_started(generator))
        if isinstance(model, ServedModel):
            if model.system_role == "merge_into_user":
                conversations = [merge_into_user(messages) for messages in conversations]
            with replace_in_errors(server_options()):
                requests = _requests(conversations, decoding, samples, stage)
                answers = asyncio.run(
                    _ask_servers(model, requests, journal, description, wait_for_server, format_setting, before_asking)
                )
        else:
            for name in decoding.extra:
                if name not in KNOWN_EXTRA:
                    allowed = ", ".join(KNOWN_EXTRA)
                    raise UserError(f"{name} is not supported by generation in this process. Allowed: {allowed}.")
            requests = _requests(conversations, decoding, samples, stage)
            answers = asyncio.run(_generate_locally(model, requests, journal, description, before_asking))
    answers = _clean(answers, requests, description)
    return [answers[start : start + samples] for start in range(0, len(answers), samples)]


def _requests(conversations: Sequence[Messages], decoding: Decoding, samples: int, stage: str) -> list[Request]:
    return [Request(stage, messages, decoding, sample) for messages in conversations for sample in range(samples)]


def _all_answered(requests: Sequence[Request], model: str, journal: Journal) -> bool:
    return all(journal.find(request.key(model), request.decoding.max_tokens) for request in requests)


def _clean(
    answers: Sequence[Answer | RequestFailed], requests: Sequence[Request], description: str
) -> list[Answer | RequestFailed]:
    """Return the answers without reasoning and control tokens, and print warnings about these."""
    cleaned: list[Answer | RequestFailed] = []
    events: Counter[str] = Counter()
    for answer, request in zip(answers, requests, strict=True):
        if isinstance(answer, Answer):
            answer, cleaning = read_answer(answer, request.messages)
            events.update(f"{description}: {event}" for event in list_events(cleaning))
        cleaned.append(answer)
    for line in format_advice(events):
        print(f"warning: {line}", flush=True)
    return cleaned


async def _ask_servers(
    model: ServedModel,
    requests: Sequence[Request],
    journal: Journal,
    description: str,
    wait_for_server: float,
    format_setting: SettingFormatter,
    before_asking: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> list[Answer | RequestFailed]:
    async with Client(
        model.servers,
        model.model,
        journal,
        accept_empty=True,
        wait_for_server=wait_for_server,
        format_setting=format_setting,
    ) as client:
        if before_asking and not _all_answered(requests, model.model, journal):
            await before_asking()

        async def ask(request: Request) -> Answer | RequestFailed:
            try:
                return await client.ask(request)
            except RequestFailed as failure:
                return failure

        answers = []
        async with (
            progress(description, len(requests), client) as answering,
            aclosing(map_ordered(requests, ask, at_once=2 * client.concurrency)) as stream,
        ):
            async for answer in stream:
                answers.append(answer)
                answering.advance()
    for line in client.counts.bad_servers:
        print(f"warning: {line}", flush=True)
    return answers


async def _generate_locally(
    generator: LocalGenerator,
    requests: Sequence[Request],
    journal: Journal,
    description: str,
    before_asking: Callable[[], Coroutine[Any, Any, None]] | None,
) -> list[Answer | RequestFailed]:
    keys = [request.key(generator.name) for request in requests]
    answers: dict[bytes, Answer | RequestFailed] = {}
    missing: dict[bytes, Request] = {}
    for key, request in zip(keys, requests, strict=True):
        answer = journal.find(key, request.decoding.max_tokens, accept_empty=True)
        if answer is not None:
            answers[key] = answer
        else:
            missing.setdefault(key, request)
    if before_asking and missing:
        await before_asking()
    with progress_bar(description, total=len(answers) + len(missing), unit="answers", done=len(answers)) as answering:
        conversations = {key: request.messages for key, request in missing.items()}
        for batch in generator.answers(conversations, requests[0].decoding) if conversations else ():
            await asyncio.gather(
                *(
                    journal.add(key, generator.name, missing[key], answer)
                    for key, answer in batch.items()
                    if isinstance(answer, Answer)
                )
            )
            answers |= batch
            answering.advance(len(batch))
    return [answers[key] for key in keys]
