"""TLS for both ends of HTTP: who a service says it is, and whom a client believes."""

from __future__ import annotations

import ssl
from pathlib import Path

from aspo.errors import AspoError

UNTRUSTED = "set actor.tls_ca, or SSL_CERT_FILE for the command line, to the file of the CA that signed it"


class TlsError(AspoError):
    """A certificate, key or CA file cannot be used; the text says which."""


def server_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Load a service's certificate chain and key; None where it has none and serves plain HTTP."""
    if cert is None or key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(
            f"tls_cert {cert} and tls_key {key} cannot be loaded ({error}); name PEM files that match"
        ) from None
    return context


def client_context(ca: Path | None) -> ssl.SSLContext:
    """Trust the CAs of a PEM file, and no other; those of the system if None."""
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"tls_ca {ca} cannot be loaded ({error}); name a PEM file") from None
