"""What other methods take on a machine, and what no split can beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvr_partition.errors import PartitionError
from kvr_partition.machine.machine import FREE_LINK, Machine
from kvr_partition.machine.schedule import check_ranks
from kvr_partition.methods import GATHERING, GatheringMethod
from kvr_partition.noise import noisy_link
from kvr_partition.partition import Partition


def gathering_ttft(method: GatheringMethod, context: int, ranks: int, machine: Machine) -> float:
    """TTFT in seconds of a method that gathers all KV in every layer: TSP, TSP causal or zigzag.

    All ranks meet in each layer, and a ring's links carry everyone's rows but one rank's. Chunks are even.

    Raises:
        PartitionError: speeds or links for another number of ranks, or an unknown method.
    """
    if method not in GATHERING:
        raise PartitionError(f"{method!r} does not gather; there are {', '.join(GATHERING)}")
    check_ranks(machine, ranks)
    cost, chunk = machine.cost, context / ranks
    hops = [machine.link_between(rank, rank + 1) for rank in range(ranks - 1)]
    slowest = max(hops, key=lambda link: link.seconds(chunk * machine.entry_bytes), default=FREE_LINK)
    carried = (ranks - 1) * chunk * machine.entry_bytes
    before, after = [], []
    for rank in range(ranks):
        slow = machine.slowness(rank) / machine.layers
        work, attention = _WORK[method](chunk, rank, ranks, machine)
        before.append(work * cost.kv_share * slow)
        after.append((work * (1 - cost.kv_share) + attention) * slow)
    total = 0.0
    now = [0.0] * ranks
    for layer in range(machine.layers):
        met = max(now[rank] + before[rank] for rank in range(ranks))
        background = (
            machine.noise if noisy_link(layer, ranks, machine.noise, machine.noise_seed) is not None else 0
        )
        gathered = met + (slowest.seconds(carried + background) if ranks > 1 else 0.0)
        now = [gathered + after[rank] for rank in range(ranks)]
        total = now[0] if method == "zigzag" else now[-1]
    return total


def _dense(chunk: float, rank: int, ranks: int, machine: Machine) -> tuple[float, float]:
    """Dense kernels compute every pair of the chunk with the whole context."""
    del rank
    part = machine.cost.parts(chunk, machine.past + chunk * ranks)
    return part.tokens, part.prefix


def _causal(chunk: float, rank: int, ranks: int, machine: Machine) -> tuple[float, float]:
    del ranks
    part = machine.cost.parts(chunk, machine.past + rank * chunk, machine.dense)
    return part.tokens, part.own + part.prefix


def _zigzag(chunk: float, rank: int, ranks: int, machine: Machine) -> tuple[float, float]:
    """Half a chunk from the front and half a chunk from the back."""
    cost, half = machine.cost, chunk / 2
    pieces = [
        cost.smooth.parts(half, machine.past + at * half, machine.dense) for at in (rank, 2 * ranks - 1 - rank)
    ]
    return cost.parts(chunk, 0).tokens, sum(piece.own + piece.prefix for piece in pieces) * cost.size_effect(chunk)


_WORK: dict[GatheringMethod, Callable[[float, int, int, Machine], tuple[float, float]]] = {
    "tsp": _dense,
    "tsp-causal": _causal,
    "zigzag": _zigzag,
}
"""Seconds of all layers for what each token takes, and for attention: of a rank and its chunk."""


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on TTFT, in seconds, for any schedule of these costs.

    Attributes:
        single_s: one rank alone.
        dense_s: the paper's ``TTFT*(p) = TTFT(1)/2 · (1/p + 1/p²)``, for dense attention.
        causal_s: ``TTFT(1)/p``, for causal attention.
        practical_s: TTFT(p), this partition with every wait and transfer removed; None without one.
    """

    single_s: float
    dense_s: float
    causal_s: float
    practical_s: float | None


def bounds(context: int, ranks: int, machine: Machine, partition: Partition | None = None) -> Bounds:
    """Bounds for a context; all ranks as fast as ``cost`` says, but for ``practical_s``.

    Raises:
        PartitionError: a partition with another past than the machine's.
    """
    if partition is not None and partition.past != machine.past:
        raise PartitionError(f"the partition has past {partition.past}, the machine past {machine.past}")
    cost = machine.cost
    single = cost.seconds(context, machine.past, machine.dense)
    practical = None
    if partition is not None:
        practical = max(
            machine.slowness(rank) * cost.seconds(size, start, machine.dense)
            for rank, (size, start) in enumerate(zip(partition.sizes, partition.starts, strict=True))
        )
    return Bounds(single, single / 2 * (1 / ranks + 1 / ranks**2), single / ranks, practical)
