"""Whatever goes wrong has a word in the outcome and a series that began at zero."""

from __future__ import annotations

import inspect

import pytest

from serve import errors, metrics
from serve.errors import HalftoneError, RequestError, ServiceError
from serve.hop import ReplicaDied
from serve.journal import Journal, code_of, kind_of
from serve.rollout.evidence import HARD_ERRORS


def kinds(parent: type[HalftoneError]) -> list[type[HalftoneError]]:
    return [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, parent)]


@pytest.mark.parametrize("kind", [*kinds(ServiceError), errors.ContextLengthExceeded, ReplicaDied])
def test_what_a_variant_can_fail_with_is_counted_from_zero(kind: type[HalftoneError]) -> None:
    assert code_of(kind("it failed")) in metrics.ERRORS.values


@pytest.mark.parametrize("kind", kinds(RequestError))
def test_what_the_rim_turns_away_is_counted_from_zero(kind: type[RequestError]) -> None:
    counted = {labels for name, labels in Journal("m", "i").snapshot().values if name == metrics.ERRORS.name}
    assert ("m", "", "", f"http_{kind.status}") in counted


def test_what_needs_no_statistics_is_told_apart() -> None:
    told = {kind_of(kind("x")) for kind in (ReplicaDied, errors.OutputNotFinite, errors.OutOfMemory)}
    assert told == set(HARD_ERRORS)
    assert kind_of(errors.GenerationFailed("x")) == "internal"
    assert kind_of(ValueError("x")) == "internal"  # type: ignore[arg-type]
