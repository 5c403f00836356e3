"""Failed connections: the reason in plain words, whether waiting helps, and what to do about it."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator

import httpx2

from train.errors import UserError
from train.llm.connection.address import Address
from train.llm.server_errors import ServerError

_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}
"""Words of OpenSSL for bytes that are not TLS, in its several versions."""
_UNTRUSTED = {18, 19, 20, 21}
"""X509_V_ERR_...: self-signed, self-signed in the chain, no issuer, no first certificate (openssl verify(1))."""
_NOT_VALID_NOW = {9, 10}
_OTHER_NAME = {62, 64}
_SECONDS_OF_HANDSHAKE = 3.0


def connection_trouble(error: BaseException, address: Address, *, has_answered: bool) -> ServerError:
    """Return the meaning of an exception of the transport. Its words may hold secrets: clean them."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _certificate_trouble(cause)
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLWantReadError):
            break  # closed or silent in the middle of a handshake, as a server that restarts
        if isinstance(cause, ssl.SSLError):
            return _tls_trouble(cause, address, has_answered)
    if isinstance(error, httpx2.ProxyError):
        return _proxy_trouble(str(error), address, has_answered)
    why = _reason(error, causes, address)
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return ServerError("gone", f"can't be reached ({why})")
    # `Connections` raises no ReadError once a response has begun.
    if isinstance(error, httpx2.ReadError | httpx2.WriteError) or "without sending a response" in str(error):
        return ServerError("dropped", f"closes the connection without an answer ({why.rstrip('.')})")
    return ServerError("fault", why)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        error = inner[0] if inner else error.__cause__ or error.__context__


def _reason(error: BaseException, causes: list[BaseException], address: Address) -> str:
    """Return why there is no connection, in words that need no knowledge of the libraries."""
    where = f" by {address.proxy}" if address.proxy else ""
    for cause in causes:
        match cause:
            case ConnectionRefusedError():
                return f"connection refused{where}: nothing listens there"
            case socket.gaierror(errno=socket.EAI_AGAIN):
                return f"the host name can't be looked up{' of' + where[3:] if where else ''}: {cause.strerror}"
            case socket.gaierror():
                return f"unknown host name{' of' + where[3:] if where else ''}: {cause.strerror}"
            case ssl.SSLWantReadError():
                return "no answer to a TLS handshake within 30s"
            case httpx2.ConnectTimeout():
                return f"no connection within 30s{where and f' to {address.proxy}'}"
    last = next((cause for cause in reversed(causes) if isinstance(cause, OSError) and cause.strerror), None)
    return f"{last.strerror if last else str(error) or type(error).__name__}{where and f', through {address.proxy}'}"


def _certificate_trouble(error: ssl.SSLCertVerificationError) -> ServerError:
    what = f"a certificate that can't be trusted: {error.verify_message.rstrip('.')}"
    if error.verify_code in _NOT_VALID_NOW:
        advice = "Renew the certificate on the server, and see that the clocks of both machines are right."
    elif error.verify_code in _OTHER_NAME:
        advice = "Write the host name that stands in the certificate as base_url."
    else:
        advice = "Set SSL_CERT_FILE to a PEM file that holds it, or the certificate of the authority that signed it."
    if error.verify_code not in _UNTRUSTED:
        advice += " The certificates that are trusted are those of SSL_CERT_FILE, where it is set."
    return ServerError("hopeless", f"with {what}", advice=advice)


def _tls_trouble(error: ssl.SSLError, address: Address, has_answered: bool) -> ServerError:
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if has_answered:
        return ServerError("gone", f"can't be reached (TLS: {reason})")
    if error.reason in _NO_TLS:
        return http_wanted(address)
    advice = "Is it the right port? The server or a proxy before it refuses the handshake; its log says more."
    return ServerError("hopeless", f"with a TLS fault ({reason})", advice=advice)


def _proxy_trouble(words: str, address: Address, has_answered: bool) -> ServerError:
    """Return the meaning of what a proxy said when it was to open a tunnel."""
    status = words.partition(" ")[0]
    what = f"can't be reached ({address.proxy} answers {words})"
    return proxy_refusal(address) if status == "407" else ServerError(
        "hopeless" if status in ("400", "403", "404", "405", "501") and not has_answered else "gone", what,
        advice=f"Unset {address.proxy.variable}, or name the server's host in no_proxy." if address.proxy else None,
    )  # fmt: skip


def proxy_refusal(address: Address) -> ServerError:
    """Return the meaning of 407."""
    assert address.proxy
    variable = address.proxy.variable
    return ServerError(
        "hopeless",
        f"can't be reached ({address.proxy} wants a user name and a password)",
        advice=f"Set {variable}=http://USER:PASSWORD@host:port, or name the server's host in no_proxy.",
    )


async def speaks_tls(address: Address) -> bool:
    """Return whether a server that was asked in plain http takes a TLS handshake on that port."""
    if not address.is_plain or address.proxy:
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_SECONDS_OF_HANDSHAKE):
            _, writer = await asyncio.open_connection(address.host, address.base.port or 80, ssl=context)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return True
    except (OSError, TimeoutError):
        return False


async def speaks_http(address: Address) -> bool:
    """Return whether a server with which no TLS handshake came off speaks plain http on that port."""
    if address.is_plain or address.proxy:
        return False
    try:
        async with asyncio.timeout(_SECONDS_OF_HANDSHAKE):
            reader, writer = await asyncio.open_connection(address.host, address.base.port or 443)
            try:
                writer.write(f"GET / HTTP/1.1\r\nHost: {address.host}\r\nConnection: close\r\n\r\n".encode())
                return (await reader.read(5)).startswith(b"HTTP/")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def http_wanted(address: Address) -> ServerError:
    """Return the trouble of a TLS handshake with a server of plain http."""
    plain = address.shown.replace("https://", "http://", 1)
    return ServerError("hopeless", "without TLS, as plain http", advice=f"Write {plain} as base_url.")


def tls_wanted(address: Address) -> ServerError:
    """Return the trouble of plain http that was sent to a port of TLS."""
    https = address.shown.replace("http://", "https://", 1)
    return ServerError("hopeless", "in TLS, not in plain http", advice=f"Write {https} as base_url.")


def encryption_to(address: Address) -> ssl.SSLContext:
    """Return how connections to an address are encrypted. Raises UserError for a SSL_CERT_FILE that can't be read."""
    if address.is_plain:  # reading the certificates takes 50 ms, and nothing here is encrypted
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return httpx2.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        variable = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        why = "no PEM certificate is in it" if isinstance(error, ssl.SSLError) else error.strerror
        raise UserError(
            f"{variable}: {os.environ.get(variable, 'the certificates of this machine')} can't be used: {why}. "
            f"Name a PEM file of certificates, or unset {variable}."
        ) from error
