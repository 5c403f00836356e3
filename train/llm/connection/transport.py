"""Connections to a server, one for each request in flight: the transport below the openai package.

Its usual one looks at every connection it has for each request, with a system call for each idle one: with 64 in
flight that was a quarter of a request's work, and it grows with their square (httpcore's _assign_requests_to_
connections). Here the connection that was used last is simply taken again.
"""

import socket
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from train.llm.connection.address import Address
from train.llm.connection.errors import encryption_to

KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 8))
    if hasattr(socket, name)
]
"""A probe on connections that wait for an answer: it finds a host that is gone within three minutes, however long
answers take, and keeps the routers in between from forgetting them."""


class Connections(httpx2.AsyncBaseTransport):
    """Hands whole responses up: the connection is free again once the last byte has come."""

    def __init__(self, address: Address) -> None:
        self._proxy = address.proxy.url if address.proxy else None
        self._encryption = encryption_to(address)
        self._idle: list[httpx2.AsyncHTTPTransport] = []
        self._all: list[httpx2.AsyncHTTPTransport] = []
        self.when_sent: Callable[[], None] | None = None
        """Called when a request has been sent whole, to a server that takes it. Set only where that is news."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send it and read the response to its end."""
        connection = self._idle.pop() if self._idle else self._new()
        if self.when_sent:
            request.extensions = {**request.extensions, "trace": self._trace}
        try:
            response = await connection.handle_async_request(request)
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            try:
                body = b"".join([part async for part in response.stream])
            except httpx2.ReadError as error:  # told apart from a connection that ended before any response
                raise httpx2.RemoteProtocolError(f"the response broke off: {error}") from error
            finally:
                await response.stream.aclose()
            if response.status_code == 500:
                # After an exception in the application uvicorn closes the connection, and sends no word of it before:
                # of requests that come next on the same one, half were lost.
                await connection.aclose()
        finally:
            self._idle.append(connection)  # after a failure too: it opens a new socket by itself
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=httpx2.ByteStream(body),
            extensions=response.extensions,
        )

    async def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event == "http11.receive_response_headers.started" and self.when_sent:
            self.when_sent()

    async def aclose(self) -> None:
        """Close them all."""
        for connection in self._all:
            await connection.aclose()

    def _new(self) -> httpx2.AsyncHTTPTransport:
        connection = httpx2.AsyncHTTPTransport(
            verify=self._encryption,
            limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None),
            proxy=self._proxy,
            socket_options=KEEPALIVE,
        )
        self._all.append(connection)
        return connection
