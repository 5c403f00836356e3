"""Redaction of secrets (keys, passwords) and their encoded forms in messages of servers and exceptions.

A text is searched for runs of eight characters of any form of a secret, which also finds parts of it in a truncated
message. Forms: plain; as `repr`, JSON, HTML and URLs encode it, also nested; hex; base64 at every alignment.
"""

import base64
import html
import json
import re
from collections.abc import Callable, Iterable
from urllib.parse import quote, quote_plus

WINDOW = 8
"""Length of the runs that are searched for. Shorter ones occur in ordinary words."""
SHORTEST_CERTAIN = 12
"""Length from which a secret in an answer is no coincidence. Keys of services are longer; for servers that ignore the
key, users set `EMPTY` or `dummy`, which models also write."""
PREFIX = 16
"""Length of a secret's beginning that is searched for in answers."""
LONGEST_SEARCHED = 100_000
"""Characters of a text that are searched; the rest is dropped. Messages show a few hundred of them."""

_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def _json_without_ascii_symbols(text: str) -> str:
    """Return `text` with each symbol as \\uXXXX, as Java's, Go's and .NET's writers do for some."""
    return re.sub(r"[^\w ]", lambda match: f"\\u{ord(match[0]):04x}", text)


_ENCODERS: tuple[Callable[[str], str], ...] = (
    lambda text: repr(text)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    _json_without_ascii_symbols,
    html.escape,
    lambda text: re.sub(r"[^\w ]", lambda match: f"&#{ord(match[0])};", text),
    quote,
    quote_plus,
    lambda text: quote(text, safe=""),
)


class Redactor:
    """Replacement of secrets by `***`."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        secrets = {secret for secret in secrets if secret}
        encoded = {encode(secret) for secret in secrets for encode in _ENCODERS} | secrets
        forms = {encode(form) for form in encoded for encode in _ENCODERS} | encoded
        for secret in secrets:
            forms.update(_as_bytes(secret))
        self._forms = sorted((form.translate(_LOWER) for form in forms), key=len, reverse=True)
        self._windows = {
            form[start : start + WINDOW] for form in self._forms for start in range(len(form) - WINDOW + 1)
        }
        self._certain = sorted(
            {form[:PREFIX] for secret in secrets if len(secret) >= SHORTEST_CERTAIN for form in _plain_forms(secret)}
        )

    def clean(self, text: str) -> str:
        """Return `text` without any secret."""
        text = text[:LONGEST_SEARCHED]
        if not self._forms:
            return text
        lowered = text.translate(_LOWER)
        hidden = bytearray(len(text))
        for start in range(len(text) - WINDOW + 1):
            if lowered[start : start + WINDOW] in self._windows:
                hidden[start : start + WINDOW] = b"x" * WINDOW
        for form in self._forms:
            if len(form) < WINDOW and form in lowered:
                pattern = re.escape(form) if len(form) > 3 else rf"(?<!\w){re.escape(form)}(?!\w)"
                for match in re.finditer(pattern, lowered):
                    hidden[match.start() : match.end()] = b"x" * len(match[0])
        for run in reversed(list(re.finditer(b"x+", hidden))):
            text = f"{text[: run.start()]}***{text[run.end() :]}"
        return text

    def holds_secret(self, *texts: str | None) -> bool:
        """Return True if an answer repeats a secret. It searches few forms: it runs for every answer."""
        return any(form in text for form in self._certain for text in texts if text)


def _as_bytes(secret: str) -> Iterable[str]:
    """Yield hex and base64 of a secret: of base64 the part that does not depend on the bytes around it."""
    raw = secret.encode("utf-8", "surrogateescape")
    yield raw.hex()
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            digits = encode(bytes(before) + raw).rstrip(b"=").decode()
            # A digit holds six bits: those that overlap a neighbouring byte vary.
            first, last = -(-8 * before // 6), 8 * (before + len(raw)) // 6
            yield digits[first:last]


def _plain_forms(secret: str) -> Iterable[str]:
    yield secret
    yield quote(secret, safe="")
    yield json.dumps(secret)[1:-1]
    yield base64.b64encode(secret.encode("utf-8", "surrogateescape")).rstrip(b"=").decode()[:-1]
