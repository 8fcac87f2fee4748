from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import ConfigError
from serve.rollout import Batch, Guard, Outcome, Plan, Rollout, Shadow, Split, Step
from serve.rollout.store import Lease, LeaseLost, Store

BASE = Split("bf16", {"bf16": 80.0, "nf4": 20.0}, salt="s")
PLAN = Plan(
    "bf16", "int8", (Step(10.0, 20, 10.0), Step(50.0, 20, 10.0)), Shadow(0.5, 20, 10.0),
    {"error_rate": Guard(0.05), "ttft": Guard(0.1)},
)  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'rollouts.db'}"
    return str(request.getfixturevalue("postgresql"))


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def outcome(record: int, variant: str, revision: int, at_s: float, **options: object) -> Outcome:
    return Outcome(
        record, variant, "sticky", revision, at_s, f"{record:016x}", at_s + 1.0, completion_tokens=9,
        ttft_s=0.1 + record % 7, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def parcel(sequence: int, now_s: float, revision: int, shadow: bool = False) -> Batch:
    first = 20 * sequence
    return Batch(
        "ingress",
        sequence,
        now_s,
        tuple(
            outcome(first + n, "int8" if n % 2 else "bf16", revision, now_s - 1.0, shadow=bool(shadow and n % 2))
            for n in range(20)
        ),
    )


def test_only_one_controller_is_in_office(store: Store) -> None:
    first = store.acquire("one", 0.0, 10.0)
    assert first is not None
    assert store.acquire("two", 9.0, 10.0) is None
    assert store.acquire("one", 9.0, 10.0) == first
    second = store.acquire("two", 20.0, 10.0)
    assert second is not None
    assert second.fence == first.fence + 1


def test_a_controller_that_slept_through_its_lease_writes_nothing(store: Store) -> None:
    old = store.acquire("one", 0.0, 10.0)
    assert old
    rollout, entry = Rollout.begin("r1", PLAN, BASE, 0.0)
    store.commit(old, rollout, [entry])
    assert store.acquire("two", 100.0, 10.0)
    with pytest.raises(LeaseLost):
        store.commit(old, rollout, [entry])
    with pytest.raises(LeaseLost):
        store.keep(old, "r1", [parcel(1, 1.0, 1)])
    assert len(store.journal("r1")) == 1
    assert store.recorded("r1") == []


def test_a_released_office_is_free_at_once(store: Store) -> None:
    lease = store.acquire("one", 0.0, 1000.0)
    assert lease
    store.release(lease)
    assert store.acquire("two", 1.0, 10.0)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.sets(st.integers(0, 60)), twice=st.sets(st.integers(0, 60)))
def test_killed_at_any_moment_it_resumes_at_the_same_step_with_the_same_evidence(
    tmp_path: Path, kills: set[int], twice: set[int]
) -> None:
    """Beside it runs one that is never killed; parcels arrive twice; a kill loses all that was not written down."""
    folder = tmp_path / f"{abs(hash((tuple(kills), tuple(twice))))}"
    folder.mkdir(exist_ok=True)
    store = Store(f"sqlite:///{folder / 'db'}")
    lease = store.acquire("one", 0.0, 1e9)
    assert lease
    steady, entry = Rollout.begin("r1", PLAN, BASE, 0.0)
    killed, _ = Rollout.begin("r1", PLAN, BASE, 0.0)
    store.commit(lease, killed, [entry])
    for second in range(60):
        now_s = float(second)
        sent = parcel(second, now_s, steady.split.revision, steady.state.phase == "shadowing")
        store.keep(lease, "r1", [sent])
        for _ in range(1 + (second in twice)):
            killed.take(sent)
        steady.take(sent)
        if second in kills:
            loaded = store.load("r1")
            assert loaded
            killed = loaded
        entries, actions = killed.tick(now_s)
        assert (entries, actions) == steady.tick(now_s)
        if entries:
            store.commit(lease, killed, entries)
        assert killed.split == steady.split
        assert sum(killed.split.weights.values()) == pytest.approx(100.0)
        assert killed.split.weights.get("int8", 0.0) in (0.0, 10.0, 50.0, 80.0)
    assert json.dumps(killed.to_dict()) == json.dumps(steady.to_dict())
    phases = [record.facts["to"] for record in store.journal("r1") if record.kind == "transition"]
    assert phases[:3] == ["shadowing", "progressing", "progressing"]
    store.close()


def test_a_new_process_sees_what_the_old_one_wrote(url: str, store: Store) -> None:
    lease = store.acquire("one", 0.0)
    assert lease
    rollout, entry = Rollout.begin("r1", PLAN, BASE, 5.0)
    store.commit(lease, rollout, [entry])
    entries, _ = rollout.order("abort", 7.0, "ada")
    store.commit(lease, rollout, entries)
    store.close()
    again = Store(url)
    assert again.latest() == "r1"
    records = again.journal()
    assert [record.kind for record in records] == ["started", "order", "transition"]
    assert all(one.id < other.id for one, other in pairwise(records))
    loaded = again.load("r1")
    assert loaded
    assert loaded.state.phase == "aborted"
    again.close()


def test_two_controllers_that_ask_at_the_same_moment_do_not_both_get_the_office(url: str) -> None:
    """Each with a connection of its own, in threads: one of them is in office, and only its fence may write."""
    stores = [Store(url) for _ in range(4)]
    start = threading.Barrier(len(stores))

    def ask(number: int) -> Lease | None:
        start.wait()
        return stores[number].acquire(f"controller-{number}", 0.0, 10.0)

    with ThreadPoolExecutor(len(stores)) as pool:
        leases = list(pool.map(ask, range(len(stores))))
    assert sum(lease is not None for lease in leases) == 1
    for store in stores:
        store.close()


def test_old_parcels_are_dropped_beyond_the_limit() -> None:
    store = Store(kept_parcels=5)
    lease = store.acquire("one", 0.0)
    assert lease
    rollout, entry = Rollout.begin("r1", PLAN, BASE, 0.0)
    for sequence in range(1, 20):
        store.keep(lease, "r1", [parcel(sequence, 1.0, 1)])
    store.commit(lease, rollout, [entry])
    assert len(store.recorded("r1")) == 5 * 20
    store.close()


@pytest.mark.parametrize("url", ["nonsense", "nosuch://host/db", "sqlite:////no/such/folder/x.db"])
def test_a_wrong_url_is_one_clear_line(url: str) -> None:
    with pytest.raises((ConfigError, Exception), match="store"):
        Store(url)
