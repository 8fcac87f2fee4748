import json

import pytest

from serve.errors import ConfigError
from serve.rollout import Batch, Drift, Outcome

OPEN = Outcome(record=7, variant="int8", route="canary", revision=3, assigned_at_s=100.0, unit="00ff")
DONE = Outcome(
    record=8,
    variant="int8",
    route="sticky",
    revision=3,
    assigned_at_s=100.0,
    finished_at_s=101.5,
    finish_reason="stop",
    prompt_tokens=5,
    completion_tokens=20,
    ttft_s=0.1,
    itl_mean_s=0.02,
    itl_max_s=0.05,
    e2e_s=1.5,
    running_sequences=4,
    drift=Drift(tokens=20, kl_mean=0.002, kl_max=0.03, top1_agreements=19),
)


def test_a_parcel_survives_json_and_leaves_defaults_out() -> None:
    parcel = Batch("ingress-1", 4, 102.0, (OPEN, DONE), {"int8": 1})
    wire = json.dumps(parcel.to_dict())
    assert Batch.from_dict(json.loads(wire)) == parcel
    assert "looping" not in wire


def test_an_open_record_is_neither_finished_nor_ok() -> None:
    assert OPEN.is_open
    assert not OPEN.ok
    assert DONE.ok
    assert DONE.drift is not None
    assert DONE.drift.top1_agreement == 0.95


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"outcome\.prompt: unknown key"):
        Outcome.from_dict({**OPEN.to_dict(), "prompt": "secret"})
