"""How the rim is set up. Standard library only, so that a configuration may hold it; keys lie in it as digests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from serve.api.auth import Keys
from serve.api.limits import Limits

__all__ = ["ApiSettings", "StickySource"]

StickySource = Literal["user", "header", "none"]


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """sticky: where a call's sticky key is read: the body's `user`, the header `x-halftone-sticky-key`, or nowhere."""

    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    sticky: StickySource = "user"
