from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.rollout.looping import WINDOW_TOKENS, is_looping


@given(cycle=st.lists(st.integers(0, 9), min_size=1, max_size=16), before=st.lists(st.integers(0, 9), max_size=200))
def test_an_answer_that_ends_in_a_cycle_is_looping(cycle: list[int], before: list[int]) -> None:
    assert is_looping([*before, *(cycle * WINDOW_TOKENS)])


def test_a_story_with_a_refrain_is_not() -> None:
    assert not is_looping([*range(60), 1, 1, 1, 1])
    assert not is_looping([1] * (WINDOW_TOKENS - 1))
    assert not is_looping(list(range(17)) * 20)
