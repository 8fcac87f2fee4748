"""What every test may use: where the shared data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# No test is timed: a busy machine proves nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models; the test is skipped where it is absent."""
    folder = Path(os.environ.get("HALFTONE_SHARED", _ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set HALFTONE_SHARED")
    return folder
