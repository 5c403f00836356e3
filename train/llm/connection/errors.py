"""Connection errors: the reason in plain words, whether a retry helps, and the remedy."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator

import httpx2

from train.errors import UserError
from train.llm.connection.address import Address
from train.llm.server_errors import UNREACHABLE, ServerError

_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}
"""OpenSSL's reasons, over its versions, for bytes that are not TLS."""
_UNTRUSTED = {18, 19, 20, 21}
"""X509_V_ERR_...: self-signed, self-signed in the chain, no issuer, no first certificate (openssl verify(1))."""
_NOT_VALID_NOW = {9, 10}
_OTHER_NAME = {62, 64}
_HANDSHAKE_SECONDS = 3.0


def classify_connection_error(error: BaseException, address: Address, *, has_answered: bool) -> ServerError:
    """Return the meaning of an exception of the transport. Its message may hold secrets: clean it."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _certificate_error(cause)
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLWantReadError):
            break  # closed or silent during a handshake, like a server that restarts
        if isinstance(cause, ssl.SSLError):
            return _tls_error(cause, address, has_answered)
    if isinstance(error, httpx2.ProxyError):
        return _proxy_error(str(error), address, has_answered)
    reason = _reason(error, causes, address)
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return ServerError("unreachable", f"{UNREACHABLE} ({reason})")
    # `ConnectionPool` raises no ReadError once a response has begun.
    if isinstance(error, httpx2.ReadError | httpx2.WriteError) or "without sending a response" in str(error):
        return ServerError("dropped", f"closes the connection without an answer ({reason.rstrip('.')})")
    return ServerError("retryable", reason)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        error = inner[0] if inner else error.__cause__ or error.__context__


def _reason(error: BaseException, causes: list[BaseException], address: Address) -> str:
    """Return why there is no connection, without terms of the libraries."""
    proxy = address.proxy
    for cause in causes:
        match cause:
            case ConnectionRefusedError():
                return f"connection refused{f' by {proxy}' if proxy else ''}: nothing listens there"
            case socket.gaierror():
                text = "the host name can't be looked up" if cause.errno == socket.EAI_AGAIN else "unknown host name"
                return f"{text}{f' of {proxy}' if proxy else ''}: {cause.strerror}"
            case ssl.SSLWantReadError():
                return "no answer to a TLS handshake within 30s"
            case httpx2.ConnectTimeout():
                return f"no connection within 30s{f' to {proxy}' if proxy else ''}"
    last = next((cause for cause in reversed(causes) if isinstance(cause, OSError) and cause.strerror), None)
    text = (last and last.strerror) or str(error) or type(error).__name__
    return f"{text}{f', through {proxy}' if proxy else ''}"


def _certificate_error(error: ssl.SSLCertVerificationError) -> ServerError:
    if error.verify_code in _NOT_VALID_NOW:
        advice = "Renew the certificate on the server, and check the clocks of both machines."
    elif error.verify_code in _OTHER_NAME:
        advice = "Use the host name in the certificate as base_url."
    else:
        advice = "Set SSL_CERT_FILE to a PEM file with this certificate or that of the authority which signed it."
    if error.verify_code not in _UNTRUSTED:
        advice += " Trusted certificates are those of SSL_CERT_FILE, if it is set."
    return ServerError(
        "fatal", f"with a certificate that can't be trusted: {error.verify_message.rstrip('.')}", advice=advice
    )


def _tls_error(error: ssl.SSLError, address: Address, has_answered: bool) -> ServerError:
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if has_answered:
        return ServerError("unreachable", f"{UNREACHABLE} (TLS: {reason})")
    if error.reason in _NO_TLS:
        return http_expected(address)
    advice = "Is it the right port? The server or a proxy in front of it refuses the handshake; see its log."
    return ServerError("fatal", f"with a TLS error ({reason})", advice=advice)


def _proxy_error(answer: str, address: Address, has_answered: bool) -> ServerError:
    """Return the meaning of a proxy's answer to a request for a tunnel."""
    status = answer.partition(" ")[0]
    if status == "407":
        return proxy_auth_error(address)
    return ServerError(
        "fatal" if status in ("400", "403", "404", "405", "501") and not has_answered else "unreachable",
        f"{UNREACHABLE} ({address.proxy} answers {answer})",
        advice=f"Unset {address.proxy.variable}, or name the server's host in no_proxy." if address.proxy else None,
    )


def proxy_auth_error(address: Address) -> ServerError:
    """Return the meaning of status 407."""
    assert address.proxy
    return ServerError(
        "fatal",
        f"{UNREACHABLE} ({address.proxy} requires a user name and a password)",
        advice=f"Set {address.proxy.variable}=http://USER:PASSWORD@host:port, or name the server's host in no_proxy.",
    )


async def speaks_tls(address: Address) -> bool:
    """Return True if the port of an http address takes a TLS handshake."""
    if not address.is_plain or address.proxy:
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            _, writer = await asyncio.open_connection(address.host, address.base.port or 80, ssl=context)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return True
    except (OSError, TimeoutError):
        return False


async def speaks_http(address: Address) -> bool:
    """Return True if the port of an https address answers plain http."""
    if address.is_plain or address.proxy:
        return False
    try:
        async with asyncio.timeout(_HANDSHAKE_SECONDS):
            reader, writer = await asyncio.open_connection(address.host, address.base.port or 443)
            try:
                writer.write(f"GET / HTTP/1.1\r\nHost: {address.host}\r\nConnection: close\r\n\r\n".encode())
                return (await reader.read(5)).startswith(b"HTTP/")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def http_expected(address: Address) -> ServerError:
    """Return the error of a TLS handshake with a server of plain http."""
    plain = address.shown.replace("https://", "http://", 1)
    return ServerError("fatal", "without TLS, as plain http", advice=f"Write {plain} as base_url.")


def tls_expected(address: Address) -> ServerError:
    """Return the error of plain http sent to a TLS port."""
    https = address.shown.replace("http://", "https://", 1)
    return ServerError("fatal", "in TLS, not in plain http", advice=f"Write {https} as base_url.")


def create_ssl_context(address: Address) -> ssl.SSLContext:
    """Return the SSL context for an address. Raises UserError if SSL_CERT_FILE can't be read."""
    if address.is_plain:  # loading the certificates takes 50 ms, and nothing is encrypted here
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return httpx2.create_ssl_context()
    except OSError as error:  # includes ssl.SSLError
        variable = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        reason = "it holds no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise UserError(
            f"{variable}: {os.environ.get(variable, 'the certificates of this machine')} can't be used: {reason}. "
            f"Name a PEM file of certificates, or unset {variable}."
        ) from error
