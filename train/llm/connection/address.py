"""Addresses of servers: request URLs, the proxy on the way, and the form of an address for messages."""

import contextlib
import ipaddress
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from urllib.request import getproxies, proxy_bypass

import httpx2

from train.errors import UserError

_ENDPOINT = re.compile(r"/(chat/completions|completions|models)$")
_SECRET_NAME = re.compile(r"key|token|secret|sig|passw|auth|cred|code", re.IGNORECASE)
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_EXAMPLE = "http://localhost:8000/v1"
_QUOTES = "\"'`<>\u201c\u201d\u2018\u2019"
_BRACED = re.compile(r"\$\{[^}]*\}|\$\([^)]*\)|\{\{.*?\}\}")
_VARIABLE = re.compile(rf"{_BRACED.pattern}|\$\w+|%\w+%")
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy from the environment. `shown`: its URL without user and password."""

    url: str
    variable: str
    shown: str
    secrets: tuple[str, ...]

    def __str__(self) -> str:
        """Return its name for messages."""
        return f"the proxy {self.shown} of {self.variable}"

    @property
    def advice(self) -> str:
        """Return the way to avoid it."""
        return f"unset {self.variable}, or name the server's host in no_proxy"


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a server.

    base: the base URL, without a query.
    shown: the same with the query, for messages: without user, password and the values of secret parameters.
    secrets: the values that `shown` leaves out, and the proxy's password.
    """

    base: httpx2.URL
    query: str
    shown: str
    secrets: tuple[str, ...]
    proxy: Proxy | None

    @property
    def host(self) -> str:
        """Return the host's name."""
        return self.base.host

    @property
    def is_plain(self) -> bool:
        """Return True for http, False for https."""
        return self.base.scheme == "http"

    def url(self, path: str, base: httpx2.URL | None = None) -> str:
        """Return the URL of a path such as "chat/completions", with the address's query."""
        base = base or self.base
        raw = base.raw_path.rstrip(b"/") + f"/{path}{self.query and '?'}{self.query}".encode()
        return str(base.copy_with(raw_path=raw))

    def format_base(self, base: httpx2.URL) -> str:
        """Return another base with the address's query, for messages."""
        return redact_url(base) + _redact_query(self.query)

    def with_path(self, path: str) -> httpx2.URL:
        """Return the base with another path."""
        return self.base.copy_with(raw_path=path.encode())


def parse_address(base_url: str) -> Address:
    """Return the address of a `base_url`. Raises UserError if it is not valid.

    A trailing slash, a fragment and the path of an endpoint (`/chat/completions`) are dropped.
    """
    text = base_url.strip()
    if error := _explain_malformed(text) or _explain_invalid(text):
        raise UserError(f"base_url {_redact(text)!r} is not a URL: {error}.")
    url = httpx2.URL(text)
    path, _, query = url.raw_path.decode("ascii").partition("?")
    path = _ENDPOINT.sub("", path.rstrip("/")).rstrip("/")
    base = url.copy_with(raw_path=(path or "/").encode(), fragment=None)
    secrets = [url.password, url.userinfo.decode("ascii") if url.password else "", *_secret_values(url.params)]
    proxy = find_proxy(url)
    return Address(
        base=base,
        query=query,
        shown=redact_url(base) + _redact_query(query),
        secrets=(*filter(None, secrets), *(proxy.secrets if proxy else ())),
        proxy=proxy,
    )


def _explain_malformed(text: str) -> str:
    """Return the error in a `base_url` and what to write, for errors with a likely cause; empty if there is none."""
    scheme, _, rest = text.partition("://")
    host = re.split(r"[/?#]", rest or text, maxsplit=1)[0].rpartition("@")[2]
    if re.search(r"\s", text):
        return "it contains white space. Remove it"
    if text and (text[0] in _QUOTES or text[-1] in _QUOTES):
        return "it is in quotes or brackets. Write it without them"
    if variable := _VARIABLE.search(host) or _BRACED.search(text.rpartition("@")[2]):
        return f"it contains {variable[0]}, and variables are not expanded here. Write the address itself"
    if prefix := re.match(r"(https?)(?!://|:\d+(?:/|$))(?::/?|/{1,2})(?=[\w\[])", text, re.IGNORECASE):
        return f"{prefix[1]} must be followed by ://. Write {prefix[1].lower()}://{_redact(text[prefix.end() :])}"
    if rest and scheme.lower() in ("ws", "wss"):
        http = "https" if scheme.lower() == "wss" else "http"
        return f"{scheme}:// is a web socket, and chat APIs speak http. Write {http}://{_redact(rest)}"
    if rest and host.count(":") > 1 and "[" not in host:
        before, _, port = host.rpartition(":")
        is_before_port = port.isdecimal() and isinstance(_parse_ip(before), ipaddress.IPv6Address)
        inside = f"[{before}]:{port}" if is_before_port else f"[{host}]"
        return f"an IPv6 address must be in brackets. Write {scheme}://{inside}{_redact(rest.partition(host)[2])}"
    if rest and scheme.lower() not in ("http", "https"):
        return f"it begins with {_redact(scheme)}:// instead of http:// or https://; write it like {_EXAMPLE}"
    return ""


