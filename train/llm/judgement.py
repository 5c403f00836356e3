"""Judgements: questions to a judge, each asked again until a reply holds a verdict.

A verdict that is still missing after the last try stays missing. It is never guessed and never part of a mean.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from train.llm.failures import RequestFailed
from train.llm.reasoning import LEFTOVER_EVENTS, list_events, read_answer
from train.llm.request import Answer, Request

Verdict = TypeVar("Verdict")

MissingReason = Literal["unparsable", "refused", "unfinished", "no answer", "pending"]
"""unparsable = a reply was complete, and none had a verdict; refused = the judge or a filter refused each time;
unfinished = no reply was complete (cut, broken off, ended for an unknown reason)."""


class PendingError(Exception):
    """The judge's reply is pending: its request is in a batch file, or goes into the next one."""


class JudgeClient(Protocol):
    """A source of the judge's replies: a client of servers, or a journal filled from batch files."""

    async def ask(self, request: Request) -> Answer:
        """Return the reply. Raises RequestFailed if there will be none, and PendingError if it is still to come."""
        ...


@dataclass(frozen=True, slots=True)
class Judgement(Generic[Verdict]):
    """The verdict on one question.

    - `texts`: all replies, those without a verdict first.
    - `missing`: the kind of reason why `verdict` is None, with its `detail`.
    - `errors`: the error of each reply without a verdict.
    - `cleaned`: events of reading the replies, as in `train.llm.reasoning`.
    """

    verdict: Verdict | None
    texts: tuple[str, ...]
    missing: MissingReason | None = None
    detail: str = ""
    errors: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    cleaned: tuple[str, ...] = ()


async def judge(
    client: JudgeClient, tries: Sequence[Request], parse: Callable[[str], Verdict | None], *, no_verdict: str
) -> Judgement[Verdict]:
    """Send `tries`, requests with the same question, one after another until a reply holds a verdict.

    A reply that was cut at the token limit has no verdict, whatever its last words look like. A request without any
    reply ends the tries: the client has already repeated it.

    Args:
        client: source of the replies.
        tries: the requests, at least one, each another sample.
        parse: returns the verdict of a reply, without its reasoning; None if it holds none.
        no_verdict: the error of a complete reply without a verdict, for reports.

    Raises UserError as the client does.
    """
    texts: list[str] = []
    errors: list[str] = []
    cleaned: list[str] = []
    tokens = {"prompt": 0, "completion": 0}

    def judged(verdict: Verdict | None, missing: MissingReason | None = None, detail: str = "") -> Judgement[Verdict]:
        return Judgement(verdict, tuple(texts), missing, detail, tuple(errors), tokens, tuple(cleaned))

    for request in tries:
        try:
            answer = await client.ask(request)
        except RequestFailed as failure:
            return judged(None, "no answer", str(failure))
        except PendingError:
            return judged(None, "pending")
        texts.append(answer.text)
        tokens["prompt"] += answer.prompt_tokens or 0
        tokens["completion"] += answer.completion_tokens or 0
        plain_answer, cleaning = read_answer(answer)
        cleaned.extend(event for event in list_events(cleaning) if event not in LEFTOVER_EVENTS)
        verdict = parse(plain_answer.text)
        if error := _unfinished(plain_answer) or (no_verdict if verdict is None else ""):
            errors.append(error)
        else:
            return judged(verdict)
    kind: MissingReason = "refused" if set(errors) == {"refused"} else "unfinished"
    return judged(None, "unparsable" if no_verdict in errors else kind, errors[-1])


def advice_on_replies(errors: Collection[str], remedies: Mapping[str, str]) -> str:
    """Return advice for each kind of error of the judge's replies without a verdict.

    `remedies`: the advice on the errors of complete replies.
    """
    is_cut = any(name.startswith(("cut", "without an end to")) for name in errors)
    is_broken = any(name.startswith(("ended", "calls", "broken", "without a finish")) for name in errors)
    advice = {
        "The judge, or a filter of its server, refuses to grade these: use another judge, or turn the filter off.": (
            "refused" in errors
        ),
        "Raise --judge-max-tokens (or max_completion_tokens in --judge-extra).": is_cut,
        "See in the log of the judge's server why it ends answers like this.": is_broken,
        **{remedy: error in errors for error, remedy in remedies.items()},
    }
    return " ".join(sentence for sentence, applies in advice.items() if applies)


def _unfinished(reply: Answer) -> str:
    """Return why a reply is not complete; empty for a complete reply."""
    # In an unfinished reply the apparent verdict may be a quotation. If the server reports no finish reasons, the
    # verdict itself has to do.
    return "" if reply.finish_class == "unstated" and not reply.refused else reply.unfinished
