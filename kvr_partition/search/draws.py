"""Draws from what to believe after some measurements: how far everything expected of a partition may be off."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from kvr_partition.machine.cost import ChunkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.measurement import Measurement, RankTimes, Sample
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.compute_times import SPEED_SPREAD, TERM_SPREAD
from kvr_partition.search.correction import LINK_SPREAD, SHARE_SPREAD
from kvr_partition.search.measured import noise_of


def drawn(machine: Machine, context: int, measurements: Sequence[Measurement], count: int) -> list[Beliefs]:
    """So many beliefs, each as likely as the others.

    Each is the most likely one for a prior and measurements that are moved at random, as far as they are
    uncertain. Where everything is normal, and the logarithms of times nearly are, that draws from the posterior
    (randomize, then optimize: Bardsley, Solonen, Haario and Laine, 2014). The same arguments give the same draws.

    Args:
        machine: the prior, behind the past of all measurements.
    """
    found = []
    for at in range(count):
        draw = random.Random(f"{context} {at}")

        def off(spread: float, draw: random.Random = draw) -> float:
            return math.exp(draw.gauss(0.0, spread))

        moved = [_moved(measurement, off) for measurement in measurements]
        found.append(Beliefs.after(_moved_machine(machine, off), context, moved))
    return found


def _moved_machine(machine: Machine, off: Callable[[float], float]) -> Machine:
    cost = machine.cost
    fixed, token, own, prefix = (term * off(TERM_SPREAD) for term in cost.terms[:4])
    share = min(0.95, cost.kv_share * off(SHARE_SPREAD))
    links = machine.link if isinstance(machine.link, tuple) else (machine.link,)
    moved = tuple(replace(link, seconds_per_byte=link.seconds_per_byte * off(LINK_SPREAD)) for link in links)
    return replace(
        machine,
        cost=ChunkCost(fixed, token, own, prefix, share, cost.size_effects),
        speeds=tuple(speed * off(SPEED_SPREAD) for speed in machine.speeds),
        link=moved if isinstance(machine.link, tuple) else moved[0],
    )


def _moved(measurement: Measurement, off: Callable[[float], float]) -> Measurement:
    """Every time of a measurement by as much as its median may be off, in all samples alike."""
    noise = noise_of(measurement)
    ttft = off(noise)
    ranks = [(off(noise), off(noise)) for _ in measurement.sizes]

    def moved(sample: Sample) -> Sample:
        # Timing one rank only leaves the others without times.
        times = tuple(
            RankTimes(rank.compute_s * compute, rank.wait_s, rank.transfer_s * transfer)
            for rank, (compute, transfer) in zip(sample.ranks, ranks, strict=False)
        )
        return replace(sample, ttft_s=sample.ttft_s * ttft, ranks=times)

    return replace(measurement, samples=tuple(moved(sample) for sample in measurement.samples))
