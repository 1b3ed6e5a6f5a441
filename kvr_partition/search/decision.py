"""Which of some partitions to take, once they were timed side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvr_partition.measurement import Measurement, median
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.measured import LEAST_NOISE, LONE_NOISE
from kvr_partition.search.space import coarseness

FINALISTS = 3
"""Partitions that are timed again in the end, side by side, besides the even split."""

NEAR_TIE = 0.01
"""TTFT that is given up for a simpler split at most, as a share, however noisy the machine."""

MODEL_ERROR = 0.03
"""Relative standard deviation of the model itself, on top of the posterior's, when two partitions are compared."""


def decided(timed: Sequence[Measurement], beliefs: Beliefs | None = None) -> Measurement:
    """The fastest; of those that it does not beat beyond noise the simplest.

    Times are compared within each turn. What slows a whole turn down, as neighbours on a shared machine do, then
    makes nobody slower than another. On a noisy machine a few turns say little, and then what the search has
    learnt before decides: both are weighted by how certain they are. The simplest split is the one whose
    boundaries are multiples of the largest number.

    Args:
        timed: measurements whose samples were taken in turn.
        beliefs: after all earlier measurements.
    """
    turns = min(len(measurement.samples) for measurement in timed)
    logs = [[math.log(sample.ttft_s) for sample in measurement.samples[:turns]] for measurement in timed]
    usual = [median(turn) for turn in zip(*logs, strict=True)]
    scores = [median([log - middle for log, middle in zip(each, usual, strict=True)]) for each in logs]
    first = scores.index(min(scores))
    behind = [score - scores[first] for score in scores]
    errors = [_standard_error([log - best for log, best in zip(each, logs[first], strict=True)]) for each in logs]
    if beliefs is not None:
        expected, unsure = beliefs.ttft_s([measurement.sizes for measurement in timed])
        for at in range(len(timed)):
            if at != first:
                before = math.log(expected[at] / expected[first])
                open_ = float(unsure[at] ** 2 + unsure[first] ** 2) + MODEL_ERROR**2
                weight = errors[at] ** 2 / (errors[at] ** 2 + open_)
                behind[at] += weight * (before - behind[at])
                errors[at] *= math.sqrt(1 - weight)
    fastest = behind.index(min(behind))
    ties = [
        at for at in range(len(timed))
        if behind[at] - behind[fastest] <= min(NEAR_TIE, max(errors[at], errors[fastest]))
    ]  # fmt: skip
    return timed[max(ties, key=lambda at: (coarseness(timed[at].partition), -behind[at]))]


def _standard_error(values: Sequence[float]) -> float:
    """Standard error of their median, from the median deviation, which outliers hardly change."""
    if len(values) < 3:
        return LONE_NOISE * math.sqrt(2 / len(values))
    middle = median(values)
    deviation = 1.4826 * median([abs(value - middle) for value in values])
    return max(LEAST_NOISE, 1.25 * deviation / math.sqrt(len(values)))
