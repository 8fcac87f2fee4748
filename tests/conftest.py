"""What every test may use: where the shared data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models; the test is skipped where it is absent."""
    folder = Path(os.environ.get("HALFTONE_SHARED", _ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set HALFTONE_SHARED")
    return folder
