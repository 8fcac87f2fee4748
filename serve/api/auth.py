"""Who may call which path. Pure decisions on an ASGI scope; standard library only.

**Default deny.** Once API keys are configured every path needs one, save the two probes and the dashboard's files,
which hold no data; a path that no route serves is refused all the same. The decision reads `scope["path"]`, what the
router itself matches on, never a URL rebuilt from the `Host` header. Keys are kept as SHA-256 digests, compared in
constant time, and never shown or logged.

**Admin.** `/admin` needs the admin key. While none is configured it answers only programs on this machine: the peer is
a loopback address, nothing says that a proxy stands between, and the `Host` and `Origin` that a browser adds are local
too, so that no web page (DNS rebinding, cross-site forms) can reach it through its reader's browser.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from serve.errors import Forbidden, Unauthorized

__all__ = ["PUBLIC_PATHS", "Keys", "authorize", "is_admin", "tenant"]

PUBLIC_PATHS: Final = frozenset({"/health", "/ready"})
"""What an orchestrator probes without a key."""

_FORWARDED: Final = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via")


@dataclass(frozen=True, slots=True)
class Keys:
    """The digests of the keys that are accepted; empty means open to all. The admin key opens everything."""

    api: frozenset[bytes] = field(default=frozenset(), repr=False)
    admin: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, api: Iterable[str] = (), admin: str | None = None) -> Keys:
        return cls(frozenset(map(_digest, api)), _digest(admin) if admin else None)

    def opens_api(self, digest: bytes) -> bool:
        known = [*self.api, *([self.admin] if self.admin else [])]
        return sum(hmac.compare_digest(digest, key) for key in known) > 0  # never stops at the first match

    def opens_admin(self, digest: bytes) -> bool:
        return self.admin is not None and hmac.compare_digest(digest, self.admin)


def authorize(scope: Mapping[str, Any], keys: Keys, public_paths: Collection[str] = PUBLIC_PATHS) -> None:
    """Return if this request may pass; otherwise raise `Unauthorized` or `Forbidden`."""
    path: str = scope["path"]
    headers = dict(scope["headers"])
    presented = _presented(headers)
    if is_admin(path):
        _authorize_admin(scope, headers, keys, presented)
    if path in public_paths or not keys.api:
        return
    if presented is None or not keys.opens_api(presented):
        raise Unauthorized("a known API key is needed: send the header 'Authorization: Bearer KEY'")


def tenant(headers: Mapping[str, str], keys: Keys) -> str:
    """A name for whoever presented a key, which reveals nothing of the key; "" where no keys are needed."""
    presented = _presented({b"authorization": headers.get("authorization", "").encode("latin-1")})
    return sha256(b"tenant" + presented).hexdigest()[:16] if keys.api and presented else ""


def is_admin(path: str) -> bool:
    return path == "/admin" or path.startswith("/admin/")


def _authorize_admin(
    scope: Mapping[str, Any], headers: Mapping[bytes, bytes], keys: Keys, presented: bytes | None
) -> None:
    if keys.admin is not None:
        if presented is None or not keys.opens_admin(presented):
            raise Unauthorized("the admin key is needed: send the header 'Authorization: Bearer KEY'")
    elif not _is_local(scope, headers):
        raise Forbidden("admin routes answer only this machine until an admin key is configured")


def _presented(headers: Mapping[bytes, bytes]) -> bytes | None:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return sha256(key.strip()).digest() if scheme.lower() == b"bearer" else None


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def _is_local(scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> bool:
    client = scope.get("client")
    if not client or not _is_loopback(client[0]) or any(name in headers for name in _FORWARDED):
        return False
    origin = headers.get(b"origin", b"").decode("latin-1")
    host = headers.get(b"host", b"").decode("latin-1")
    return _is_loopback(_hostname(f"//{host}")) and (not origin or _is_loopback(_hostname(origin)))


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
