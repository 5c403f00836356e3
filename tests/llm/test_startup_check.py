"""First contact: wrong addresses, TLS, redirects, proxies, unreachable servers, and the startup check."""

import argparse
import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from certificates import encryption_with, write_certificate
from client_runs import SHORT, about, echo
from scripted_server import Asked, Reply, Script, ScriptedServer, chat_reply, error

from train.cli import duration_seconds
from train.errors import UserError
from train.llm.client import Client
from train.llm.failures import RequestFailed
from train.llm.journal import Journal
from train.llm.request import Decoding
from train.llm.server import Server
from train.llm.startup_check import check_servers


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(word, raising=False)
        monkeypatch.delenv(word.upper(), raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setenv("MY_KEY", "sk-the-key-of-this-test")


async def ask(servers: list[Server] | Server, folder: Path, *prompts: str, wait: float = 30.0) -> list[str]:
    """Return the answers to prompts, asked one after another."""
    servers = servers if isinstance(servers, list) else [servers]
    with Journal(folder / "answers.sqlite") as journal:
        async with Client(servers, "m", journal, backoff=SHORT, wait_for_server=wait) as client:
            return [(await asyncio.wait_for(client.ask(about(prompt)), 30)).text for prompt in prompts or ("hi",)]


async def refusal(servers: list[Server] | Server, folder: Path, wait: float = 30.0) -> str:
    """Return the error that ends the run."""
    with pytest.raises(UserError) as failure:
        await ask(servers, folder, wait=wait)
    message = str(failure.value)
    assert "\n" not in message
    assert "sk-the-key" not in message
    return message


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# TLS


@pytest.mark.parametrize(
    ("name", "trusted", "message"),
    [
        ("good", False, "self-signed certificate. Set SSL_CERT_FILE to a PEM file with this certificate"),
        ("expired", True, "certificate has expired. Renew the certificate on the server"),
        ("another host", True, "IP address mismatch.*Use the host name in the certificate as base_url"),
        ("good", True, ""),
    ],
)
def test_a_certificate_that_can_not_be_trusted_ends_the_run(
    name: str, trusted: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = write_certificate(name, tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    async def work() -> None:
        async with ScriptedServer(echo, encryption=encryption_with(certificate)) as server:
            if message:
                assert re.search(message, await refusal(Server(server.url), tmp_path))
            else:
                assert await ask(Server(server.url), tmp_path) == ["re: hi"]

    asyncio.run(work())


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"no PEM", "it holds no PEM certificate")])
def test_a_file_of_certificates_that_can_not_be_read_is_one_error(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "c.pem").write_bytes(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "c.pem"))
    message = asyncio.run(refusal(Server("https://localhost:1/v1"), tmp_path))
    assert message.startswith(f"SSL_CERT_FILE: {tmp_path / 'c.pem'} can't be used: {reason}")


