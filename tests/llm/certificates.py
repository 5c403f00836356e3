"""Certificates of loopback servers, only for tests: a valid one, one of another host, and an expired one.

One key for all, made with `openssl ecparam -name prime256v1 -genkey`; the certificates with `openssl req -x509`, valid
for a hundred years, and `openssl ca` (2020 to 2021).
"""

import ssl
from pathlib import Path

_KEY = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIAcOioGX76OgPGYwFRf5Yvytn42omdCyYfpIV90Kq3N0oAoGCCqGSM49
AwEHoUQDQgAE8YdO9Vi5kVw0FBS8x9Pmi21UPUZ1yE0xNYe3x8HwDqHdzG4t6Kfq
VKud/xb1VtC4/4MSE7vtcz3ToQwSifwe6g==
-----END EC PRIVATE KEY-----
"""

_CERTIFICATES = {
    "good": """\
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUP+C0AUToAx8VVO494C7tbliPsl0wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyOTE4MTAyMVoYDzIxMjYxMTA1
MTgxMDIxWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATxh071WLmRXDQUFLzH0+aLbVQ9RnXITTE1h7fHwfAOod3Mbi3op+pU
q53/FvVW0Lj/gxITu+1zPdOhDBKJ/B7qo28wbTAdBgNVHQ4EFgQU3zipjE+3RNfa
ofSl8MxiQf+ZyGwwHwYDVR0jBBgwFoAU3zipjE+3RNfaofSl8MxiQf+ZyGwwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgKlarlj7Mhrq3hIHxssBlkkk/OdZHfNqsWV9S5HW/VYICIQCb
Rr/mduribe85DL33WPtHoXYWywbGnn50HfD9z3TYTw==
-----END CERTIFICATE-----
""",
    "another host": """\
-----BEGIN CERTIFICATE-----
MIIBnTCCAUOgAwIBAgIUdehXKVTmxKPghTGV63MQSPZNKLkwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJZWxzZXdoZXJlMCAXDTI2MTEyOTE4MTAyMVoYDzIxMjYxMTA1
MTgxMDIxWjAUMRIwEAYDVQQDDAllbHNld2hlcmUwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATxh071WLmRXDQUFLzH0+aLbVQ9RnXITTE1h7fHwfAOod3Mbi3op+pU
q53/FvVW0Lj/gxITu+1zPdOhDBKJ/B7qo3EwbzAdBgNVHQ4EFgQU3zipjE+3RNfa
ofSl8MxiQf+ZyGwwHwYDVR0jBBgwFoAU3zipjE+3RNfaofSl8MxiQf+ZyGwwDwYD
VR0TAQH/BAUwAwEB/zAcBgNVHREEFTATghFlbHNld2hlcmUuZXhhbXBsZTAKBggq
hkjOPQQDAgNIADBFAiEA4SbGXlpRVPKYz5bArbC3QUXO8F19Cwl2MGIpq2SBKbUC
IF7IYMiKchPCsz2HFKM04qbvdB8g3bu2W6434Ltzet7u
-----END CERTIFICATE-----
""",
    "expired": """\
-----BEGIN CERTIFICATE-----
MIIBYTCCAQigAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwHhcNMjAwMTAxMDAwMDAwWhcNMjEwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAls
b2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATxh071WLmRXDQUFLzH
0+aLbVQ9RnXITTE1h7fHwfAOod3Mbi3op+pUq53/FvVW0Lj/gxITu+1zPdOhDBKJ
/B7qo0swSTAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwDAYDVR0TBAUwAwEB
/zAdBgNVHQ4EFgQU3zipjE+3RNfaofSl8MxiQf+ZyGwwCgYIKoZIzj0EAwIDRwAw
RAIgbPufKYTMUTVQko2FAWP07SIhDxqReNn+gEt6FiciY/8CID2x8rw6W1eVtpXt
RBfaMhNwM8bUVq2p+9ngSBK/oz5H
-----END CERTIFICATE-----
""",
}


def write_certificate(name: str, folder: Path) -> Path:
    """Write a certificate; return the PEM file."""
    path = folder / "certificate.pem"
    path.write_text(_CERTIFICATES[name], encoding="ascii")
    return path


def encryption_with(certificate: Path) -> ssl.SSLContext:
    """Return a server's SSL context with a certificate."""
    key = certificate.with_name("key.pem")
    key.write_text(_KEY, encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context
