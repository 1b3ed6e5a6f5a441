"""What a measurement says at first sight: medians, how far they may be off, and whose chunk was too long."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvr_partition.measurement import Measurement, median
from kvr_partition.partition import Partition

LONE_NOISE, LEAST_NOISE = 0.02, 1e-3
"""Relative standard error of a median: of one sample, and at least."""

LEAST_USUAL = 0.01
"""Least relative standard deviation between samples that is assumed; a few samples may differ by less."""

DAMPING = 0.7
"""Exponent of the speeds that tokens are dealt by: attention grows with the boundary as well as with the chunk."""


def noise_of(measurement: Measurement) -> float:
    """Relative standard error of a measurement's median TTFT."""
    logs = [math.log(sample.ttft_s) for sample in measurement.samples]
    count = len(logs)
    if count < 3:
        return LONE_NOISE / math.sqrt(max(1, count))
    mean = math.fsum(logs) / count
    variance = math.fsum((log - mean) ** 2 for log in logs) / (count - 1)
    # A median of normal samples scatters a quarter more than their mean.
    return max(LEAST_NOISE, 1.25 * math.sqrt(variance / count))


def usual_noise(timed: Sequence[Measurement]) -> float:
    """Relative standard deviation from sample to sample, the median over measurements; at least `LEAST_USUAL`."""
    samples = [
        noise_of(measurement) * math.sqrt(len(measurement.samples)) / (1.25 if len(measurement.samples) > 2 else 1)
        for measurement in timed
    ]
    return max(LEAST_USUAL, median(samples))


def median_of(measurement: Measurement, rank: int, field: str) -> float:
    """Median over samples of one of a rank's times."""
    return median([getattr(sample.ranks[rank], field) for sample in measurement.samples])


def rebalanced(measurement: Measurement, quantum: int) -> Partition | None:
    """The split that deals tokens in proportion to how fast ranks computed, damped; None if that is unknown.

    Args:
        quantum: what boundaries are multiples of.
    """
    sizes, counted = measurement.sizes, len(measurement.samples[0].ranks)
    took = [median_of(measurement, rank, "compute_s") for rank in range(min(len(sizes), counted))]
    if len(took) < len(sizes) or min(took) <= 0:
        return None
    shares = [size * seconds**-DAMPING for size, seconds in zip(sizes, took, strict=True)]
    return Partition.from_fractions(shares, sum(sizes), quantum=quantum, past=measurement.past)
