"""Failed requests: the meaning of an error response for the request, the server and the run."""

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train.progress import duration

LONGEST_WAIT = 86_400.0
"""The longest pause, in seconds, that a server may ask for: limits are by the day at most. The openai package obeys
two minutes and urllib3 six hours, which would retry before a daily limit resets."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """The reason why a request has no answer.

    too much: the server is over its load or rate limit. gone: it can't be reached. fault: an error of the server or of
    this request; worth another try. row: it won't answer this request. hopeless: it will answer no request. again: it
    wants the request in another form, which the next try has.
    """

    kind: Literal["too much", "gone", "fault", "row", "hopeless", "again"]
    what: str
    retry_after: float | None = None
    status: int | None = None
    """Of a fault: None where no response came at all."""
    advice: str = ""
    """The setting that the server's error is about (see `refusals.advice_on`)."""


def trouble_of(
    status: int, what: str, code: Any, headers: Mapping[str, str], *, has_answered: bool, longest_wait: float
) -> Trouble:
    """Return the meaning of an error status.

    Args:
        status: HTTP status, or the one that the body of a 200 names.
        what: the status and the server's words, without the key.
        code: `error.code` of the body.
        headers: of the response, for Retry-After.
        has_answered: whether the server has answered any request of this run.
        longest_wait: seconds; a Retry-After above it is ignored.
    """
    retry_after = _retry_after(headers)
    if retry_after is not None and retry_after > longest_wait:
        # Milliseconds, or a date in seconds since 1970: the next try comes after our own pauses.
        what += f" (its Retry-After is not obeyed: it asks for more than {duration(longest_wait)})"
        retry_after = None
    if code == "insufficient_quota":
        return Trouble("hopeless", what, status=status)
    match status:
        case 429 | 503 | 529:
            return Trouble("too much", what, retry_after)
        case 502 | 520 | 521 | 522 | 523:
            return Trouble("gone", what, retry_after)
        case 401 | 402 | 404 | 405:
            return Trouble("hopeless", what, status=status)
        case 403 if not has_answered:  # later it is how some say that they won't answer this one
            return Trouble("hopeless", what, status=status)
        case 408 | 409 | 425:
            return Trouble("fault", what, retry_after, status)
        case _ if status >= 500:
            return Trouble("fault", what, retry_after, status)
        case _:
            return Trouble("row", what)


def words_of_error(body: Any, text: str) -> str:
    """Return the server's own words in the body of an error; `text` is the body as it was sent."""
    for name in ("message", "detail", "error"):
        if isinstance(body, dict) and isinstance(body.get(name), str):
            return str(body[name])
    return str(body) if body else text


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks for: a number, or a date (RFC 9110); OpenAI also sends milliseconds."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except ValueError:
        return None