def _explain_invalid(text: str) -> str:
    """Return the error in the URL of a `base_url`; empty if there is none."""
    example = f"write it like {_EXAMPLE}"
    if "://" not in text and re.search(r"\w[.:/]", text):
        example = f"http:// or https:// is missing. Write http://{_redact(text).lstrip('/')}"
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        reason = str(error).rstrip(".") if "@" not in text else "it can't be parsed"  # it may quote a password
        return f"{reason}; {example}"
    if not url.host or url.scheme not in ("http", "https"):
        return example
    return "" if url.port is None or 0 < url.port < 65536 else "a port is a number from 1 to 65535"


def redact_url(url: httpx2.URL) -> str:
    """Return a URL for messages: without user, password and query."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None)).rstrip("/")


def format_redirect_target(url: httpx2.URL) -> str:
    """Return a redirect's target for messages, as a `base_url`."""
    base = url.copy_with(raw_path=_ENDPOINT.sub("", url.raw_path.partition(b"?")[0].decode("ascii")).encode() or b"/")
    return redact_url(base) + _redact_query(url.query.decode("ascii"))


def _secret_values(params: httpx2.QueryParams) -> list[str]:
    return [value for name, value in params.multi_items() if _SECRET_NAME.search(name)]


def _redact_query(query: str) -> str:
    """Return a query with the values of its secret parameters replaced, with its question mark."""
    parts = [part.partition("=") for part in query.split("&") if part]
    shown = [f"{name}={'***' if _SECRET_NAME.search(name) else value}" for name, _, value in parts]
    return f"?{'&'.join(shown)}" if shown else ""


def _redact(text: str) -> str:
    """Return the part of a malformed URL that may be shown."""
    before, at, after = text.rpartition("@")
    if at:
        scheme, colon, _ = before.rpartition("://")
        text = f"{scheme}{colon}***@{after}"
    return re.sub(r"\?.*", "?...", text, flags=re.DOTALL)


def find_proxy(url: httpx2.URL) -> Proxy | None:
    """Return the environment's proxy for a URL; None for this machine. Raises UserError for an invalid one."""
    host = url.host.rstrip(".")
    at = f"{host}:{url.port or {'http': 80, 'https': 443}[url.scheme]}"
    if host in _THIS_MACHINE or host.endswith(".localhost") or proxy_bypass(at) or _in_excluded_network(host):
        return None
    proxies = getproxies()
    scheme = url.scheme if proxies.get(url.scheme) else "all"
    if not (value := proxies.get(scheme)):
        return None
    variable = f"{scheme}_proxy" if f"{scheme}_proxy" in os.environ else f"{scheme}_proxy".upper()
    proxy = _parse_proxy(value, variable)
    # Checked last, so that an invalid proxy is reported although this address would not use it.
    address = _parse_ip(host)
    return None if address and address.is_loopback else proxy


def _parse_proxy(value: str, variable: str) -> Proxy:
    text = value.strip() if "://" in value else f"http://{value.strip()}"
    shown = _redact(text)
    allowed = "http://host:port, https://host:port or socks5://host:port"
    otherwise = f"Set {variable} to {allowed}, unset it, or name the server's host in no_proxy"
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in _PROXY_SCHEMES or not url.host:
        raise UserError(f"{variable}: the proxy {shown} of the environment can't be used. {otherwise}.")
    if url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise UserError(
            f"{variable}: the proxy {shown} of the environment needs the package socksio: `pip install socksio`. "
            f"Or unset {variable}, or name the server's host in no_proxy."
        )
    secrets = (url.password, url.userinfo.decode("ascii")) if url.password else ()
    return Proxy(text, variable, redact_url(url), secrets)


def _parse_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def _in_excluded_network(host: str) -> bool:
    """Return True if no_proxy names a network (10.0.0.0/8) that contains `host`; curl reads these, urllib does not."""
    address = _parse_ip(host)
    for part in getproxies().get("no", "").split(",") if address else ():
        with contextlib.suppress(ValueError):
            if "/" in part and address in ipaddress.ip_network(part.strip(), strict=False):
                return True
    return False
