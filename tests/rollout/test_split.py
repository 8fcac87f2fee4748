import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ConfigError
from serve.rollout import Split, assign, shadows, unit_hash

USERS = [f"user-{number}" for number in range(2000)]


def two(canary: float, **options: object) -> Split:
    return Split("bf16", {"bf16": 100 - canary, "int8": canary}, canary="int8", **options)  # type: ignore[arg-type]


def variant_of(split: Split, user: str) -> str:
    return assign(split, user, "request").variant


@given(st.floats(0, 100), st.floats(0, 100), st.text())
def test_who_has_the_canary_keeps_it_when_its_weight_rises(one: float, other: float, salt: str) -> None:
    low, high = sorted((one, other))
    for user in USERS[:100]:
        if variant_of(two(low, salt=salt), user) == "int8":
            assert variant_of(two(high, salt=salt), user) == "int8"


@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_a_weight_raised_at_the_cost_of_stable_moves_users_from_stable_only(a: int, b: int, up: int, down: int) -> None:
    def split(int8: int, nf4: int) -> Split:
        return Split("bf16", {"int8": int8, "bf16": 100 - int8 - nf4, "nf4": nf4})

    for raised, name in ((split(a + up, b), "int8"), (split(a, b + down), "nf4")):
        for user in USERS[:200]:
            before, after = variant_of(split(a, b), user), variant_of(raised, user)
            assert before == after or (before, after) == ("bf16", name)


@given(st.lists(st.integers(0, 30), min_size=3, max_size=3), st.integers(0, 2), st.integers(0, 10))
def test_among_many_variants_a_raised_one_keeps_all_its_users(weights: list[int], raised: int, by: int) -> None:
    def split(amounts: list[int]) -> Split:
        others = {name: amounts[index] for index, name in enumerate(("int8", "nf4", "gptq4"))}
        return Split("bf16", {"bf16": 100 - sum(amounts), **others})

    more = [weight + by * (index == raised) for index, weight in enumerate(weights)]
    name = ("int8", "nf4", "gptq4")[raised]
    for user in USERS[:200]:
        if variant_of(split(weights), user) == name:
            assert variant_of(split(more), user) == name


def test_shares_follow_the_weights() -> None:
    split = Split("bf16", {"bf16": 60, "int8": 25, "nf4": 10, "gptq4": 5})
    counts = Counter(variant_of(split, f"user-{number}") for number in range(20_000))
    for name, weight in split.weights.items():
        expected = 200 * weight
        assert abs(counts[name] - expected) < 5 * (expected * (1 - weight / 100)) ** 0.5


def test_starting_a_rollout_on_a_variant_that_serves_already_moves_nobody() -> None:
    before = Split("bf16", {"bf16": 70, "int8": 20, "nf4": 10})
    after = before.moved(before.weights, canary="nf4")
    assert after.revision == before.revision + 1
    assert all(variant_of(before, user) == variant_of(after, user) for user in USERS)


def test_rollback_gives_users_stable_and_nothing_else() -> None:
    before = Split("bf16", {"bf16": 60, "int8": 20, "nf4": 20}, canary="nf4")
    after = before.moved({"bf16": 80, "int8": 20})
    for user in USERS:
        assert variant_of(after, user) == ("bf16" if variant_of(before, user) == "nf4" else variant_of(before, user))


def test_a_sticky_user_ignores_the_request_and_an_anonymous_request_does_not() -> None:
    split = two(50)
    assert len({assign(split, "ada", f"r{number}").variant for number in range(50)}) == 1
    assert {assign(split, None, f"r{number}").variant for number in range(50)} == {"bf16", "int8"}


def test_routes_say_why() -> None:
    assert assign(two(100), "ada", "r").route == "canary"
    assert assign(two(0), "ada", "r").route == "sticky"
    assert assign(two(0), None, "r").route == "weighted"
    assert assign(two(100), None, "r").route == "canary"


def test_a_salt_deals_anew() -> None:
    one, other = two(50, salt="a"), two(50, salt="b")
    assert 800 < sum(variant_of(one, user) == variant_of(other, user) for user in USERS) < 1200


