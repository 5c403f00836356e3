"""Failed requests: the meaning of an error response for the request, the server and the run."""

import email.utils
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train.formatting import duration

LONGEST_WAIT = 86_400.0
"""The longest pause, in seconds, that a server may ask for: limits are by the day at most. The openai package obeys
two minutes and urllib3 six hours, which would retry before a daily limit resets."""

SHOWN_ERRORS = 3
"""Of the errors that a server finds in one request."""

DENIED = (401, 403, 404, 405, 407, 410)
"""Statuses about the key, the address or the model, which no single request can change. From a server that has answered
before, they can also come from a gateway whose backend is being replaced, and pass."""


@dataclass(frozen=True, slots=True)
class ServerError:
    """The reason why a request has no answer.

    too much: the server is over its load or rate limit. gone: it can't be reached. dropped: the connection ended before
    any byte of a response; a fault of the request where the server answers others, else as gone. fault: an error of the
    server or of this request; worth another try. broken: it broke off its answer to this request, and answers others;
    worth another try. row: it won't answer this request. denied: it refuses the key, the address or the model
    (`DENIED`). hopeless: it will answer no request. again: it wants the request in another form, and the next try has
    that.
    """

    kind: Literal["too much", "gone", "dropped", "fault", "broken", "row", "denied", "hopeless", "again"]
    what: str
    retry_after: float | None = None
    status: int | None = None
    """Of an error response, or of the error in the body of a 200; None where no response came at all."""
    about_content: bool = False
    """Of a row: the server's words are about what the request holds: its length, or what a filter found in it."""
    advice: str | None = None
    """The remedy, where the connection or the server's own words tell it: see `refusals.format_advice`."""


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """An error in the body of a response.

    `status`: the HTTP status that it names; `code`: its code, its type and the quotas that it names.
    """

    status: int | None
    code: str
    words: str

    @property
    def says(self) -> str:
        """Code and words, without what some servers repeat of the request."""
        return f"{self.code} {_ECHO.split(self.words[:2_000], 1)[0]}"

    def implied_status(self) -> int:
        """Return the status that it names, or that its code and words amount to; 200 if they say nothing."""
        return self.status or next((status for words, status in _STATUS_OF_WORDS if words.search(self.says)), 200)


def parse_error(body: Any, text: str) -> ErrorBody | None:
    """Return the error in the body of a response, parsed and as it was sent; None where there is none.

    Knows OpenAI's form, vLLM's, OpenRouter's, Anthropic's, Gemini's (in a list), FastAPI's, MiniMax's, and `error` as
    a string. The inner names come before the outer ones.
    """
    body = body[0] if isinstance(body, list) and body else body
    places = list(_places(body))
    named = [place.get(name) for place in places for name in ("code", "status", "status_code", "statusCode")]
    numbers = (int(str(value)) for value in named if str(value).isdecimal())
    status = next((number for number in numbers if 400 <= number < 600), None)
    codes = [place.get(name) for place in places for name in ("code", "type", "status")]
    codes += _QUOTA.findall(text[:20_000])
    code = " ".join(value for value in codes if isinstance(value, str) and not value.isdecimal())
    names = ("message", "msg", "detail", "error", "status_msg")
    words = _validation_errors(body, text) or next(
        (value for place in places for name in names if isinstance(value := place.get(name), str)), ""
    )
    words = _PYDANTIC_ECHO.sub("", words)
    raw = next((metadata.get("raw") for place in places if isinstance(metadata := place.get("metadata"), dict)), None)
    if isinstance(raw, str):  # what the server behind OpenRouter said
        words = f"{words}: {raw}"
    return ErrorBody(status, code, words or code) if status or words or (code and body.get("error")) else None


def parse_error_body(body: Any, text: str) -> ErrorBody:
    """Return the error in the body of a response with an error status; the whole body where it has no known form."""
    return parse_error(body, text) or ErrorBody(None, "", _dumped(body) if body else _text_of(text))


