"""A search of one context by a measure that notes what it was asked."""

from __future__ import annotations

from collections.abc import Callable

from kvr_partition import Partition
from kvr_partition.measurement import Measurement, RankTimes, Sample
from kvr_partition.search import Seed

CONTEXT, RANKS = 4096, 3


def landscape(partition: Partition) -> float:
    """Seconds of a prefill whose slowest rank decides; best near 1650/1300/1146."""
    return max(
        1e-4 * size + 2e-8 * size * (start + size / 2)
        for size, start in zip(partition.sizes, partition.starts, strict=True)
    )


def measurement(partition: Partition, seconds: float) -> Measurement:
    times = (RankTimes(seconds, 0.0, 0.0),) * partition.ranks
    return Measurement("kvr", partition.sizes, (Sample(seconds, times, 0),) * 6, "precise", past=partition.past)


class Recorder:
    """A measure that notes what it was asked."""

    def __init__(self, seconds: Callable[[Partition], float] = landscape) -> None:
        self.asked: list[tuple[int, ...]] = []
        self._seconds = seconds

    def __call__(self, partition: Partition) -> Measurement:
        self.asked.append(partition.sizes)
        return measurement(partition, self._seconds(partition))


def seeds() -> list[Seed]:
    return [Seed("interpolated", Partition((1500, 1300, 1296))), Seed("balanced", Partition((1600, 1300, 1196)))]
