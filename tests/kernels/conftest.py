"""Everything here needs the compiled kernels."""

from __future__ import annotations

import pytest

from serve.kernels import unavailable


@pytest.fixture(autouse=True, scope="session")
def _kernels() -> None:
    if reason := unavailable():
        pytest.skip(f"no kernels: {reason}")
