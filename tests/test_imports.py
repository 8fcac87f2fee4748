"""Who may import whom, where it can only be seen at run time: what a light module loads, and what it must not."""

from __future__ import annotations

import subprocess
import sys

import pytest

TORCH = {"torch", "transformers", "bitsandbytes"}
RAY = {"ray"}
HTTP = {"fastapi", "starlette", "uvicorn"}

LIGHT = {
    "serve": TORCH | RAY | HTTP,
    "serve.errors": TORCH | RAY | HTTP,
    "serve.generation": TORCH | RAY | HTTP,
    "serve.variant": TORCH | RAY | HTTP,
    "serve.config": TORCH | RAY | HTTP,
    "serve.compression.recipe": TORCH | RAY | HTTP,
    "serve.engine.settings": TORCH | RAY | HTTP,
    "serve.rollout": TORCH | RAY | HTTP,
    "serve.api": TORCH | RAY,
    "serve.router": TORCH,
    "serve.controller": TORCH,
    "serve.app": TORCH,
    "serve.cli": TORCH | RAY,
    "serve.compression": RAY | HTTP,
    "serve.quality": RAY | HTTP,
    "serve.engine": RAY | HTTP,
    "serve.engine.engine": RAY | HTTP | {"scipy"},
    "serve.loading": RAY | HTTP,
}


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_module_loads_nothing_that_its_layer_must_not_know(module: str) -> None:
    script = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert not LIGHT[module] & set(loaded)
