"""The front holds exactly the points that nothing beats."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.evaluation import front

Point = tuple[float, float]
points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


def beats(a: Point, b: Point) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]


@given(points)
def test_a_point_is_on_the_front_exactly_if_none_beats_it(found: list[tuple[int, int]]) -> None:
    best = {found[index] for index in front(found)}
    assert best == {point for point in found if not any(beats(other, point) for other in found)}


@given(points)
def test_the_front_runs_by_cost_and_names_equal_points_once(found: list[tuple[int, int]]) -> None:
    best = [found[index] for index in front(found)]
    assert best == sorted(set(best))
    assert [loss for _, loss in best] == sorted({loss for _, loss in best}, reverse=True)