def classify_error(
    status: int, what: str, error: ErrorBody, headers: Mapping[str, str], *, longest_wait: float
) -> ServerError:
    """Return the meaning of an error.

    Args:
        status: HTTP status; of a 200, the one that its body amounts to (200: it doesn't say).
        what: the status and the server's words, without the key.
        error: the error in the body.
        headers: of the response, for Retry-After.
        longest_wait: seconds; a Retry-After above it is ignored.
    """
    if status in (400, 500) and error.status:  # a gateway's own status around that of the server behind it
        status = error.status
    retry_after = _retry_after(headers)
    if retry_after is not None and retry_after > longest_wait:
        # Milliseconds, or a date in seconds since 1970: the next try comes after our own pauses.
        what += f" (its Retry-After is not obeyed: it asks for more than {duration(longest_wait)})"
        retry_after = None
    if status == 402 or (status in (200, 400, 401, 403, 412, 429) and _is_exhausted(error, retry_after)):
        return ServerError("hopeless", what, status=402)
    if status == 400 and _BAD_KEY.search(error.says):
        status = 401  # Gemini's
    is_flagged = status in (400, 403, 422) and bool(_FLAGGED.search(error.says))
    is_long = status == 413 or (status in (400, 422, 500) and is_about_length(error.says))
    match status:
        case 429 | 503 | 529:
            return ServerError("too much", what, retry_after, status)
        case 502 | 520 | 521 | 522 | 523:
            return ServerError("gone", what, retry_after, status)
        case _ if status in DENIED and not is_flagged:
            return ServerError("denied", what, status=status)
        case 200 | 408 | 409 | 425:
            return ServerError("fault", what, retry_after, status)
        case _ if status >= 500 and not is_long:
            return ServerError("fault", what, retry_after, status)
        case _:
            is_bytes = status == 413 and not _TOKENS.search(error.says)
            advice = _ABOUT_BYTES if is_bytes else None
            return ServerError("row", what, status=status, about_content=is_long or is_flagged, advice=advice)


def _validation_errors(body: Any, text: str) -> str:
    """Return the errors of pydantic in a body, as `body.messages: Field required`; nothing where there are none.

    FastAPI sends them as objects, vLLM as the text of Python's list of them. Each repeats what it is about (`input`),
    which may be the whole prompt.
    """
    if "loc" not in text:
        return ""
    found = list(_faulty_fields(body)) or [
        (re.findall(r"[\w-]+", match["loc"]), match["one"] or match["other"] or "")
        for match in _PYDANTIC.finditer(text[:100_000].replace('\\"', '"'))
    ]
    shown = [f"{'.'.join(map(str, place))}: {what}" for place, what in found[:SHOWN_ERRORS]]
    more = f" (and {len(found) - SHOWN_ERRORS:,} more)" if len(found) > SHOWN_ERRORS else ""
    return "; ".join(shown) + more


def _faulty_fields(value: Any) -> Iterator[tuple[list[Any], str]]:
    """Yield place and message of each of pydantic's errors within a body."""
    if isinstance(value, dict) and isinstance(value.get("loc"), list) and isinstance(value.get("msg"), str):
        yield value["loc"], value["msg"]
        return
    for name in ("detail", "error", "errors", "message") if isinstance(value, dict) else ():
        yield from _faulty_fields(value.get(name))
    for one in value if isinstance(value, list) else ():
        yield from _faulty_fields(one)


def _dumped(body: Any) -> str:
    """Return a body of no known form as JSON, without what it may repeat of the request."""
    kept = (
        {name: value for name, value in body.items() if name not in ("input", "ctx")}
        if isinstance(body, dict)
        else body
    )
    return json.dumps(kept, ensure_ascii=False)


def is_about_length(words: str) -> bool:
    """Return whether a server's words say that a request is too long."""
    return bool(_TOO_LONG.search(words))


def is_about_shared_context(words: str) -> bool:
    """Return whether a server says that all of its requests together outgrew the context that they share.

    The slots of llama.cpp share one (`kv_unified`). It ends them all with 500 then; each would have had room alone.
    """
    return "context size has been exceeded" in words.lower()


def _text_of(page: str) -> str:
    """Return the title of a web page, or its text."""
    title = _TITLE.search(page)
    return title[1] if title else _TAG.sub(" ", page)


def _places(body: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a body in which an error may be told, the innermost first."""
    if not isinstance(body, dict):
        return
    for name in ("error", "errors", "detail", "base_resp"):
        inner = body.get(name)
        yield from _places(inner[0] if name == "errors" and isinstance(inner, list) and inner else inner)
    yield body


def _is_exhausted(error: ErrorBody, retry_after: float | None) -> bool:
    """Return whether credit or a quota is used up, as opposed to a limit per minute that passes by itself."""
    if _EXHAUSTED_FOR_SURE.search(error.says):
        return True
    return retry_after is None and bool(_OUT_OF_CREDIT.search(error.says)) and not _FREQUENCY.search(error.says)


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


# Words of servers. They are looked at only where a status alone doesn't tell.

_PYDANTIC = re.compile(
    r"""['"]loc['"]\s*:\s*[(\[](?P<loc>[^)\]]{0,300})[)\]]\s*,\s*['"]msg['"]\s*:\s*"""
    r"""(?:'(?P<one>[^'\n]{0,300})'|"(?P<other>[^"\n]{0,300})")"""
)
_PYDANTIC_ECHO = re.compile(r",? ?input_value=.*?, input_type=\w+|\s*For further information visit \S+", re.DOTALL)
_ECHO = re.compile(r"""['"]input['"]\s*:""")
"""Pydantic's errors repeat the request from here on."""
_TAG = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL)
_TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL | re.IGNORECASE)
_QUOTA = re.compile(r'"quotaId"\s*:\s*"([\w-]+)"')

