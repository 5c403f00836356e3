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
"""The longest Retry-After, in seconds, that is obeyed: limits reset daily at the latest. The openai package obeys two
minutes and urllib3 six hours, so both would retry before a daily limit resets."""

SHOWN_ERRORS = 3
"""Validation errors of one request that a message shows."""

DENIED = (401, 403, 404, 405, 407, 410)
"""Statuses about the key, the address or the model, which no single request can change. From a server that has answered
before, they can also come from a gateway while its backend is replaced, and pass."""

UNREACHABLE = "can't be reached"
"""Opening of the message of a connection that failed, as opposed to a gateway's error of the same kind."""

ErrorKind = Literal[
    "rate_limited", "unreachable", "dropped", "retryable", "incomplete", "request", "denied", "fatal", "resend"
]


@dataclass(frozen=True, slots=True)
class ServerError:
    """The reason why a request has no answer.

    kind:
        rate_limited: the server is over its load or rate limit.
        unreachable: no connection, or a gateway without a backend.
        dropped: the connection ended before the first byte of a response. Counts against the request where the server
            answers others, else like unreachable.
        retryable: an error of the server or of this request.
        incomplete: the server broke off its answer to this request, and answers others; retryable.
        request: it won't answer this request.
        denied: it refuses the key, the address or the model (`DENIED`).
        fatal: it will answer no request.
        resend: it requires another form of request, which the next try has.
    status: of an error response, or of the error in the body of a 200; None without any response.
    about_content: with kind request, the error is about the content: its length, or a filter's finding.
    advice: the remedy, where the connection or the server's message gives it; see `refusals.suggest_setting`.
    """

    kind: ErrorKind
    message: str
    retry_after: float | None = None
    status: int | None = None
    about_content: bool = False
    advice: str | None = None

    @property
    def is_connection_failure(self) -> bool:
        """Return True for a connection that failed, False for an error response."""
        return self.message.startswith(UNREACHABLE)


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """An error in the body of a response.

    `status`: the HTTP status that it names; `code`: its code, type and quota ids.
    """

    status: int | None
    code: str
    message: str

    @property
    def text(self) -> str:
        """Return code and message, without the part of the request that some servers repeat."""
        return f"{self.code} {_ECHO.split(self.message[:2_000], 1)[0]}"

    def implied_status(self) -> int:
        """Return the status that it names or that its text implies; 200 if there is none."""
        return self.status or next((status for pattern, status in _STATUS_OF_TEXT if pattern.search(self.text)), 200)


def parse_error(body: Any, text: str) -> ErrorBody | None:
    """Return the error in a response, from its parsed body and its text; None if there is none.

    Reads the forms of OpenAI, vLLM, OpenRouter, Anthropic, Gemini (in a list), FastAPI and MiniMax, and `error` as a
    string. Inner objects come before outer ones.
    """
    body = body[0] if isinstance(body, list) and body else body
    objects = list(_error_objects(body))
    numbers = [entry.get(name) for entry in objects for name in ("code", "status", "status_code", "statusCode")]
    statuses = (int(str(number)) for number in numbers if str(number).isdecimal())
    status = next((number for number in statuses if 400 <= number < 600), None)
    codes = [entry.get(name) for entry in objects for name in ("code", "type", "status")]
    codes += _QUOTA.findall(text[:20_000])
    code = " ".join(value for value in codes if isinstance(value, str) and not value.isdecimal())
    names = ("message", "msg", "detail", "error", "status_msg")
    message = _validation_errors(body, text) or next(
        (value for entry in objects for name in names if isinstance(value := entry.get(name), str)), ""
    )
    message = _PYDANTIC_ECHO.sub("", message)
    raw = next((metadata.get("raw") for entry in objects if isinstance(metadata := entry.get("metadata"), dict)), None)
    if isinstance(raw, str):  # from the server behind OpenRouter
        message = f"{message}: {raw}"
    return ErrorBody(status, code, message or code) if status or message or (code and body.get("error")) else None


def parse_error_body(body: Any, text: str) -> ErrorBody:
    """Return the error in a response with an error status; the complete body if it has no known form."""
    if error := parse_error(body, text):
        return error
    if body:
        is_object = isinstance(body, dict)
        shown = {name: value for name, value in body.items() if name not in ("input", "ctx")} if is_object else body
        return ErrorBody(None, "", json.dumps(shown, ensure_ascii=False))
    title = _TITLE.search(text)
    return ErrorBody(None, "", title[1] if title else _TAG.sub(" ", text))


