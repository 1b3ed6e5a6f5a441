"""Replay: a measure that answers from a recorded log, so that a search runs again without hardware."""

from __future__ import annotations

from collections.abc import Iterable

from kvr_partition.measurement import Failure, Measurement
from kvr_partition.partition import Partition


class Replay:
    """Answers with what was measured; a partition that was not is a failed candidate, like any other.

    Args:
        measurements: finished measurements, such as ``MeasurementLog.measurements("search/16384")``.
        method: whose; the log may hold others.

    Attributes:
        missing: partitions that were asked for and are not in the log.

    Example:
        >>> recorded = [Measurement("kvr", (5, 3), (), "failed")]
        >>> Replay(recorded)(Partition((4, 4))).ok
        False
    """

    def __init__(self, measurements: Iterable[Measurement], method: str = "kvr") -> None:
        self._known = {
            measurement.partition: measurement for measurement in measurements if measurement.method == method
        }
        self.missing: list[Partition] = []

    def __call__(self, partition: Partition) -> Measurement:
        """The recorded measurement of a partition."""
        known = self._known.get(partition)
        if known is not None:
            return known
        self.missing.append(partition)
        failure = Failure("error", f"{partition} is not in the recorded log")
        return Measurement("kvr", partition.sizes, (), "failed", failure=failure, past=partition.past)

    def __len__(self) -> int:
        return len(self._known)
