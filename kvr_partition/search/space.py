"""Partitions as points that a sampler can move: log ratios of chunk sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvr_partition.partition import Partition


@dataclass(frozen=True, slots=True)
class Seed:
    """A partition to measure first, and what proposed it."""

    name: str
    partition: Partition


@dataclass(frozen=True, slots=True)
class Space:
    """A box of log ratios ``ln(c_i / c_last)``; every point in it decodes to a valid partition.

    Attributes:
        context: tokens of the prompt.
        quantum: boundaries are multiples of this many tokens.
        ranges: lowest and highest log ratio of each rank but the last.
        past: tokens that every rank has in its cache before the prompt.
    """

    context: int
    quantum: int
    ranges: tuple[tuple[float, float], ...]
    past: int = 0

    @classmethod
    def around(cls, seeds: Sequence[Seed], quantum: int, reach: float = 0.0) -> Space:
        """A box around the last seed (the best informed one) that holds all seeds with room to spare.

        Half as far again as the furthest seed, and 15% more: the best split may lie beyond them all. A
        lone seed informs about nothing; chunks up to twice or down to half of its own are then tried.
        It reaches at least ``reach`` to either side.
        """
        spare = 0.15 if len(seeds) > 1 else math.log(2)
        points = [log_ratios(seed.partition) for seed in seeds]
        ranges = []
        for values in zip(*points, strict=True):
            centre = values[-1]
            far = max(reach, 1.5 * max(abs(value - centre) for value in values) + spare)
            ranges.append((centre - far, centre + far))
        first = seeds[0].partition
        return cls(first.context, quantum, tuple(ranges), first.past)

    def names(self) -> list[str]:
        """Parameter names, in rank order."""
        return [f"log_ratio_{rank}" for rank in range(len(self.ranges))]

    def params(self, partition: Partition) -> dict[str, float]:
        """The point of a partition; the nearest in the box for one outside it, as samplers take no other."""
        points = zip(self.names(), log_ratios(partition), self.ranges, strict=True)
        return {name: min(max(value, low), high) for name, value, (low, high) in points}

    def partition(self, params: dict[str, float]) -> Partition:
        """The partition at a point, rounded to the quantum."""
        shares = [math.exp(params[name]) for name in self.names()] + [1.0]
        return Partition.from_fractions(shares, self.context, quantum=self.quantum, past=self.past)


def log_ratios(partition: Partition) -> tuple[float, ...]:
    """``ln(c_i / c_last)`` for every rank but the last."""
    last = partition.sizes[-1]
    return tuple(math.log(size / last) for size in partition.sizes[:-1])


LEAST_TILES = 8
"""Of an average chunk; one that is cut into fewer is cut more finely than by tiles."""


def default_quantum(context: int, ranks: int, tile: int = 1) -> int:
    """A step small enough not to cost time and large enough that neighbours differ by more than noise.

    The largest power of two that leaves every rank 128 steps on average; or more, up to a tile, as long as that
    leaves every rank `LEAST_TILES`.

    Args:
        tile: rows that kernels take at once, a power of two: what is left over takes as long as a whole one.
    """
    step = 1 << max(0, (context // (128 * ranks)).bit_length() - 1)
    while tile > step and tile * LEAST_TILES * ranks > context:
        tile //= 2
    return max(step, tile)


def coarseness(partition: Partition) -> int:
    """The largest number of tokens that all boundaries are multiples of: how simple a split is."""
    return math.gcd(*partition.boundaries)


def distinct(seeds: Sequence[Seed]) -> list[Seed]:
    """Without seeds that a later, better informed one repeats; order kept."""
    latest = {seed.partition.sizes: seed for seed in seeds}
    return [seed for seed in seeds if latest[seed.partition.sizes] is seed]
