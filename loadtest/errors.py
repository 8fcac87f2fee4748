"""Everything that can go wrong, one class per meaning.

    LoadTestError
    ├── SettingsError                an option or a scenario is wrong; the message names it and the remedy
    ├── InputError                   a file of prompts, a trace or a result cannot be read
    ├── WorkerError                  a generator process ended before its work did
    └── RequestError                 one request failed; `kind` is what the result counts it under
        ├── NameResolutionError      dns
        ├── ConnectError             connect
        ├── TLSError                 tls
        ├── RequestTimeoutError      timeout
        ├── StreamCutError           cut
        ├── MalformedResponseError   malformed
        ├── HTTPStatusError          http_<status>
        ├── ServerReportedError      server_error
        └── InterruptedRequestError  interrupted (by the user, not by the server)

A failed request never ends a run: it is recorded with its kind and counted.
"""

import socket
import ssl


class LoadTestError(Exception):
    """Base of everything raised on purpose here."""


class SettingsError(LoadTestError):
    """An option or a scenario key is wrong."""


class InputError(LoadTestError):
    """A file cannot be read as what it was given for."""


class WorkerError(LoadTestError):
    """A generator process ended early."""


class RequestError(LoadTestError):
    """One request failed; `kind` is the name it is counted under."""

    kind = "error"


class NameResolutionError(RequestError):
    """The host's name has no address."""

    kind = "dns"


class ConnectError(RequestError):
    """No TCP connection: refused, unreachable, or out of local ports or descriptors."""

    kind = "connect"


class TLSError(RequestError):
    """The TLS handshake failed, most often on the certificate."""

    kind = "tls"


class RequestTimeoutError(RequestError):
    """No complete answer within the request's timeout."""

    kind = "timeout"


class StreamCutError(RequestError):
    """The connection closed before the answer was complete."""

    kind = "cut"


class MalformedResponseError(RequestError):
    """Bytes that are not HTTP, not server-sent events, or not JSON."""

    kind = "malformed"


class ServerReportedError(RequestError):
    """Status 200, and an `error` object inside the stream."""

    kind = "server_error"


class InterruptedRequestError(RequestError):
    """The run was stopped while this request was in flight."""

    kind = "interrupted"


class HTTPStatusError(RequestError):
    """A status other than 2xx."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.kind = f"http_{status}"


def from_connecting(error: OSError, host: str, port: int) -> RequestError:
    """The one place where the operating system's connection errors get our names."""
    where = f"{host}:{port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        remedy = "pass --ca FILE with its authority, or --insecure to skip the check"
        return TLSError(f"{where}: the certificate is not trusted ({error.verify_message}); {remedy}")
    if isinstance(error, ssl.SSLError):
        return TLSError(f"{where}: {error.reason or error}; does the server speak TLS on this port?")
    if isinstance(error, socket.gaierror):
        return NameResolutionError(f"{host}: {error.strerror or error}")
    if isinstance(error, TimeoutError):
        return RequestTimeoutError(f"{where}: no connection in time")
    return ConnectError(f"{where}: {error.strerror or error or type(error).__name__}")
