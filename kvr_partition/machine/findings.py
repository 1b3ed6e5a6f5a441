"""What a measurement shows that its schedule does not: waits, transfers and compute that costs do not explain.

A search believes what it measures. Where links carry one message at a time, say, it would cut for links that do
not exist, and nobody would notice. So each measurement is held against the schedule of the same split, given what
each rank computed in it: what is left over then cannot be an error of the cost model: the machine
works differently from what it was timed as.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from kvr_partition.machine.machine import FREE_LINK, Machine
from kvr_partition.machine.schedule import Timeline, simulate
from kvr_partition.measurement import Measurement, RankTimes, Sample, median
from kvr_partition.methods import method_of

Kind = Literal["late", "link", "wait", "compute", "unexplained"]

CONTRADICTIONS: frozenset[Kind] = frozenset({"late", "link", "wait"})
"""Kinds that no correction of costs explains, since ranks' own compute is taken as it was."""

SHARE = 0.05
"""Share of TTFT that must be unexplained in every sample. The schedule's own error is smaller
(docs/performance.md)."""

LEAST_S = 0.002
"""Seconds that must be unexplained: a busy host needs as long to wake threads and processes."""

SLOW_LINK = 2.0
"""Factor over its timed duration from which a link is called slow."""

SLOW_RANK = 1.25
"""Factor over its timed chunk from which a rank is called slow; searches correct smaller ones."""

UNEXPLAINED = 0.1
"""Share of TTFT in which the last rank neither computed nor waited, from which the host is slow."""

