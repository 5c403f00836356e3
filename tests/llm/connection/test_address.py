"""Addresses: the request URL, the form for messages, and the proxy on the way."""

from urllib.parse import urlsplit

import pytest

from train.errors import UserError
from train.llm.connection.address import parse_address

PROXY_VARIABLES = [
    name for word in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for name in (word, word.upper())
]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


ASKED = {
    "https://api.example.com": "https://api.example.com/chat/completions",
    "https://api.example.com/": "https://api.example.com/chat/completions",
    "http://localhost:8000/v1": "http://localhost:8000/v1/chat/completions",
    "http://localhost:8000/v1/": "http://localhost:8000/v1/chat/completions",
    "http://localhost:8000/v1//": "http://localhost:8000/v1/chat/completions",
    "HTTP://Host:8000/V1": "http://host:8000/V1/chat/completions",
    " http://h/v1\n": "http://h/v1/chat/completions",
    "http://h/v1/chat/completions": "http://h/v1/chat/completions",
    "http://h/v1/chat/completions/": "http://h/v1/chat/completions",
    "http://h/v1/models": "http://h/v1/chat/completions",
    "http://h/v1/completions?a=b": "http://h/v1/chat/completions?a=b",
    "http://h/v1#top": "http://h/v1/chat/completions",
    "http://[::1]:8000/v1": "http://[::1]:8000/v1/chat/completions",
    "http://h/a%2Fb/v1": "http://h/a%2Fb/v1/chat/completions",
    "https://h/openai/deployments/d?api-version=2024-10-21": "https://h/openai/deployments/d/chat/completions?api-version=2024-10-21",
    "https://h/d/?api-version=1&x=%20y": "https://h/d/chat/completions?api-version=1&x=%20y",
    "https://h?k=v": "https://h/chat/completions?k=v",
    "http://me:pa$$word@h/v1": "http://me:pa$$word@h/v1/chat/completions",
    "http://http:8000/v1": "http://http:8000/v1/chat/completions",
    "http://h/a$b/v1?x=$y": "http://h/a$b/v1/chat/completions?x=$y",
}  # fmt: skip


@pytest.mark.parametrize(("base_url", "asked"), ASKED.items())
def test_the_endpoint_is_below_the_base_and_the_query_stays(base_url: str, asked: str) -> None:
    address = parse_address(base_url)
    assert address.url("chat/completions") == asked
    assert address.url("models") == asked.replace("/chat/completions", "/models")
    assert urlsplit(asked).hostname == address.host  # no path ever becomes part of a host's name


REFUSED = {
    "localhost:8000/v1": "Write http://localhost:8000/v1.",
    "10.0.0.7:8000": "Write http://10.0.0.7:8000.",
    "api.example.com/v1": "Write http://api.example.com/v1.",
    "[::1]:8000/v1": "is not a URL",
    "localhost": "write it like http://localhost:8000/v1.",
    "ftp://h/v1": "write it like http://localhost:8000/v1.",
    "http:/h/v1": "http must be followed by ://. Write http://h/v1.",
    "http//h:8000/v1": "Write http://h:8000/v1.",
    "https:h/v1": "Write https://h/v1.",
    "HTTP:/[::1]:8000/v1": "Write http://[::1]:8000/v1.",
    "http:8000/v1": "Write http://http:8000/v1.",
    "http://::1:8000/v1": "must be in brackets. Write http://[::1]:8000/v1.",
    "https://2001:db8::7/v1": "must be in brackets. Write https://[2001:db8::7]/v1.",
    "http://me:hush@fe80::1:80/v1?key=hush": "must be in brackets. Write http://[fe80::1]:80/v1",
    "ws://h:8000/v1": "is a web socket, and chat APIs speak http. Write http://h:8000/v1.",
    "wss://h/v1": "Write https://h/v1.",
    "htp://h/v1": "begins with htp:// instead of http:// or https://; write it like http://localhost:8000/v1.",
    "unix:///tmp/x.sock": "begins with unix://",
    "${LLM_URL}/v1": "it contains ${LLM_URL}, and variables are not expanded here. Write the address itself.",
    "$LLM_URL/v1": "it contains $LLM_URL,",
    "http://${HOST}:${PORT}/v1": "it contains ${HOST},",
    "http://h:8000/${VERSION}": "it contains ${VERSION},",
    "http://{{host}}/v1": "it contains {{host}},",
    "%LLM_URL%/v1": "it contains %LLM_URL%,",
    "http://h/v1?api-key=${KEY}": "it contains ${KEY},",
    '"http://h/v1"': "is in quotes or brackets",
    "http://h/v1\u201d": "is in quotes or brackets",
    "<http://h/v1>": "is in quotes or brackets",
    "http://": "is not a URL",
    "http://:8000/v1": "is not a URL",
    "http://h:port/v1": "Invalid port",
    "http://h:99999/v1": "from 1 to 65535",
    "http://h:0/v1": "from 1 to 65535",
    "http://h /v1": "white space",
    "http://h/v1 http://i/v1": "white space",
    "http://h\n/v1": "white space",
    "http://h\x00/v1": "is not a URL",
    "": "is not a URL",
}


