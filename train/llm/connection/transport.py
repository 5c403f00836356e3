"""HTTP transport under the openai package: one connection for each request in flight.

httpx's pool checks every connection for each request, with a system call for each idle one (httpcore's
_assign_requests_to_connections): 25% of a request's work with 64 in flight, growing with their square. Here the most
recently used connection is taken again.
"""

import socket
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from train.llm.connection.address import Address
from train.llm.connection.errors import create_ssl_context

KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 8))
    if hasattr(socket, name)
]
"""Probes on connections that wait for an answer: they find a dead host within three minutes, however long answers take,
and keep routers from forgetting the connection."""


class ConnectionPool(httpx2.AsyncBaseTransport):
    """A pool of connections. It returns complete responses: a connection is free once the last byte has arrived."""

    def __init__(self, address: Address) -> None:
        self._proxy = address.proxy.url if address.proxy else None
        self._ssl_context = create_ssl_context(address)
        self._idle: list[httpx2.AsyncHTTPTransport] = []
        self._all: list[httpx2.AsyncHTTPTransport] = []
        self.on_request_sent: Callable[[], None] | None = None
        """Called when a server has taken a complete request. Set only while the server was unreachable."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request and read the complete response."""
        connection = self._idle.pop() if self._idle else self._connect()
        if self.on_request_sent:
            request.extensions = {**request.extensions, "trace": self._trace}
        try:
            response = await connection.handle_async_request(request)
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            try:
                body = b"".join([part async for part in response.stream])
            except httpx2.ReadError as error:  # as opposed to a connection that ended before any response
                raise httpx2.RemoteProtocolError(f"the response broke off: {error}") from error
            finally:
                await response.stream.aclose()
            if response.status_code == 500:
                # After an exception in the application uvicorn closes the connection without announcing it: half of
                # the next requests on it were lost.
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
        if event == "http11.receive_response_headers.started" and self.on_request_sent:
            self.on_request_sent()

    async def aclose(self) -> None:
        """Close all connections."""
        for connection in self._all:
            await connection.aclose()

    def _connect(self) -> httpx2.AsyncHTTPTransport:
        connection = httpx2.AsyncHTTPTransport(
            verify=self._ssl_context,
            limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None),
            proxy=self._proxy,
            socket_options=KEEPALIVE,
        )
        self._all.append(connection)
        return connection
