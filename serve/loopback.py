"""Keep a one-machine cluster to itself: every port of Ray's on 127.0.0.1, so that only the API's can leave it.

Ray decides by one switch, meant for laptops, which its own processes inherit. Serve's replicas know no switch for the
port that they call one another on and bind it to all interfaces; `apply` gives it the same address. Without it that
port would still ask for the cluster's token, but it unpickles what it is sent.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

__all__ = ["SWITCH", "apply", "is_on"]

SWITCH = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def is_on() -> bool:
    return os.environ.get(SWITCH[0]) == SWITCH[1]


def apply() -> None:
    """In a replica's process, before its port is opened."""
    replica: Any = import_module("ray.serve._private.replica")
    bind = replica.add_port_to_grpc_server

    def bind_on_loopback(server: Any, address: str) -> int:
        port: int = bind(server, address.replace("[::]", "127.0.0.1"))
        return port

    replica.add_port_to_grpc_server = bind_on_loopback