_TOO_LONG = re.compile(
    r"context[ _-]?(?:length|window|size|limit)"  # OpenAI, vLLM, SGLang, llama.cpp, Mistral, DeepSeek, Ollama
    r"|(?:prompt|inputs?|request(?! entity too large)|messages?|string)\b"
    r".{0,80}?\b(?:too (?:long|large)|longer than|exceeds? )"
    r"|too many (?:(?:input|prompt) )?tokens|reduce the length|maximum (?:prompt|input) length"
    r"|range of input length|`inputs` (?:tokens \+|must have)"  # DashScope, TGI
    r"|string_above_max_length|request_too_large|context the overflows",  # OpenAI, Anthropic, LM Studio
    re.IGNORECASE | re.DOTALL,
)
_TOKENS = re.compile(r"token|context|prompt|length", re.IGNORECASE)
_ABOUT_BYTES = (
    "That is a limit in bytes of the server or of a proxy before it (client_max_body_size of nginx), not the model's "
    "context: raise it there, or take shorter rows."
)
_OUT_OF_CREDIT = re.compile(
    r"insufficient[ _-]?(?:\w+[ _-])?(?:quota|balance|credit|fund)"
    r"|(?:balance|credits?)\b.{0,30}\b(?:insufficient|too low|exhausted|depleted)|out of credits?|all available credits"
    r"|exceeded[ _].{0,20}quota|quota\b.{0,20}\b(?:exceeded|exhausted)|exceeded your monthly"
    r"|exceeded_?budget|budget_exceeded|budget has been exceeded|\b(?:spend(?:ing)?|key|billing[ _]hard)[ _]limit"
    r"|billing_not_active|account is not active|arrearage|overdue|account\b.{0,40}\bsuspended|余额不足|欠费",
    re.IGNORECASE | re.DOTALL,
)
_EXHAUSTED_FOR_SURE = re.compile(r"insufficient_quota|billing_not_active|billing_hard_limit|PerDay|limit: 0\b")
"""Final whatever else is said: Gemini advises to retry in some seconds beside a quotaId of the day or a limit of 0."""
_FREQUENCY = re.compile(
    r"per[ _-]?(?:second|minute|min|hour)|\b[RT]PM\b|rate.?limit|try again in|retry in", re.IGNORECASE
)
_BAD_KEY = re.compile(
    r"api[ _]key (?:not valid|expired|not found)|API_KEY_INVALID|(?:invalid|incorrect)[ _]api[ _]key", re.IGNORECASE
)
_FLAGGED = re.compile(
    r"flagged|moderation|content[ _-]?(?:policy|filter)|(?:prohibited|inappropriate) content|data_inspection",
    re.IGNORECASE,
)

_STATUS_OF_WORDS = (
    (re.compile(rf"{_FREQUENCY.pattern}|too.?many.?requests|throttl|resource.{{0,10}}exhausted", re.IGNORECASE), 429),
    (_OUT_OF_CREDIT, 402),
    (re.compile(r"api[ _]key|unauthenticated|unauthori[sz]ed|authentication", re.IGNORECASE), 401),
    (re.compile(r"permission|forbidden", re.IGNORECASE), 403),
    (_TOO_LONG, 400),
    (re.compile(r"overload|unavailable|capacity|loading|busy|try again later", re.IGNORECASE), 503),
    (re.compile(r"model.{0,60}not.?(?:found|exist)|not_found_error|unexpected endpoint", re.IGNORECASE), 404),
    (re.compile(r"server.?error|internal|api_error|time.?d?.?out", re.IGNORECASE), 500),
    (re.compile(r"(?:invalid|bad).?(?:request|parameter|argument)|content.?(?:policy|filter)", re.IGNORECASE), 400),
)
"""The status of an error in a 200 that names none: of the first pattern that is found."""