_MOST_SAMPLES = 8


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that is off by far more than noise.

    Attributes:
        kind: ``"late"`` (a rank's first KV came long after it could have), ``"link"`` (a link delivers less than
            it was timed at), ``"wait"`` (a rank waits longer than the links explain), ``"compute"`` (ranks compute
            longer than chunks were timed at) or ``"unexplained"`` (TTFT beyond what the last rank computed and
            waited).
        text: that, with its likely cause, in one line.
        share: of TTFT that it takes; of ``"compute"``, of what was timed.
        rank: whose; None for all.
        source: the rank at the other end of the link, where it is one.
    """

    kind: Kind
    text: str
    share: float
    rank: int | None = None
    source: int | None = None

    @property
    def about(self) -> tuple[str, int | None, int | None]:
        """Findings of several measurements with equal ones count as the same finding: kind, source, rank."""
        return self.kind, self.source, self.rank


def findings(
    measurement: Measurement, machine: Machine, *, chunks_timed: bool = True, noise_seed: int = 0
) -> list[Finding]:
    """What a measurement of KV-Runahead shows that its schedule does not.

    Args:
        machine: what it ran on. One without links says nothing.
        chunks_timed: whether the machine's costs were timed here; a guess of them says nothing about slow ranks.
        noise_seed: of the choice of links that background traffic disturbs.
    """
    partition = measurement.partition
    known = machine.link != FREE_LINK
    if not known or not measurement.ok or not method_of(measurement.method).splits or partition.ranks < 2:
        return []
    as_run = replace(machine, past=partition.past, noise=measurement.noise, noise_seed=noise_seed)
    as_run = replace(as_run, topology=method_of(measurement.method).topology or as_run.topology)
    alone = simulate(partition, as_run)
    samples = measurement.samples[:_MOST_SAMPLES]
    expected = [_as_computed(sample, as_run, alone, measurement) for sample in samples]
    found = _waits(samples, expected, as_run)
    if chunks_timed:
        found += _slow_ranks(samples, alone)
    if not found:
        found += _unexplained(samples)
    return found


def worst(found: Iterable[Finding]) -> list[Finding]:
    """Of findings about the same, the worst; in the order in which they first came."""
    kept: dict[tuple[str, int | None, int | None], Finding] = {}
    for finding in found:
        before = kept.get(finding.about)
        if before is None or finding.share > before.share:
            kept[finding.about] = finding
    return list(kept.values())


def contradict(found: Sequence[Sequence[Finding]], least: int = 2) -> str | None:
    """Why a search must not go on: measurements contradict what it goes by, at least half of them in the same way.

    Args:
        found: the findings of each measurement.
        least: so many must; one alone may be an accident.
    """
    against = [one for each in found for one in each if one.kind in CONTRADICTIONS]
    for finding in worst(against):
        times = sum(other.about == finding.about for other in against)
        if times >= max(least, len(found) / 2):
            return finding.text
    return None


def _as_computed(sample: Sample, as_run: Machine, alone: Timeline, measurement: Measurement) -> Timeline:
    """The schedule of ranks that compute what they did in one sample."""
    speeds = tuple(
        planned.compute_s / (ran.compute_s * as_run.slowness(rank)) if ran.compute_s > 0 else 1.0
        for rank, (planned, ran) in enumerate(zip(alone.ranks, sample.ranks, strict=True))
    )
    return simulate(measurement.partition, replace(as_run, speeds=speeds, solo_speedup=1.0))


def _waits(samples: Sequence[Sample], expected: Sequence[Timeline], as_run: Machine) -> list[Finding]:
    """The first rank that waits longer than its links explain, and why; those after it wait for it."""
    ranks = len(samples[0].ranks)
    for rank in range(1, ranks):
        left = [
            sample.ranks[rank].wait_s - timeline.ranks[rank].wait_s
            for sample, timeline in zip(samples, expected, strict=True)
        ]
        ttft = median([sample.ttft_s for sample in samples])
        if min(left) < max(SHARE * ttft, LEAST_S):
            continue
        over, share = median(left), median(left) / ttft
        slow = _slow_link(rank, samples, expected, as_run, share)
        if rank == 1 and slow is not None:
            return [slow]  # it has nothing to pass on that its link could stand behind
        first = [
            ran - timeline.ranks[rank].layers[0].wait_s
            for sample, timeline in zip(samples, expected, strict=True)
            if (ran := sample.ranks[rank].first_wait_s) is not None
        ]
        if first and median(first) > 0.5 * over:
            return [
                Finding(
                    "late",
                    f"rank {rank} began {_seconds(median(first))} after its KV could have been there: "
                    + ("links carry one message at a time?" if rank > 1 else "did rank 0 begin late?"),
                    share,
                    rank,
                )
            ]
        return [slow or _long_wait(rank, over, share)]
    return []


def _long_wait(rank: int, over: float, share: float) -> Finding:
    return Finding(
        "wait",
        f"rank {rank} waited {_seconds(over)} longer for KV than links and the ranks before it explain: "
        "do links hold one another up?",
        share,
        rank,
    )


def _slow_link(
    rank: int, samples: Sequence[Sample], expected: Sequence[Timeline], as_run: Machine, share: float
) -> Finding | None:
    """The link to a rank, if what is sent before it takes far longer than it was timed at."""
    sources = [rank - 1] if as_run.topology == "chain" else list(range(rank))
    ratios = {
        source: min(
            sample.ranks[source].transfer_s / timeline.ranks[source].transfer_s
            for sample, timeline in zip(samples, expected, strict=True)
            if timeline.ranks[source].transfer_s > 0
        )
        for source in sources
        if any(timeline.ranks[source].transfer_s > 0 for timeline in expected)
    }
    if not ratios:
        return None
    source = max(ratios, key=ratios.__getitem__)
    if ratios[source] < SLOW_LINK:
        return None
    timed = 1 / as_run.link_between(source, rank).seconds_per_byte
    return Finding(
        "link",
        f"link {source}→{rank} delivers {_rate(timed / ratios[source])}, was timed at {_rate(timed)}: "
        "is something else on it?",
        share,
        rank,
        source,
    )


def _slow_ranks(samples: Sequence[Sample], alone: Timeline) -> list[Finding]:
    """Ranks that compute far longer than their chunks were timed at."""
    ratios = [
        min(sample.ranks[rank].compute_s for sample in samples) / planned.compute_s
        for rank, planned in enumerate(alone.ranks)
    ]
    over = [rank for rank, ratio in enumerate(ratios) if ratio > SLOW_RANK]
    if not over:
        return []
    cause = "is the machine busy or hot, or do links take SMs or cores?"
    if len(over) == len(ratios):
        ratio = median(ratios)
        return [
            Finding(
                "compute",
                f"ranks computed {ratio - 1:.0%} longer than their chunks were timed at: {cause}",
                ratio - 1,
            )
        ]
    return [
        Finding(
            "compute",
            f"rank {rank} computed {ratios[rank] - 1:.0%} longer than its chunk was timed at: {cause}",
            ratios[rank] - 1,
            rank,
        )
        for rank in over
    ]


def _unexplained(samples: Sequence[Sample]) -> list[Finding]:
    left = [sample.ttft_s - _busy(sample.ranks[-1]) for sample in samples]
    ttft = median([sample.ttft_s for sample in samples])
    if min(left) < max(UNEXPLAINED * ttft, 2 * LEAST_S):
        return []
    return [
        Finding(
            "unexplained",
            f"the first token came {_seconds(median(left))} after all that the last rank computed and waited: "
            "does the host set the pace?",
            median(left) / ttft,
            len(samples[0].ranks) - 1,
        )
    ]


def _busy(times: RankTimes) -> float:
    return times.compute_s + times.wait_s


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.0f} ms"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.3g} MB/s"
