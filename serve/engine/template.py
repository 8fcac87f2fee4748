"""Renders a model's chat template, in a process of its own that has little memory and little time.

A chat template is a program that came with a checkpoint. Jinja's sandbox keeps it from Python's insides, but not from
`range(99999)` within `range(99999)`, nor from doubling a string forty times; a small process that is killed when it
takes too long keeps it from those too. This file is both sides: `TemplateProcess`, and the child when it is run as a
script, where it needs nothing but the standard library and jinja2.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["TemplateFailed", "TemplateProcess"]

_MEMORY_BYTES = 512 * 2**20
_LARGEST_TEXT_BYTES = 16 * 2**20


class TemplateFailed(Exception):
    """The template raised, took too long or made too much text; the message says which."""


class TemplateProcess:
    """One template and the process that renders it, started on first use and again after it had to be killed.

    `render` may be called from any thread; one conversation is rendered at a time.
    """

    def __init__(self, template: str, variables: Mapping[str, Any], *, timeout_s: float = 2.0) -> None:
        self._setup = {"template": template, "variables": dict(variables)}
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, **variables: Any) -> str:
        """The text of one conversation. Raises TemplateFailed."""
        with self._lock:
            child = self._running_child()
            try:
                reply = self._exchange(child, variables)
            except (OSError, ValueError) as error:
                self._kill()
                raise TemplateFailed("it died: too much memory, or a fault of its own") from error
        if "error" in reply:
            raise TemplateFailed(str(reply["error"]))
        return str(reply["text"])

    def close(self) -> None:
        """End the process; it also ends by itself when this one does."""
        with self._lock:
            self._kill()

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._kill()
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            _send(self._child, self._setup)
            # Starting Python may take longer than any template should.
            self._receive(self._child, self._timeout_s + 30)
        return self._child

    def _exchange(self, child: subprocess.Popen[bytes], variables: Mapping[str, Any]) -> dict[str, Any]:
        _send(child, variables)
        return self._receive(child, self._timeout_s)

    def _receive(self, child: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any]:
        assert child.stdout is not None, "opened with a pipe"
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                self._kill()
                raise TemplateFailed(f"it took longer than {timeout_s:g} s")
        reply: dict[str, Any] = json.loads(child.stdout.readline())
        return reply

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _send(child: subprocess.Popen[bytes], message: Mapping[str, Any]) -> None:
    assert child.stdin is not None, "opened with a pipe"
    child.stdin.write(json.dumps(message).encode() + b"\n")
    child.stdin.flush()


# The child: from here on this runs as a script


def _serve() -> None:
    """First line: the template and what it always sees; each further line one conversation. One reply for each."""
    import jinja2

    _limit_memory()
    setup = json.loads(sys.stdin.readline())
    template: Any = None
    try:
        template = _environment().from_string(setup["template"])
        _answer({"text": ""})
    except jinja2.TemplateError as error:
        _answer({"error": f"it cannot be read: {error}"})
    for line in sys.stdin:
        try:
            _answer({"text": _render(template, setup["variables"] | json.loads(line))})
        # Whatever a foreign program may raise is told to the other side, and this process goes on.
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            _answer({"error": f"{type(error).__name__}: {error}"})


def _render(template: Any, variables: dict[str, Any]) -> str:
    size, parts = 0, []
    for part in template.generate(**variables):
        size += len(part)
        if size > _LARGEST_TEXT_BYTES:
            raise ValueError(f"it makes more than {_LARGEST_TEXT_BYTES} characters")
        parts.append(part)
    return "".join(parts)


def _answer(reply: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates, so that a template finds what it was written for."""
    from datetime import datetime

    import jinja2
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses to look inside Python at once; jinja2 itself would render nothing in that place."""

        def unsafe_undefined(self, obj: object, attribute: str) -> Any:
            raise SecurityError(f"access to {attribute!r} of {type(obj).__name__!r} is unsafe")

    class Generation(Extension):
        """`{% generation %}` marks what the model said; only training looks at it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


if __name__ == "__main__":
    _serve()
