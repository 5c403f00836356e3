"""The judge of answers: the options that name it, and its clients.

    class Options(JudgeOptions, ModelOptions): ...

    options.require_judge("--sysbench")
    options.refuse_extra_of_judge()
    generate_answers(..., before_asking=partial(contact_judge, options, wait))
    judgements, advice = judge_all(options, questions, judge_question, folder / "bench.sqlite", wait=wait)

`train.llm.judgement.judge` asks a question again until a reply holds a verdict.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from train.errors import UserError, replace_in_errors
from train.evaluation.command_options import option_of
from train.evaluation.models.options import refuse_extra_fields, server_options
from train.llm.request import Decoding
from train.recipe import Section, Text

if TYPE_CHECKING:
    from train.llm.client import Client
    from train.llm.journal import Journal
    from train.llm.server import Server

JUDGE_FIELDS = ("temperature", "top_p")
"""Request fields of the judge that have keys of their own, besides the token limit."""
COMMON = ("judge", "judge_server", "judge_extra", "retries")
"""The options of a judge that --help of a command with many options shows."""

Question = TypeVar("Question")
Result = TypeVar("Result")


class JudgeOptions(Section):
    """The judge and its servers. A command with a default or a requirement of its own declares that key again."""

    judge: Text | None = None
    """The judge's name on its server."""
    judge_server: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Addresses of the judge's servers."""
    judge_concurrency: int = Field(default=64, ge=1)
    """Simultaneous requests to each of the judge's servers."""
    judge_key_variable: Text | None = None
    """Environment variable that holds the key of the judge's servers."""
    judge_max_tokens: int = Field(default=2048, ge=1)
    """Maximum tokens of a judgement."""
    judge_temperature: float | None = Field(default=0.0, ge=0)
    """Sampling temperature of the judge; null = not sent."""
    judge_top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus sampling of the judge; null = not sent."""
    judge_extra: dict[str, Any] = Field(default_factory=dict)
    """More fields of each request to the judge, as a JSON object; null = that field is not sent.
    {"max_completion_tokens": 4096} replaces `judge_max_tokens`."""
    retries: int = Field(default=3, ge=0)
    """Maximum number of repeated requests for a judgement without a verdict."""

    def judge_decoding(self) -> Decoding:
        """Return the sampling settings of the judge."""
        return Decoding.from_settings(
            self.judge_max_tokens, self.judge_temperature, self.judge_top_p, extra=self.judge_extra
        )

    def judge_servers(self) -> "list[Server]":
        """Return the judge's servers."""
        from train.llm.server import Server  # which takes a second to import

        return [Server(url, self.judge_concurrency, self.judge_key_variable) for url in self.judge_server]

    def require_judge(self, option: str) -> str:
        """Return the judge's name. Raises UserError if it or its server is missing; `option` is what needs a judge."""
        missing = {"--judge NAME": not self.judge, "--judge-server URL": not self.judge_server}
        if add := " ".join(text for text, applies in missing.items() if applies):
            raise UserError(f"{option}: a judge decides there. Add {add}.")
        return str(self.judge)

    def refuse_judge(self, reason: str) -> None:
        """Raise UserError that gives `reason` if an option of the judge is set: nothing would be judged by it."""
        if of_judge := [name for name in JudgeOptions.model_fields if name in self.model_fields_set]:
            raise UserError(f"{option_of(of_judge[0])}: {reason}")

    def refuse_extra_of_judge(self) -> None:
        """Raise UserError for a request field that `judge_extra` cannot set."""
        names = ("max_tokens", *JUDGE_FIELDS)
        own = {name: (f"--judge-{name.replace('_', '-')}", getattr(self, f"judge_{name}")) for name in names}
        refuse_extra_fields("--judge-extra", self.judge_extra, own)


def refuse_unusable_servers(options: JudgeOptions) -> None:
    """Raise UserError for an invalid address and for a key variable that is not set, without any request.

    For the start of a command: the model may answer for hours before the judge is asked.
    """
    from train.llm.concurrency import Backoff
    from train.llm.server import ServerConnection

    async def open_and_close(server: "Server") -> None:
        await ServerConnection(server, Backoff(), patience=0).endpoint.api.close()

    with replace_in_errors(server_options("judge-")):
        for server in options.judge_servers():
            asyncio.run(open_and_close(server))


async def contact_judge(options: JudgeOptions, wait: float) -> None:
    """Check that the judge's servers answer, if there are any. `wait`: seconds for one that cannot be reached."""
    from train.llm.refusals import option_formatter
    from train.llm.startup_check import check_servers

    if options.judge and options.judge_server:
        with replace_in_errors(server_options("judge-")):
            await check_servers(
                options.judge_servers(),
                options.judge,
                wait=wait,
                stages={"judge": options.judge_decoding()},
                format_setting=option_formatter(JUDGE_FIELDS, "judge-"),
            )


def contact_judge_once(options: JudgeOptions, wait: float) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return a function that contacts the judge when it is first awaited, and does nothing later.

    For `before_asking` of several calls of `generate_answers`: the model may answer for hours.
    """
    contacted = False

    async def contact() -> None:
        nonlocal contacted
        if not contacted:
            contacted = True
            await contact_judge(options, wait)

    return contact


def with_judge(
    options: JudgeOptions, journal: "Journal", ask: "Callable[[Client], Awaitable[Result]]", *, wait: float
) -> tuple[Result, str]:
    """Return the result of `ask` with a client of the judge, and the option to change if requests were refused.

    Its replies go into `journal`. Raises UserError.
    """
    from train.llm.client import Client
    from train.llm.refusals import option_formatter

    async def run() -> tuple[Result, str]:
        async with Client(
            options.judge_servers(),
            str(options.judge),
            journal,
            wait_for_server=wait,
            format_setting=option_formatter(JUDGE_FIELDS, "judge-"),
        ) as client:
            result = await ask(client)
        for line in client.counts.bad_servers:
            print(f"warning: {line}", flush=True)
        return result, client.counts.advice

    with replace_in_errors(server_options("judge-")):
        return asyncio.run(run())


def judge_all(
    options: JudgeOptions,
    questions: Sequence[Question],
    judge_question: "Callable[[Client, Question], Awaitable[Result]]",
    journal_file: Path,
    *,
    wait: float,
) -> tuple[list[Result], str]:
    """Return the judgement of each question, in order, and the option to change if requests were refused.

    Args:
        options: the judge.
        questions: the questions, in the order of the results.
        judge_question: asks one question.
        journal_file: SQLite file with the replies; the replies that it holds are not asked for again.
        wait: seconds to wait at the start for a server that cannot be reached.

    Raises UserError.
    """
    from train.llm.journal import Journal
    from train.llm.ordered_map import map_ordered
    from train.llm.progress import progress

    async def ask(client: "Client") -> list[Result]:
        async def work(question: Question) -> Result:
            return await judge_question(client, question)

        results = []
        async with (
            progress("judging", len(questions), client) as judging,
            aclosing(map_ordered(questions, work, at_once=2 * client.concurrency)) as stream,
        ):
            async for result in stream:
                results.append(result)
                judging.advance()
        return results

    with Journal(journal_file) as journal:
        return with_judge(options, journal, ask, wait=wait)
