"""Halftone on this machine alone: a private Ray cluster that begins and ends with this process.

Everything but the API's port stays on loopback, and nothing outlives `stop`. A cluster that is shared, or larger than
one machine, is `serve deploy`'s (see `deployments/`). Ray is first imported by `start`, after its switches are set.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from serve import loopback
from serve.config import Config
from serve.errors import SetupError
from serve.heartbeat import View

__all__ = ["LocalServer"]

_SWITCHES = {
    **dict([loopback.SWITCH]),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_OBJECT_STORE_BYTES = 128 * 2**20
"""Tokens travel inline; the store holds next to nothing."""
_POLL_S = 0.2
_GONE_S = 3.0


class LocalServer:
    """`start`, which returns once every variant has loaded or failed, then `stop`. For one process's main thread."""

    def __init__(self, config: Config, *, host: str, port: int) -> None:
        self._config = config
        self._host = host
        self._port = port

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._host, self._host)  # noqa: S104
        return f"http://{host}:{self._port}"

    def start(self, follow: Callable[[View], None]) -> None:
        """Bring up Ray and the application; `follow` is shown what the controller knows, from another thread.

        An exception that a signal handler raises unwinds it. Raises SetupError.
        """
        _require_free(self._host, self._port)
        for name, value in _SWITCHES.items():
            os.environ.setdefault(name, value)
        import ray
        from ray import serve as rayserve

        from serve.app import APP_NAME, graph

        with _handlers_kept():
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # our own lines say what matters
        rayserve.start(http_options={"location": "NoServer"})
        application = graph(self._config, {"host": self._host, "port": self._port})
        with self._followed(follow):
            try:
                rayserve.run(application, name=APP_NAME)
            except RuntimeError as error:
                raise SetupError(f"Ray Serve could not deploy the application: {error}") from error
            while not all(self._ask_all("ingress", "settled")):
                time.sleep(_POLL_S)

    def variants(self) -> list[Mapping[str, Any]]:
        """One mapping per variant, as `/admin/variants` has them."""
        return list(self._ask("controller", "variants") or ())

    def drain(self, timeout_s: float) -> None:
        """Take no new requests, let open answers finish."""
        self._ask_all("ingress", "drain", timeout_s, wait_s=timeout_s + 5.0)

    def stop(self) -> None:
        """End every process that `start` began, however far it came. Idempotent."""
        family = psutil.Process().children(recursive=True)
        import ray

        ray.shutdown()
        _, stubborn = psutil.wait_procs(family, timeout=_GONE_S)
        for process in stubborn:
            process.kill()
        psutil.wait_procs(stubborn, timeout=_GONE_S)

    @contextmanager
    def _followed(self, follow: Callable[[View], None]) -> Iterator[None]:
        """Ask the controller while the block runs. The thread has ended when the block has: Ray starts itself anew
        for a thread that calls it after its shutdown."""
        done = threading.Event()

        def poll() -> None:
            while not done.wait(_POLL_S):
                if (view := self._ask("controller", "view")) is not None:
                    follow(view)

        poller = threading.Thread(target=poll, name="follow", daemon=True)
        poller.start()
        try:
            yield
        finally:
            done.set()
            poller.join()

    def _ask(self, deployment: str, method: str, *args: Any, wait_s: float = 2.0) -> Any:
        """One call to a deployment; None while it is not up yet."""
        return _unless_absent(lambda handle: getattr(handle, method).remote(*args).result(timeout_s=wait_s), deployment)

    def _ask_all(self, deployment: str, method: str, *args: Any, wait_s: float = 2.0) -> list[Any]:
        """The same to each of its replicas; one None while none is up yet."""
        told = _unless_absent(lambda handle: handle.broadcast(method, *args).results(timeout_s=wait_s), deployment)
        return list(told or [None])


def _unless_absent(ask: Callable[[Any], Any], deployment: str) -> Any:
    """What the deployment's handle answers; None where it does not answer yet, or any more."""
    from ray import serve as rayserve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from serve.app import APP_NAME

    try:
        return ask(rayserve.get_deployment_handle(deployment, APP_NAME))
    except (RayError, RayServeException, TimeoutError):
        return None


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray puts its own signal handlers in, one of which aborts on SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_free(host: str, port: int) -> None:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise SetupError(f"cannot listen on {host}:{port}: {reason}; choose another with --host or --port") from error