@pytest.mark.parametrize(("base_url", "message"), REFUSED.items())
def test_an_invalid_base_url_is_an_error_with_advice(base_url: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^base_url '") as failure:
        parse_address(base_url)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("base_url", "shown"),
    [
        ("http://me:hush@h:1/v1", "http://h:1/v1"),
        ("https://h/d?api-version=1&api-key=hush", "https://h/d?api-version=1&api-key=***"),
        ("https://h/d?subscription-key=hush", "https://h/d?subscription-key=***"),
        ("https://h/d?sig=hush&model=m", "https://h/d?sig=***&model=m"),
        ("https://h/d?access_token=hush", "https://h/d?access_token=***"),
    ],
)
def test_an_address_is_shown_with_its_query_and_without_its_secrets(base_url: str, shown: str) -> None:
    address = parse_address(base_url)
    assert address.shown == shown
    assert "hush" in address.secrets


@pytest.mark.parametrize(
    "base_url",
    ["http://me:hush@h:port/v1", "me:hush@h/v1", "http://me:hush@h /v1?key=hush", "http://me:hush/h@ush@h/v1"],
)
def test_no_password_is_in_an_error_about_an_address(base_url: str) -> None:
    with pytest.raises(UserError, match="is not a URL") as failure:
        parse_address(base_url)
    assert "hush" not in str(failure.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.1.1", "[::1]", "0.0.0.0", "[::]", "api.localhost"])
def test_this_machine_needs_no_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid:3128")
    assert parse_address(f"http://{host}:8000/v1").proxy is None


@pytest.mark.parametrize(
    ("no_proxy", "goes_straight"),
    [
        ("gpu7", True),
        (".cluster.local,gpu7", True),
        ("gpu7:8000", True),
        ("*", True),
        ("gpu", False),
        ("10.0.0.0/8", False),
        ("", False),
    ],
)
def test_no_proxy_is_respected(no_proxy: str, goes_straight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert (parse_address("http://gpu7:8000/v1").proxy is None) == goes_straight


@pytest.mark.parametrize(
    ("network", "goes_straight"), [("10.0.0.0/8", True), ("10.1.2.3", True), ("10.2.0.0/16", False)]
)
def test_no_proxy_names_networks(network: str, goes_straight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", f"example.com, {network}")
    assert (parse_address("http://10.1.2.3:8000/v1").proxy is None) == goes_straight


def test_a_proxy_is_named_with_its_variable_and_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "me:hush@proxy:3128")
    proxy = parse_address("https://h/v1").proxy
    assert str(proxy) == "the proxy http://proxy:3128 of https_proxy"
    assert proxy is not None
    assert proxy.url == "http://me:hush@proxy:3128"
    assert parse_address("http://h/v1").proxy is None


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("all_proxy", "socks://me:hush@127.0.0.1:7891/", "all_proxy: the proxy socks://***@127.0.0.1:7891/ of"),
        ("ALL_PROXY", "socks4://127.0.0.1:1080", "ALL_PROXY: the proxy socks4://127.0.0.1:1080 of"),
        ("http_proxy", "ftp://proxy:21", "http_proxy: the proxy ftp://proxy:21 of"),
        ("HTTP_PROXY", "http://", "HTTP_PROXY: the proxy http:// of"),
        ("http_proxy", "http://proxy:port", "http_proxy: the proxy http://proxy:port of"),
    ],
)
def test_a_proxy_that_can_not_be_used_is_one_error(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as failure:
        parse_address("http://h/v1")
    assert str(failure.value).startswith(message)
    assert "hush" not in str(failure.value)


def test_socks_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5h://proxy:1080")
    monkeypatch.setattr("train.llm.connection.address.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^all_proxy: the proxy socks5h://proxy:1080 .*pip install socksio"):
        parse_address("http://h/v1")