def classify_error(
    status: int, message: str, error: ErrorBody, headers: Mapping[str, str], *, longest_wait: float
) -> ServerError:
    """Return the meaning of an error.

    Args:
        status: HTTP status; for a 200, the status that its body implies (200 = unknown).
        message: the status and the server's message, without secrets.
        error: the error in the body.
        headers: of the response, for Retry-After.
        longest_wait: seconds; a longer Retry-After is ignored.
    """
    if status in (400, 500) and error.status:  # a gateway's own status around that of the server behind it
        status = error.status
    retry_after = _parse_retry_after(headers)
    if retry_after is not None and retry_after > longest_wait:
        # Milliseconds, or a date in seconds since 1970: use our own backoff.
        message += f" (its Retry-After is not obeyed: it asks for more than {duration(longest_wait)})"
        retry_after = None
    if status == 402 or (status in (200, 400, 401, 403, 412, 429) and _is_out_of_credit(error, retry_after)):
        return ServerError("fatal", message, status=402)
    if status == 400 and _BAD_KEY.search(error.text):
        status = 401  # Gemini's
    is_flagged = status in (400, 403, 422) and bool(_FLAGGED.search(error.text))
    is_long = status == 413 or (status in (400, 422, 500) and is_about_length(error.text))
    match status:
        case 429 | 503 | 529:
            return ServerError("rate_limited", message, retry_after, status)
        case 502 | 520 | 521 | 522 | 523:
            return ServerError("unreachable", message, retry_after, status)
        case _ if status in DENIED and not is_flagged:
            return ServerError("denied", message, status=status)
        case _ if status in (200, 408, 409, 425) or (status >= 500 and not is_long):
            return ServerError("retryable", message, retry_after, status)
        case _:
            is_bytes = status == 413 and not _TOKENS.search(error.text)
            advice = _ABOUT_BYTES if is_bytes else None
            return ServerError("request", message, status=status, about_content=is_long or is_flagged, advice=advice)


def _validation_errors(body: Any, text: str) -> str:
    """Return pydantic's errors in a body, as `body.messages: Field required`; empty if there are none.

    FastAPI sends them as objects, vLLM as the text of a Python list. Each repeats its `input`, which may be the
    complete prompt.
    """
    if "loc" not in text:
        return ""
    errors = list(_validation_objects(body)) or [
        (re.findall(r"[\w-]+", match["loc"]), match["single"] or match["double"] or "")
        for match in _PYDANTIC.finditer(text[:100_000].replace('\\"', '"'))
    ]
    shown = [f"{'.'.join(map(str, location))}: {message}" for location, message in errors[:SHOWN_ERRORS]]
    more = f" (and {len(errors) - SHOWN_ERRORS:,} more)" if len(errors) > SHOWN_ERRORS else ""
    return "; ".join(shown) + more


def _validation_objects(value: Any) -> Iterator[tuple[list[Any], str]]:
    """Yield location and message of each pydantic error in a body."""
    if isinstance(value, dict) and isinstance(value.get("loc"), list) and isinstance(value.get("msg"), str):
        yield value["loc"], value["msg"]
        return
    for name in ("detail", "error", "errors", "message") if isinstance(value, dict) else ():
        yield from _validation_objects(value.get(name))
    for entry in value if isinstance(value, list) else ():
        yield from _validation_objects(entry)


def is_about_length(message: str) -> bool:
    """Return True if an error message says that a request is too long."""
    return bool(_TOO_LONG.search(message))


def is_about_shared_context(message: str) -> bool:
    """Return True if all requests together outgrew the context that they share.

    The slots of llama.cpp share one (`kv_unified`). It then ends them all with a 500, though each would fit alone.
    """
    return "context size has been exceeded" in message.lower()


def _error_objects(body: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a body that may hold an error, the innermost first."""
    if not isinstance(body, dict):
        return
    for name in ("error", "errors", "detail", "base_resp"):
        inner = body.get(name)
        yield from _error_objects(inner[0] if name == "errors" and isinstance(inner, list) and inner else inner)
    yield body


def _is_out_of_credit(error: ErrorBody, retry_after: float | None) -> bool:
    """Return True if credit or a quota is used up, False for a limit per minute that resets by itself."""
    if _EXHAUSTED_FOR_SURE.search(error.text):
        return True
    return retry_after is None and bool(_OUT_OF_CREDIT.search(error.text)) and not _FREQUENCY.search(error.text)


def _parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After: a number or an HTTP date. OpenAI also sends milliseconds."""
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


# Patterns of servers' messages, searched only where the status alone is ambiguous.

_PYDANTIC = re.compile(
    r"""['"]loc['"]\s*:\s*[(\[](?P<loc>[^)\]]{0,300})[)\]]\s*,\s*['"]msg['"]\s*:\s*"""
    r"""(?:'(?P<single>[^'\n]{0,300})'|"(?P<double>[^"\n]{0,300})")"""
)
_PYDANTIC_ECHO = re.compile(r",? ?input_value=.*?, input_type=\w+|\s*For further information visit \S+", re.DOTALL)
_ECHO = re.compile(r"""['"]input['"]\s*:""")
"""Start of the request in pydantic's errors."""
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
    "That is a limit in bytes of the server or of a proxy in front of it (nginx: client_max_body_size), not the "
    "model's context: raise it there, or use shorter rows."
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
"""Final regardless of other text: Gemini says "retry in 20s" next to a daily quotaId or a limit of 0."""
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

_STATUS_OF_TEXT = (
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
"""The status of an error in a 200 that names none: that of the first pattern that matches."""