def test_held_out_units_get_stable_whatever_the_weights() -> None:
    held = [assign(two(100, holdout=10.0), user, "r") for user in USERS]
    held_out = [assignment for assignment in held if assignment.held_out]
    assert 120 < len(held_out) < 280
    assert all(assignment.variant == "bf16" and assignment.route == "sticky" for assignment in held_out)
    assert all(assignment.variant == "int8" for assignment in held if not assignment.held_out)


def test_assignment_is_the_same_in_another_process() -> None:
    code = (
        "import json; from serve.rollout import *;"
        "s = Split('bf16', {'bf16': 70, 'int8': 30}, salt='s', shadow={'nf4': .3});"
        "print(json.dumps([[assign(s, f'user-{n}', 'r').variant, list(shadows(s, f'{n}'))] for n in range(200)]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    split = Split("bf16", {"bf16": 70, "int8": 30}, salt="s", shadow={"nf4": 0.3})
    assert json.loads(out) == [[variant_of(split, u), list(shadows(split, str(n)))] for n, u in enumerate(USERS[:200])]


def test_the_layout_of_the_hash_is_pinned() -> None:
    """A change here would deal all users anew at an upgrade."""
    assert unit_hash("salt", "ada") == "361a0c3110140bad"
    assert "".join(variant_of(two(50, salt="salt"), user)[0] for user in USERS[:16]) == "iibiibiibibiibii"


def test_shadows_are_drawn_independently_at_their_rates() -> None:
    split = Split("bf16", {"bf16": 100}, shadow={"nf4": 0.1, "int8": 0.5, "gptq4": 1.0, "fp16": 0.0})
    drawn = Counter(name for number in range(5000) for name in shadows(split, f"r{number}"))
    assert abs(drawn["nf4"] - 500) < 110
    assert abs(drawn["int8"] - 2500) < 180
    assert drawn["gptq4"] == 5000
    assert drawn["fp16"] == 0
    assert abs(sum({"nf4", "int8"} <= set(shadows(split, f"r{n}")) for n in range(5000)) - 250) < 80


@given(st.integers(0, 10_000), st.floats(0, 100), st.dictionaries(st.sampled_from(["nf4", "x"]), st.floats(0, 1)))
def test_a_split_survives_json(cents: int, holdout: float, shadow: dict[str, float]) -> None:
    split = two(cents / 100, holdout=holdout, shadow=shadow, salt="s", revision=7)
    assert Split.from_dict(json.loads(json.dumps(split.to_dict()))) == split


@pytest.mark.parametrize(
    ("key", "mapping"),
    [
        ("traffic.weights: must sum to 100, got 90", {"stable": "a", "weights": {"a": 90}}),
        ("traffic.weights.b", {"stable": "a", "weights": {"a": 90, "b": -10}}),
        ("traffic.weights.a", {"stable": "a", "weights": {"a": "100"}}),
        ("traffic.weights.a", {"stable": "a", "weights": {"a": float("nan")}}),
        ("traffic.weights", {"stable": "a", "weights": 100}),
        ("traffic.stable: is missing", {"weights": {"a": 100}}),
        ("traffic.stable: 'b'", {"stable": "b", "weights": {"a": 100}}),
        ("traffic.canary: 'b'", {"stable": "a", "weights": {"a": 100}, "canary": "b"}),
        ("traffic.canary: 'a' is already", {"stable": "a", "weights": {"a": 100}, "canary": "a"}),
        ("traffic.shadow.b", {"stable": "a", "weights": {"a": 100}, "shadow": {"b": 10}}),
        ("traffic.holdout", {"stable": "a", "weights": {"a": 100}, "holdout": 101}),
        ("traffic.wieghts: unknown key; allowed: stable, weights", {"stable": "a", "wieghts": {}}),
    ],
)
def test_a_wrong_table_is_refused_by_the_name_of_its_key(key: str, mapping: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=key):
        Split.from_dict(mapping)
