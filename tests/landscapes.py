"""Machines whose costs are known, and measurements of them."""

from __future__ import annotations

from msgspec.structs import replace

from kvr_partition import Partition
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.measurement import Measurement, RankTimes, Sample

FITTED = Machine(ChunkCost(1e-3, 2e-5, 2e-9, 2e-9, 0.25), 16, 16384, link=LinkCost.of(10e9, 2e-5))


TRUTH = replace(
    FITTED,
    cost=ChunkCost(1.1e-3, 2.3e-5, 1.8e-9, 2.2e-9, 0.28),
    speeds=(1.0, 0.8, 1.05, 1.0),
    link=(LinkCost.of(11e9, 2e-5), LinkCost.of(6e9, 2e-5), LinkCost.of(9e9, 2e-5)),
)


def measured(partition: Partition, truth: Machine = TRUTH, samples: int = 3) -> Measurement:
    timeline = simulate(partition, truth)
    ranks = tuple(RankTimes(one.compute_s, one.wait_s, one.transfer_s) for one in timeline.ranks)
    return Measurement("kvr", partition.sizes, (Sample(timeline.ttft_s, ranks, 0),) * samples, "precise")
