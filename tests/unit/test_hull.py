"""The hull of what was searched, against what lies between points by definition."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from kvr_partition.hull import Hull, Point

POINTS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=7)


def cross(first: Point, second: Point, third: Point) -> int:
    return (second[0] - first[0]) * (third[1] - first[1]) - (second[1] - first[1]) * (third[0] - first[0])


def between(points: list[Point], at: Point) -> bool:
    """Whether a point lies in a triangle, on a line or at a place of some points."""
    if at in points:
        return True
    for first, second in combinations(points, 2):
        box = sorted((first[0], second[0])), sorted((first[1], second[1]))
        inside = all(low <= value <= high for (low, high), value in zip(box, at, strict=True))
        if cross(first, second, at) == 0 and inside:
            return True
    for corners in combinations(points, 3):
        turns = [cross(corners[one], corners[(one + 1) % 3], at) for one in range(3)]
        if cross(*corners) != 0 and (min(turns) >= 0 or max(turns) <= 0):
            return True
    return False


@given(POINTS)
def test_what_lies_between_searched_points_is_inside_and_nothing_else(points: list[Point]) -> None:
    hull = Hull(points)
    for context in range(14):
        for past in range(14):
            assert hull.holds(context, past) == between(points, (context, past)), (context, past)


@given(POINTS, st.integers(0, 13))
def test_the_pasts_of_a_context_are_those_inside(points: list[Point], context: int) -> None:
    hull = Hull(points)
    inside = [past for past in range(14) if hull.holds(context, past)]
    assert hull.pasts(context) == ((inside[0], inside[-1]) if inside else None)
    assert hull.contexts == (min(points)[0], max(points)[0])


@given(POINTS)
def test_contexts_without_past(points: list[Point]) -> None:
    low, high = Hull(points).without_past
    assert [context for context in range(14) if low <= context <= high] == [
        context for context in range(14) if Hull(points).holds(context, 0)
    ]
