"""Which partition is taken in the end."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvr_partition import Partition
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Measurement, RankTimes, Sample
from kvr_partition.search import search
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.decision import decided
from kvr_partition.search.space import coarseness

EVEN, UNEVEN = Partition((512, 512)), Partition((592, 432))

MACHINE = Machine(ChunkCost(1e-3, 1e-5, 4e-8, 4e-8, 0.2), 32, 4096, link=LinkCost.of(10e9))
"""Whose best split of 1024 tokens is some percent faster than the even one."""


def timed(partition: Partition, seconds: Sequence[float]) -> Measurement:
    """Samples of these TTFTs, with each rank's share of them as simulated."""
    simulated = simulate(partition, MACHINE)

    def sample(ttft_s: float) -> Sample:
        slower = ttft_s / simulated.ttft_s
        times = [
            RankTimes(rank.compute_s * slower, rank.wait_s * slower, rank.transfer_s * slower)
            for rank in simulated.ranks
        ]
        return Sample(ttft_s, tuple(times), 0)

    return Measurement("kvr", partition.sizes, tuple(map(sample, seconds)), "cap", past=partition.past)


def chosen(even: Sequence[float], uneven: Sequence[float]) -> Partition:
    return decided([timed(EVEN, even), timed(UNEVEN, uneven)]).partition


def test_near_ties_go_to_the_simpler_split() -> None:
    even = [0.98, 1.0, 1.01, 0.99, 1.0, 1.02]
    assert coarseness(EVEN) > coarseness(UNEVEN)
    assert chosen(even, [0.999 * one for one in reversed(even)]) == EVEN
    assert chosen(even, [0.97 * one for one in reversed(even)]) == UNEVEN


def test_noise_makes_no_tie_of_what_is_slower_in_nearly_every_turn() -> None:
    # Measured on two CPU ranks of a shared machine: one turn took everyone half as long again.
    even = [433.0, 425.0, 379.0, 399.0, 380.0, 382.0, 474.0, 379.0]
    uneven = [359.0, 322.0, 308.0, 322.0, 329.0, 372.0, 352.0, 545.0]
    assert chosen(even, uneven) == UNEVEN


def test_drift_between_turns_makes_nobody_slower() -> None:
    drift = [1.0, 1.4, 1.1, 1.5, 1.0, 1.3]
    assert chosen([1.02 * one for one in drift], drift) == UNEVEN


def test_a_single_turn_tells_only_what_is_far_apart() -> None:
    assert chosen([1.0], [0.995]) == EVEN
    assert chosen([1.0], [0.9]) == UNEVEN


def test_what_a_search_has_learnt_decides_where_turns_are_noise_and_nowhere_else() -> None:
    best = best_split(1024, 2, MACHINE, quantum=16)
    gain = simulate(EVEN, MACHINE).ttft_s / simulate(best, MACHINE).ttft_s - 1
    assert gain > 0.05
    trials = [timed(one, [simulate(one, MACHINE).ttft_s] * 3) for one in (EVEN, best, UNEVEN)]
    beliefs = Beliefs.after(MACHINE, 1024, trials)
    draw = random.Random(1)

    def after(noise: float) -> Partition:
        """The even split is 1% faster in these turns, whatever was measured before."""
        even, other = ([median * draw.lognormvariate(0, noise) for _ in range(8)] for median in (0.99, 1.0))
        # The medians are what they are said to be; only how sure they are differs.
        shift = 0.99 / sorted(one / two for one, two in zip(even, other, strict=True))[4]
        return decided([timed(EVEN, [one * shift for one in even]), timed(best, other)], beliefs).partition

    assert after(noise=0.2) == best
    assert after(noise=0.0005) == EVEN


def test_a_search_ends_with_what_was_decided() -> None:
    def confirm(partitions: Sequence[Partition]) -> list[Measurement]:
        return [timed(one, [1.0, 1.0, 1.0] if one == EVEN else [1.2, 1.2, 1.2]) for one in partitions]

    found = search(
        lambda one: timed(one, [simulate(one, MACHINE).ttft_s] * 3),
        1024, 2, 4, machine=MACHINE, quantum=16, confirm=confirm,
    )  # fmt: skip
    assert found.best == EVEN
    assert found.measurement in found.confirmed
    assert len(found.confirmed) > 1
