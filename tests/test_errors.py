"""Errors keep what they know when they cross a process border."""

from __future__ import annotations

import inspect
import pickle

import pytest

from serve import errors


def every_error() -> list[type[errors.HalftoneError]]:
    return [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.HalftoneError)]


def test_every_error_class_is_part_of_the_surface() -> None:
    assert {kind.__name__ for kind in every_error()} == set(errors.__all__)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("n must be at least 1", param="n", code="range"),
        errors.Overloaded("queue full", retry_after_s=2.0),
        errors.ConfigError("variants[1].recipe", "unknown recipe"),
        errors.ContextLengthExceeded("too long", param="max_tokens"),
    ],
)
def test_an_error_survives_a_process_border(error: errors.HalftoneError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.__dict__ == error.__dict__
    assert str(copy) == str(error)
