"""Measurement: what timing one candidate said, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from kvr_partition.partition import Partition
from kvr_partition.timeline import RankTimeline


class RankTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one rank spent one prefill, in seconds.

    ``transfer_s`` is the time its outgoing KV was on the wire; it overlaps with the other two. ``first_wait_s`` is
    the part of the waiting that was for the first layer's KV, where that is known.
    """

    compute_s: float
    wait_s: float
    transfer_s: float
    first_wait_s: float | None = None

    @classmethod
    def of(cls, timeline: RankTimeline) -> RankTimes:
        """The sums over a timeline's layers."""
        first = timeline.layers[0].wait_s if timeline.layers else None
        return cls(timeline.compute_s, timeline.wait_s, timeline.transfer_s, first)


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One timed prefill: TTFT in seconds and how each rank spent it."""

    ttft_s: float
    ranks: tuple[RankTimes, ...]
    kv_bytes: int
    """Bytes of KV counted on all links together."""
    host_s: float = 0.0
    """Seconds the host spent enqueueing work, where that is known and could set the pace."""


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a candidate has no time."""

    kind: str
    """``"out-of-memory"``, ``"lost"``, ``"timeout"`` or ``"error"``."""
    message: str
    traceback: str = ""


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All samples of one candidate, or the reason why there are none.

    ``stopped`` says what ended the sampling: ``"precise"`` (the interval of the median is as tight as
    asked), ``"cap"`` (the most samples, or the most time, allowed), or ``"failed"``.
    """

    method: str
    sizes: tuple[int, ...]
    samples: tuple[Sample, ...]
    stopped: str
    run: str = ""
    """The run in the measurement log whose provenance these samples have."""
    failure: Failure | None = None
    noise: int = 0
    """Bytes of background traffic in each layer, on one random link between neighbours."""
    past: int = 0
    """Tokens that every rank had in its cache before."""

    @property
    def partition(self) -> Partition:
        """The chunks that were measured."""
        return Partition(self.sizes, self.past)

    @property
    def ok(self) -> bool:
        """Whether there is a time."""
        return self.failure is None and bool(self.samples)

    @property
    def ttft_s(self) -> float:
        """Median TTFT in seconds; infinite for a failed candidate, so that it never wins."""
        return median([sample.ttft_s for sample in self.samples]) if self.ok else math.inf

    @property
    def interval_s(self) -> tuple[float, float]:
        """95% confidence interval of the median, in seconds."""
        return median_interval([sample.ttft_s for sample in self.samples]) if self.ok else (math.inf, math.inf)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free confidence interval of the median from order statistics.

    The number of samples below the true median is binomial(n, ½), so the interval from the k-th smallest
    to the k-th largest covers it with probability 1 − 2·P(X < k). The largest k that still reaches the
    confidence is taken. Below six samples not even the whole range reaches 95%; it is returned all the
    same, and `interval_is_sure` says so.
    """
    ordered = sorted(values)
    n = len(ordered)
    tail = 0.5**n
    rank = 1
    weight = tail
    for k in range(1, n // 2):
        weight = weight * (n - k + 1) / k
        if 2 * (tail + weight) > 1 - confidence:
            break
        tail += weight
        rank = k + 1
    return ordered[rank - 1], ordered[n - rank]


def interval_is_sure(samples: int, confidence: float = 0.95) -> bool:
    """Whether so many samples can carry an interval of that confidence at all."""
    return 2 * 0.5**samples <= 1 - confidence
