"""Hull: the contexts and pasts between those that were searched."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

Point = tuple[int, int]
"""Context and past, in tokens."""


class Hull:
    """The convex hull of searched points: what lies in it has searched contexts and pasts on all sides.

    Args:
        points: one or more.

    Attributes:
        lower, upper: its corners from the shortest context to the longest, along the least and the most past.
    """

    def __init__(self, points: Iterable[Point]) -> None:
        ordered = sorted(set(points))
        least, most = dict(reversed(ordered)), dict(ordered)
        self.lower = _chain([(context, least[context]) for context in sorted(least)], 1)
        self.upper = _chain([(context, most[context]) for context in sorted(most)], -1)

    @property
    def contexts(self) -> tuple[int, int]:
        """The shortest and the longest context."""
        return self.lower[0][0], self.lower[-1][0]

    @property
    def without_past(self) -> tuple[int, int]:
        """The shortest and the longest context without past; an empty range where there is none."""
        inside = [context for context, past in self.lower if past == 0]
        return (inside[0], inside[-1]) if inside else (1, 0)

    def pasts(self, context: int) -> tuple[int, int] | None:
        """The least and the most past at a context; None outside the contexts, or where no whole token fits."""
        if not self.contexts[0] <= context <= self.contexts[1]:
            return None
        (above, over), (below, under) = _at(self.lower, context), _at(self.upper, context)
        # In whole numbers: the least past is rounded up and the most is rounded down.
        least, most = -(-above // over), below // under
        return (least, most) if least <= most else None

    def holds(self, context: int, past: int) -> bool:
        """Whether a point lies in it or on its edge."""
        found = self.pasts(context)
        return found is not None and found[0] <= past <= found[1]


def _chain(points: list[Point], sign: int) -> tuple[Point, ...]:
    """Those of points with growing contexts that lie on the hull's lower (1) or upper (-1) side."""
    kept: list[Point] = []
    for point in points:
        while len(kept) > 1 and sign * _turn(kept[-2], kept[-1], point) <= 0:
            kept.pop()
        kept.append(point)
    return tuple(kept)


def _turn(first: Point, second: Point, third: Point) -> int:
    """Above 0 where the way turns towards more past."""
    return (second[0] - first[0]) * (third[1] - first[1]) - (second[1] - first[1]) * (third[0] - first[0])


def _at(chain: tuple[Point, ...], context: int) -> tuple[int, int]:
    """Past of a chain at a context, as a fraction of whole numbers."""
    for (start, low), (end, high) in pairwise(chain):
        if context <= end:
            return low * (end - start) + (high - low) * (context - start), end - start
    return chain[0][1], 1
