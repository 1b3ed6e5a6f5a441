"""What a search found."""

from __future__ import annotations

from dataclasses import dataclass

from kvr_partition.measurement import Measurement
from kvr_partition.partition import Partition


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured partition of a study; ``source`` is a seed's name or the sampler's."""

    source: str
    measurement: Measurement

    @property
    def partition(self) -> Partition:
        """What was measured."""
        return self.measurement.partition

    @property
    def ttft_s(self) -> float | None:
        """Median time to first token in seconds, None if it failed."""
        return self.measurement.ttft_s if self.measurement.ok else None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the best partition.
        measurement: its measurement; from the side-by-side run at the end where there was one.
        trials: every partition measured, in order.
        confirmed: all measurements of the side-by-side run at the end, if there was one.
        stopped: ``"budget"``; ``"exhausted"`` when the sampler had nothing new to offer; ``"converged"`` when
            nothing could be expected to win more than measuring can tell; ``"enough"`` when the caller said so.
        quantum: what boundaries were multiples of, as the study's creator decided.
    """

    best: Partition
    measurement: Measurement
    trials: tuple[Trial, ...]
    confirmed: tuple[Measurement, ...]
    stopped: str
    quantum: int
