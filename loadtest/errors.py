"""Everything that can go wrong, one class per meaning.

    LoadTestError
    ├── SettingsError                an option or a scenario is wrong; the message names it and the remedy
    ├── InputError                   a file of prompts, a trace or a result cannot be read
    ├── WorkerError                  a generator process ended before its work did
    └── RequestError                 one request failed; its `kind` is what the result counts it under

A failed request never ends a run: it is recorded with its kind and counted.
"""

import socket
import ssl
from enum import StrEnum


class LoadTestError(Exception):
    """Base of everything raised on purpose here."""


class SettingsError(LoadTestError):
    """An option or a scenario key is wrong."""


class InputError(LoadTestError):
    """A file cannot be read as what it was given for."""


class WorkerError(LoadTestError):
    """A generator process ended early."""


class Kind(StrEnum):
    """How a request can fail; a status other than 2xx is counted as `http_<status>` beside these."""

    DNS = "dns"
    """The host's name has no address."""
    CONNECT = "connect"
    """No TCP connection: refused, unreachable, or out of local ports or descriptors."""
    TLS = "tls"
    """The TLS handshake failed, most often on the certificate."""
    TIMEOUT = "timeout"
    """No complete answer within the request's timeout."""
    CUT = "cut"
    """The connection closed before the answer was complete."""
    MALFORMED = "malformed"
    """Bytes that are not HTTP, not server-sent events, or not JSON."""
    SERVER_ERROR = "server_error"
    """Status 200, and an `error` object inside the stream."""
    INTERRUPTED = "interrupted"
    """The run was stopped while this request was in flight: by the user, not by the server."""


class RequestError(LoadTestError):
    """One request failed; `kind` is the name it is counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = str(kind)


def from_connecting(error: OSError, host: str, port: int) -> RequestError:
    """The one place where the operating system's connection errors get our names."""
    where = f"{host}:{port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        remedy = "pass --ca FILE with its authority, or --insecure to skip the check"
        return RequestError(Kind.TLS, f"{where}: the certificate is not trusted ({error.verify_message}); {remedy}")
    if isinstance(error, ssl.SSLError):
        return RequestError(Kind.TLS, f"{where}: {error.reason or error}; does the server speak TLS on this port?")
    if isinstance(error, socket.gaierror):
        return RequestError(Kind.DNS, f"{host}: {error.strerror or error}")
    if isinstance(error, TimeoutError):
        return RequestError(Kind.TIMEOUT, f"{where}: no connection in time")
    return RequestError(Kind.CONNECT, f"{where}: {error.strerror or error or type(error).__name__}")
