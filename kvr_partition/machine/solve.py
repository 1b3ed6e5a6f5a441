"""The best split by costs alone, and the best order of ranks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from kvr_partition.errors import PartitionError
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import check_ranks, simulate, ttft
from kvr_partition.partition import Partition

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def balanced(
    cost: ChunkCost,
    context: int,
    ranks: int,
    quantum: int = 1,
    past: int = 0,
    speeds: Sequence[float] = (),
) -> Partition:
    """The partition in which every rank computes equally long, waits and transfers left out.

    Args:
        cost: time of a chunk.
        context, ranks, quantum, past: as in `Partition.even`.
        speeds: of each rank, relative to ``cost``; 1 for all when empty.

    Raises:
        PartitionError: a context too short for so many ranks, or speeds for another number of ranks.
    """
    if speeds and len(speeds) != ranks:
        raise PartitionError(f"{len(speeds)} speeds do not fit {ranks} ranks")
    if cost.per_token_s == cost.per_own_pair_s == 0:
        # Nothing grows with the chunk, so nothing tells one split from another.
        return Partition.even(context, ranks, quantum=quantum, past=past)
    pace = [*speeds] or [1.0] * ranks
    low, high = 0.0, cost.seconds(context, past) / min(pace)
    for _ in range(100):
        middle = (low + high) / 2
        fits = sum(_chunks(cost, middle, pace, past)) >= context
        low, high = (low, middle) if fits else (middle, high)
    # Chunks are limited only now: limited ones would always sum to the context, give or take rounding.
    fractions: list[float] = []
    for chunk in _chunks(cost, high, pace, past):
        fractions.append(min(chunk, context - sum(fractions)))
    return Partition.from_fractions(fractions, context, quantum=quantum, past=past)


def best_split(context: int, ranks: int, machine: Machine, quantum: int = 1) -> Partition:
    """The partition with the shortest simulated TTFT.

    Equal work is best only where links cost nothing: slow links favour a first rank that hands over early
    and a last one that does not wait. From the balanced and the even split a pattern search moves boundaries,
    alone and together, by steps that halve until they reach the quantum.

    Raises:
        PartitionError: a context too short for so many ranks, or speeds or links that do not fit.
    """
    import numpy as np

    check_ranks(machine, ranks)
    even = Partition.even(context, ranks, quantum=quantum, past=machine.past)
    if ranks == 1:
        return even
    equal = balanced(machine.cost, context, ranks, past=machine.past, speeds=machine.speeds)
    starts = np.array([equal.ends[:-1], even.ends[:-1]], dtype=float) - machine.past
    moves = _moves(ranks - 1)
    times = _ttft_of_boundaries(starts, context, machine)
    best, best_s = starts[int(times.argmin())], float(times.min())
    least = max(1.0, quantum / 2)
    step = context / ranks / 4
    while step >= least:
        tried = best + step * moves
        times = _ttft_of_boundaries(tried, context, machine)
        at = int(times.argmin())
        if times[at] < best_s * (1 - 1e-9):
            best, best_s = tried[at], float(times[at])
        else:
            step /= 2
    edges = [0.0, *best.tolist(), float(context)]
    fractions = [high - low for low, high in itertools.pairwise(edges)]
    rounded = Partition.from_fractions(fractions, context, quantum=quantum, past=machine.past)
    # Rounding may cost more than starting from a split that needs none.
    candidates = [rounded, even]
    found = ttft([candidate.sizes for candidate in candidates], machine)
    best_rounded = candidates[int(found.argmin())]
    return best_rounded if quantum == 1 else _on_quanta(best_rounded, machine, quantum)


def _on_quanta(split: Partition, machine: Machine, quantum: int) -> Partition:
    """The best partition that moving boundaries, or runs of them, by one quantum leads to.

    The nearest quantum is not the best one: TTFT rises at different rates on both sides of a boundary.
    """
    import numpy as np

    cuts, context = np.array(split.boundaries[1:-1]), split.context
    at = np.arange(len(cuts))
    runs = [(low <= at) & (at < high) for low, high in itertools.combinations(range(len(cuts) + 1), 2)]
    moves = quantum * np.concatenate([runs, np.negative(np.array(runs, dtype=int))])
    best_s = float(ttft([split.sizes], machine)[0])
    while True:
        sizes = np.diff(np.pad(cuts + moves, ((0, 0), (1, 1)), constant_values=((0, 0), (0, context))), axis=1)
        times = np.where((sizes > 0).all(axis=1), ttft(np.maximum(sizes, 1), machine), np.inf)
        if times.min() >= best_s * (1 - 1e-12):
            edges = [0, *cuts.tolist(), context]
            return Partition([high - low for low, high in itertools.pairwise(edges)], split.past)
        best_s, cuts = float(times.min()), cuts + moves[int(times.argmin())]


@dataclass(frozen=True)
class Ordered:
    """Ranks in an order, and the best split of it.

    Attributes:
        order: for each place of the chain the device that takes it.
        partition: chunks, in order of places.
        ttft_s: simulated TTFT in seconds.
    """

    order: tuple[int, ...]
    partition: Partition
    ttft_s: float


def best_order(
    context: int, machine: Machine, links: Sequence[Sequence[LinkCost]] | None = None, quantum: int = 1
) -> Ordered:
    """The order of unequal devices in which the best split is fastest.

    Up to six devices every order is tried. With more, orders by speed, by what the links carry and at random are
    improved by exchanging two devices until no exchange helps. Orders are ranked by their split with
    equal work, the best of them by their best split.

    Args:
        context: tokens of the prompt.
        machine: of the devices; ``speeds`` in order of devices. Its links count where ``links`` is None.
        links: from each device to each other one.

    Raises:
        PartitionError: no speeds, a context too short, or a table of links that does not fit.
    """
    devices = len(machine.speeds)
    if not devices:
        raise PartitionError("an order needs devices that differ: give the machine their speeds")
    if links is not None and (len(links) != devices or any(len(row) != devices for row in links)):
        raise PartitionError(f"links between {devices} devices are a table of {devices} rows and columns")
    if links is None and not isinstance(machine.link, LinkCost):
        raise PartitionError("links that differ must be told from each device to each other: give links=")

    def in_order(order: tuple[int, ...]) -> Machine:
        hops = machine.link
        if links is not None:
            hops = tuple(links[before][after] for before, after in itertools.pairwise(order))
        return msgspec.structs.replace(
            machine, speeds=tuple(machine.speeds[device] for device in order), link=hops
        )

    known: dict[tuple[int, ...], float] = {}

    def roughly(order: tuple[int, ...]) -> float:
        if order not in known:
            one = in_order(order)
            split = balanced(one.cost, context, devices, past=one.past, speeds=one.speeds)
            known[order] = float(ttft([split.sizes], one)[0])
        return known[order]

    pairs = list(itertools.combinations(range(devices), 2))
    if devices <= 6:
        for order in itertools.permutations(range(devices)):
            roughly(order)
    else:
        by_speed = tuple(sorted(range(devices), key=lambda device: machine.speeds[device]))
        draw = random.Random(devices)
        starts = [tuple(range(devices)), by_speed, by_speed[::-1]]
        starts += [tuple(draw.sample(range(devices), devices)) for _ in range(9)]
        for best in starts:
            while (near := min((_exchanged(best, *pair) for pair in pairs), key=roughly)) != best:
                if roughly(near) >= roughly(best):
                    break
                best = near
    found = []
    for order in sorted(known, key=lambda order: (known[order], order))[:_FINALISTS]:
        split = best_split(context, devices, in_order(order), quantum=quantum)
        found.append(Ordered(order, split, simulate(split, in_order(order)).ttft_s))
    return min(found, key=lambda one: one.ttft_s)


_FINALISTS = 12
"""Orders whose best split is solved for."""


def _exchanged(order: tuple[int, ...], first: int, second: int) -> tuple[int, ...]:
    places = list(order)
    places[first], places[second] = places[second], places[first]
    return tuple(places)


def _moves(boundaries: int) -> Array:
    """Directions in which boundaries are moved: one, a run of them, all spread or drawn together."""
    import numpy as np

    rows = []
    for low in range(boundaries):
        for high in range(low + 1, boundaries + 1):
            row = np.zeros(boundaries)
            row[low:high] = 1.0
            rows.append(row)
    ramp = np.linspace(0, 1, boundaries + 2)[1:-1]
    rows += [ramp, ramp[::-1], ramp * (1 - ramp) * 4]
    moves = np.array(rows)
    return np.concatenate([moves, -moves, 3 * moves, -3 * moves])


def _ttft_of_boundaries(boundaries: Array, context: int, machine: Machine) -> Array:
    import numpy as np

    edges = np.concatenate(
        [np.zeros((len(boundaries), 1)), boundaries, np.full((len(boundaries), 1), float(context))], axis=1
    )
    sizes = np.diff(edges, axis=1)
    times = ttft(np.maximum(sizes, 1.0), machine)
    times[(sizes < 1.0).any(axis=1)] = np.inf
    return times


def _chunks(cost: ChunkCost, seconds: float, pace: Sequence[float], past: int) -> list[float]:
    """The longest chunk each rank can compute in that time, one after the other."""
    chunks: list[float] = []
    start = float(past)
    for speed in pace:
        chunks.append(cost.chunk_for(seconds * speed, start))
        start += chunks[-1]
    return chunks