@contextlib.asynccontextmanager
async def listening(handle: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    """Open a server that reads the first bytes of a connection and closes it; yield its port."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await handle(await reader.read(65_536), writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def answer_anything(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


async def hang_up_on_what_is_no_http(head: bytes, writer: asyncio.StreamWriter) -> None:
    if head.startswith(b"GET"):
        await answer_anything(head, writer)


@pytest.mark.parametrize("handle", [answer_anything, hang_up_on_what_is_no_http])
def test_https_to_a_plain_port_advises_http(
    handle: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]], tmp_path: Path
) -> None:
    async def work() -> None:
        async with listening(handle) as port:
            message = await refusal(Server(f"https://127.0.0.1:{port}/v1?api-version=1"), tmp_path)
            assert f"Write http://127.0.0.1:{port}/v1?api-version=1 as base_url." in message

    asyncio.run(work())


def test_plain_http_to_a_tls_port_advises_https(tmp_path: Path) -> None:
    certificate = write_certificate("good", tmp_path)

    async def work() -> None:
        async with ScriptedServer(echo, encryption=encryption_with(certificate)) as server:
            message = await refusal(Server(server.url.replace("https://", "http://")), tmp_path)
            assert f"Write {server.url} as base_url." in message
            with pytest.raises(UserError, match=f"Write {server.url} as base_url."):
                await check_servers([Server(server.url.replace("https://", "http://"))], "m", backoff=SHORT)

    asyncio.run(work())


def test_a_400_without_json_from_a_plain_server_fails_the_request(tmp_path: Path) -> None:
    """The test for TLS on its port fails."""

    async def work() -> None:
        async with listening(answer_anything) as port:
            with pytest.raises(RequestFailed, match=r"^400 Bad Request$"):
                await ask(Server(f"http://127.0.0.1:{port}/v1"), tmp_path)

    asyncio.run(work())


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_named_and_never_followed(status: int, tmp_path: Path) -> None:
    async def work() -> None:
        async with ScriptedServer(echo) as target:

            async def script(asked: Asked) -> Reply:
                return Reply(status, b"", {"Location": target.url.replace("/v1", asked.path)})

            async with ScriptedServer(script) as server:
                message = await refusal(Server(server.url, key_variable="MY_KEY"), tmp_path)
                assert f"it redirects to {target.url}. Write {target.url} as base_url." in message
                assert target.asked == []  # and it did not get the key

    asyncio.run(work())


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/api/v1/chat/completions", "/api/v1. Write http://127.0.0.1:PORT/api/v1 as base_url."),
        ("https://h.example/v1/chat/completions?api-version=1", "Write https://h.example/v1?api-version=1 as base_url"),
        (
            "https://sso.example/login?token=hush",
            "redirects to https://sso.example/login?token=***. That is no chat API",
        ),
        ("/v1/chat/completions", "That is no chat API"),
        ("http://h:port/", "a redirect to nowhere"),
        (None, "a redirect to nowhere"),
    ],
)
def test_the_target_of_a_redirect_decides_the_advice(location: str | None, message: str, tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return Reply(307, b"", {"Location": location} if location else {})

    async def work() -> None:
        async with ScriptedServer(script) as server:
            port = server.url.split(":")[2].removesuffix("/v1")
            assert message.replace("PORT", port) in await refusal(Server(server.url), tmp_path)

    asyncio.run(work())


@pytest.mark.parametrize("status", [301, 307, 308])
@pytest.mark.parametrize("written", ["/v1", "/v1/chat/completions/"])
def test_a_server_that_redirects_to_a_trailing_slash_gets_it(status: int, written: str, tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        path, _, query = asked.path.partition("?")
        if path.endswith("/"):
            return await echo(asked)
        return Reply(status, b"", {"Location": f"{path}/?{query}"})

    async def work() -> None:
        async with ScriptedServer(script) as server:
            url = server.url.replace("/v1", f"{written}?a=b")
            with Journal(tmp_path / "answers.sqlite") as journal:
                async with Client([Server(url, key_variable="MY_KEY")], "m", journal, backoff=SHORT) as client:
                    await asyncio.gather(*(client.ask(about(f"{number}")) for number in range(20)))
                    assert client.counts.failed == 0
            paths = [asked.path for asked in server.asked]
            assert paths[0] == "/v1/chat/completions?a=b"
            assert paths.count("/v1/chat/completions/?a=b") == 20

    asyncio.run(work())


@pytest.mark.parametrize("step", [1, -1])
def test_redirect_loops_end_the_run(step: int, tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        path = asked.path.rstrip("/")
        slashes = len(asked.path) - len(path)
        return Reply(307, b"", {"Location": path + "/" * (slashes + step if slashes else 1)})

    async def work() -> None:
        async with ScriptedServer(script) as server:
            assert "it redirects to " in await refusal(Server(server.url), tmp_path)
            assert len([asked for asked in server.asked if asked.body]) == 2

    asyncio.run(work())


@pytest.mark.parametrize("location", ["http://other.invalid/v1/chat/completions/", "/v1/chat/completions//", "/"])
def test_a_slash_elsewhere_is_a_redirect(location: str, tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return Reply(307, b"", {"Location": location})

    async def work() -> None:
        async with ScriptedServer(script) as server:
            assert "it redirects to " in await refusal(Server(server.url), tmp_path)
            assert len([asked for asked in server.asked if asked.body]) == 1

    asyncio.run(work())


# Paths and models


def at(path: str, *, lists: bool = True) -> Script:
    """Return the script of a server with its API under `path`."""

    async def script(asked: Asked) -> Reply:
        if asked.path == f"{path}/models" and lists:
            return Reply(200, {"object": "list", "data": [{"id": "m"}]})
        if asked.path == f"{path}/chat/completions":
            return await echo(asked) if asked.body else error(405, "Method Not Allowed")
        return Reply(404, {"detail": "Not Found"})

    return script


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize(
    ("right", "written"),
    [("/v1", ""), ("/v1", "/"), ("/api/v1", "/v1"), ("/v1", "/api"), ("", "/v1"), ("/x/v1", "/x"), ("/v1", "/v1/v1")],
)
def test_the_error_of_a_wrong_path_names_the_right_one(right: str, written: str, lists: bool, tmp_path: Path) -> None:
    async def work() -> None:
        async with ScriptedServer(at(right, lists=lists)) as server:
            host = server.url.removesuffix("/v1")
            assert f"Write {host}{right} as base_url." in await refusal(Server(f"{host}{written}"), tmp_path)
            with pytest.raises(UserError, match=f"Write {host}{right} as base_url."):
                await check_servers([Server(f"{host}{written}")], "m")

    asyncio.run(work())


def answering_as(name: str, *listed: dict) -> Script:
    """Return the script of a server that answers any model name."""

    async def script(asked: Asked) -> Reply:
        if not asked.body:
            return Reply(200, {"object": "list", "data": list(listed)})
        reply = await echo(asked)
        reply.body["model"] = name
        return reply

    return script


@pytest.mark.parametrize(
    ("script", "only"),
    [
        (answering_as("tiny.gguf", {"id": "tiny.gguf"}), "tiny.gguf"),
        (answering_as("tiny.gguf", {"id": "tiny.gguf", "aliases": ["tiny.gguf", "m"]}), None),
        (answering_as("base", {"id": "base"}, {"id": "other"}), None),  # a router, or a deployment's own name
        (answering_as("m@main", {"id": "cached"}), None),
        (answering_as("m-2024-08-06", {"id": "m"}), None),
    ],
)
def test_a_server_that_ignores_the_model_name_is_an_error(script: Script, only: str | None, tmp_path: Path) -> None:
    async def work() -> None:
        async with ScriptedServer(script) as server:
            if only is None:
                assert await ask(Server(server.url), tmp_path) == ["re: hi"]
                await check_servers([Server(server.url)], "m")
                return
            message = await refusal(Server(server.url), tmp_path)
            assert "the only model that it serves, and not as 'm'. Write tiny.gguf as the model's name." in message
            with pytest.raises(UserError, match=r"Write tiny\.gguf as the model's name"):
                await check_servers([Server(server.url)], "m")

    asyncio.run(work())


# Servers that can't be reached


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:{port}/v1", "connection refused: nothing listens there"),
        ("https://127.0.0.1:{port}/v1", "connection refused: nothing listens there"),
        ("http://no-such-host.invalid/v1", "unknown host name"),
    ],
)
def test_a_server_that_can_not_be_reached_at_the_start_ends_the_run(url: str, why: str, tmp_path: Path) -> None:
    url = url.format(port=free_port())
    message = asyncio.run(refusal(Server(url), tmp_path, wait=0.02))
    assert message.startswith(f"{url} can't be reached ({why}")
    assert "Check host and port" in message
    assert "--wait-for-server" in message


def test_a_gateway_without_its_server_ends_the_run_too(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return error(502, "no upstream")

    async def work() -> None:
        async with ScriptedServer(script) as server:
            message = await refusal(Server(server.url), tmp_path, wait=0.02)
            assert message.startswith(f"{server.url} answers 502 Said: no upstream. Check")

    asyncio.run(work())


def test_the_run_waits_for_a_server_that_starts_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        server = ScriptedServer(echo)
        async with server:
            pass  # it has a port now, and is down
        asking = asyncio.create_task(ask(Server(server.url), tmp_path))
        looking = asyncio.create_task(check_servers([Server(server.url)], "m", wait=30))
        while "waiting up to" not in capsys.readouterr().out:
            await asyncio.sleep(0.01)
        async with server:
            assert await asking == ["re: hi"]
            await looking

    asyncio.run(work())
    assert "answers as m" in capsys.readouterr().out


def test_the_run_waits_without_a_limit_for_a_server_that_was_reached(tmp_path: Path) -> None:
    async def work() -> None:
        server = ScriptedServer(echo)
        with Journal(tmp_path / "answers.sqlite") as journal:
            async with server, Client([Server(server.url)], "m", journal, backoff=SHORT, wait_for_server=0) as client:
                await client.ask(about("before"))
                await server.__aexit__()
                asking = asyncio.create_task(client.ask(about("after")))
                while client.counts.retries < 5:
                    await asyncio.sleep(0.001)
                async with server:
                    assert (await asking).text == "re: after"

    asyncio.run(work())


def test_one_of_several_that_can_not_be_reached_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = Server(f"http://127.0.0.1:{free_port()}/v1")

    async def work() -> None:
        async with ScriptedServer(echo) as server:
            servers = [away, Server(server.url)]
            prompts = [f"{number}" for number in range(6)]
            assert await ask(servers, tmp_path, *prompts, wait=0) == [f"re: {prompt}" for prompt in prompts]
            await check_servers(servers, "m")

    asyncio.run(work())
    shown = capsys.readouterr()
    warnings = [
        line for line in shown.err.splitlines() if line.startswith(f"warning: {away.base_url} can't be reached")
    ]
    assert len(warnings) == 2  # one of each
    assert "The run continues with the other servers." in warnings[0]


def test_one_of_several_with_a_permanent_error_ends_the_run(tmp_path: Path) -> None:
    certificate = write_certificate("good", tmp_path)

    async def work() -> None:
        async with (
            ScriptedServer(echo) as good,
            ScriptedServer(echo, encryption=encryption_with(certificate)) as untrusted,
        ):
            assert "SSL_CERT_FILE" in await refusal([Server(untrusted.url), Server(good.url)], tmp_path)

    asyncio.run(work())


def test_answers_in_the_journal_need_no_server(tmp_path: Path) -> None:
    async def work() -> None:
        async with ScriptedServer(echo) as server:
            await ask(Server(server.url), tmp_path)
        assert await ask(Server(server.url), tmp_path, wait=0) == ["re: hi"]

    asyncio.run(work())


# Proxies


@contextlib.asynccontextmanager
async def proxy_that_says(status: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    async def handle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()

    async with listening(handle) as port:
        for variable in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(variable, f"http://me:hush-hush@127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("407 Proxy Authentication Required", "requires a user name and a password"),
        ("403 Forbidden", "403 Forbidden"),
        ("502 Bad Gateway", "502 Bad Gateway"),
    ],
)
def test_a_proxy_that_refuses_is_named(
    scheme: str, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with proxy_that_says(status, monkeypatch) as proxy:
            message = await refusal(Server(f"{scheme}://h.example/v1"), tmp_path, wait=0)
            assert f"the proxy {proxy} of {scheme}_proxy" in message
            assert reason in message
            assert "hush" not in message

    asyncio.run(work())


def test_the_web_page_of_a_refusing_proxy_is_not_taken_for_a_wrong_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = {
        b"<html><title>ERROR: The requested URL could not be retrieved</title></html>": "The proxy may be what refuses",
        b'{"error": {"message": "no"}}': "It requires a key",
    }

    async def work() -> None:
        for body, advice in replies.items():

            async def handle(head: bytes, writer: asyncio.StreamWriter, body: bytes = body) -> None:
                writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()

            async with listening(handle) as port:
                monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
                message = await refusal(Server("http://h.example/v1"), tmp_path, wait=0)
                assert advice in message
                assert ("unset http_proxy, or name the server's host in no_proxy." in message) == (
                    "proxy may" in advice
                )

    asyncio.run(work())


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_can_not_be_reached_is_named(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("ALL_PROXY", f"http://me:hush-hush@{proxy}")
    message = asyncio.run(refusal(Server(f"{scheme}://h.example/v1"), tmp_path, wait=0))
    assert "can't be reached (connection refused by the proxy http://" + proxy + " of ALL_PROXY" in message
    assert "hush" not in message


# The startup check

CHECKS = {
    "a name in the list": (Reply(200, {"data": [{"id": "m"}]}), chat_reply("x"), None, "answers as m", 2),
    "Gemini's list": (Reply(200, {"data": [{"id": "models/m"}]}), chat_reply("x"), None, "answers as m", 2),
    "a bare list": (Reply(200, [{"id": "m"}]), chat_reply("x"), None, "answers as m", 2),
    "a name that is not in the list": (Reply(200, {"data": [{"id": "n"}]}), chat_reply("x"), None, "answers as m", 2),
    "no list": (Reply(500, b"Internal Server Error"), chat_reply("x"), None, "answers as m", 2),
    "an empty answer": (Reply(404, b""), chat_reply(""), None, "answers as m", 2),
    "a key": (Reply(200, {"data": [{"id": "m"}]}), chat_reply("x"), "MY_KEY", "answers as m", 2),
    "a busy server": (error(503, "Loading model"), error(503, "Loading model"), None, "busy: 503 Said: Loading", 2),
    "one token is too few": (error(404, "x"), error(400, "raise max_tokens"), None, "is reached, and refuses", 2),
}


@pytest.mark.parametrize(("listed", "answered", "key", "message", "requests"), CHECKS.values(), ids=CHECKS)
def test_the_check_prints_the_state_of_a_usable_server(
    listed: Reply, answered: Reply, key: str | None, message: str, requests: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(asked: Asked) -> Reply:
        return answered if asked.body else listed

    async def work() -> None:
        async with ScriptedServer(script) as server:
            await check_servers([Server(server.url, key_variable=key)], "m", backoff=SHORT)
            assert f"{server.url} {message}" in " ".join(capsys.readouterr().out.split()).replace(
                "is reached, and busy", "busy"
            )
            assert len(server.asked) == requests

    asyncio.run(work())


REFUSED = {
    "the key": (Reply(200, {"data": [{"id": "m"}]}), error(401, "bad key"), "MY_KEY", "is not accepted for m"),
    "no key": (error(401, "no key"), error(401, "no key"), None, "key_variable"),
    "a model that it lists": (Reply(200, {"data": [{"id": "m"}]}), error(404, "no m"), "MY_KEY", "It lists 'm' among"),
    "the model": (Reply(200, {"data": [{"id": "n"}]}), error(404, "no m"), None, "it lists: n"),
    "the model by 400": (Reply(200, {"data": [{"id": "n"}]}), error(400, "odd"), None, "it lists: n"),
    "the model by 500": (error(500, "oh"), error(500, "oh"), None, "is 'm' a model that it serves?"),
    "the model by its words": (error(404, "x"), error(404, "The model `m` is not there"), None, "Is 'm' the name"),
    "a web page": (Reply(200, b"<html>"), Reply(200, b"<html>"), None, "Is base_url right"),
    "no credit": (error(404, "x"), error(402, "pay"), None, "402 Said: pay"),
}


@pytest.mark.parametrize(("listed", "answered", "key", "message"), REFUSED.values(), ids=REFUSED)
def test_the_check_of_an_unusable_server_is_one_error(
    listed: Reply, answered: Reply, key: str | None, message: str
) -> None:
    async def script(asked: Asked) -> Reply:
        return answered if asked.body else listed

    async def work() -> None:
        async with ScriptedServer(script) as server:
            with pytest.raises(UserError) as failure:
                await check_servers([Server(server.url, key_variable=key)], "m", backoff=SHORT)
            assert message in str(failure.value)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("0", 0), ("1.5", 1.5), ("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1d", 86_400)],
)
def test_a_duration_is_seconds_or_units(text: str, seconds: float) -> None:
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5", "10 m", "1m1h", "inf", "nan", "٣"])
def test_an_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a duration"):
        duration_seconds(text)


# Sampling parameters of the stages


async def look(script: Script, stages: dict[str, Decoding]) -> list[Asked]:
    """Return the requests of a check of a server without a key that lists its model."""

    async def listing(asked: Asked) -> Reply:
        return await script(asked) if asked.body else Reply(200, {"data": [{"id": "m"}]})

    async with ScriptedServer(listing) as server:
        await check_servers([Server(server.url)], "m", backoff=SHORT, stages=stages)
        return [asked for asked in server.asked if asked.body]


REFUSED_PARAMETERS = {
    "top_p": (Decoding(9, 1.0, 0.9), "'top_p' is not supported with this model.", "`answer.top_p: null`"),
    "seed": (Decoding(9, seed=3), "Unknown parameter: seed", "`answer.seed: null`"),
    "two at once": (
        Decoding(9, 1.0, 0.9),
        "`temperature` and `top_p` cannot both be specified",
        "`answer.temperature: null` or `answer.top_p: null`",
    ),
    "extra": (Decoding(9, extra={"top_k": 5}), "top_k is not permitted", "`answer.extra: {top_k: null}`"),
}


@pytest.mark.parametrize(("decoding", "text", "message"), REFUSED_PARAMETERS.values(), ids=REFUSED_PARAMETERS)
def test_a_listed_model_is_asked_with_the_parameters_of_each_stage(decoding: Decoding, text: str, message: str) -> None:
    async def script(asked: Asked) -> Reply:
        refused = decoding.parameters(0).keys() <= asked.body.keys()
        return error(400, text) if refused else chat_reply("x")

    with pytest.raises(UserError, match=re.escape(message)):
        asyncio.run(look(script, {"generate": Decoding(5), "answer": decoding}))


def test_stages_with_the_same_parameters_share_a_request() -> None:
    stages = {
        "generate": Decoding(512, 0.7),
        "verify": Decoding(256, 0.7),
        "answer": Decoding(1024, 0.7, extra={"top_k": 5}),
        "judge": Decoding(16, 0.0),
    }
    asked = asyncio.run(look(echo, stages))
    assert [(request.body["temperature"], request.body.get("top_k")) for request in asked] == [
        (0.7, None),
        (0.7, 5),
        (0.0, None),
    ]
    assert {request.body["max_tokens"] for request in asked} == {1}


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"min_tokens": 8}, "min_tokens must be less than or equal to max_tokens=1, got 8."),
        ({"thinking": {"budget_tokens": 40}}, "`max_tokens` must be greater than `thinking.budget_tokens`."),
    ],
)
def test_a_parameter_that_conflicts_only_with_one_token_is_no_error(extra: dict, text: str) -> None:
    async def script(asked: Asked) -> Reply:
        return error(400, text) if asked.body["max_tokens"] == 1 else chat_reply("x")

    asked = asyncio.run(look(script, {"answer": Decoding(64, extra=extra)}))
    assert [request.body["max_tokens"] for request in asked] == [1, 64]
