"""Who waits for whom: what costs of chunks and links mean for the time to first token."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from kvr_partition.cost import ChunkCost, LinkCost
from kvr_partition.errors import PartitionError
from kvr_partition.methods import GATHERING, GatheringMethod
from kvr_partition.noise import noisy_link
from kvr_partition.partition import Partition
from kvr_partition.timeline import LayerTimes, RankTimeline

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

FREE_LINK = LinkCost()
"""Takes no time."""


@dataclass(frozen=True)
class Setting:
    """Everything besides the partition that a schedule depends on.

    Attributes:
        cost: time of a chunk on a rank of speed 1, over all layers.
        layers: layers that keep KV; all cost the same.
        entry_bytes: bytes of KV that one token keeps in one layer.
        link: of every directed link, or one for each rank's link to the next (a message between ranks
            further apart then takes the slowest link on the way).
        speeds: of each rank, relative to ``cost``; 1 for all when empty.
        topology: ``"chain"`` or ``"fanout"``.
        overlap: whether a rank attends to its own block before the prefix has arrived (attention depth).
        dense: whether every pair is computed and masked, as in the paper, rather than causal ones only.
        past: tokens that every rank has in its cache already, where no partition says so itself.
        noise, noise_seed: foreign traffic, as in `runtime.links.LinkLimits`.
        alone_speed: of a rank while all others are idle, relative to ``speeds``, which are those of all ranks at
            work at once. Ranks on one GPU share its power and memory; 1 for ranks that share nothing.
    """

    cost: ChunkCost
    layers: int
    entry_bytes: int
    link: LinkCost | tuple[LinkCost, ...] = FREE_LINK
    speeds: tuple[float, ...] = ()
    topology: Literal["chain", "fanout"] = "chain"
    overlap: bool = True
    dense: bool = False
    past: int = 0
    noise: int = 0
    noise_seed: int = 0
    alone_speed: float = 1.0

    def slowness(self, rank: int) -> float:
        """How many times as long as ``cost`` a rank takes."""
        return 1.0 / self.speeds[rank] if self.speeds else 1.0

    def link_between(self, source: int, target: int) -> LinkCost:
        """Of the directed link from one rank to a later one."""
        if isinstance(self.link, LinkCost):
            return self.link
        return max(self.link[source:target], key=lambda link: link.seconds(1 << 20))


@dataclass(frozen=True)
class Timeline:
    """One prefill as simulated: TTFT in seconds, and how each rank spends it."""

    ttft_s: float
    ranks: tuple[RankTimeline, ...]


def simulate(partition: Partition, setting: Setting) -> Timeline:
    """The timeline of a KV-Runahead prefill.

    Within a layer a rank computes until its KV is ready (``cost.kv_share`` of the work per token), hands it
    over, attends to its own block, waits for the prefix, and computes the rest. A link carries one message
    at a time: for each layer the rank's own chunk first, then what it forwards, nearest chunk first.

    Raises:
        PartitionError: speeds or links for another number of ranks.
    """
    import numpy as np

    setting = replace(setting, past=partition.past)
    run = _played(np.array([partition.sizes], dtype=float), setting, keep=True)
    ranks = []
    for rank in range(partition.ranks):
        layers = [
            LayerTimes(run.computed[layer][rank], run.waited[layer][rank], run.sent[layer][rank])
            for layer in range(setting.layers)
        ]
        ranks.append(RankTimeline(tuple(layers), run.tails[rank]))
    return Timeline(float(run.finish()[0]), tuple(ranks))


def ttft(sizes: Any, setting: Setting) -> Array:
    """TTFT in seconds of many partitions at once.

    Args:
        sizes: chunk sizes ``[partitions, ranks]``, not necessarily whole.

    Returns:
        ``[partitions]``.

    Raises:
        PartitionError: no such array, or speeds or links for another number of ranks.
    """
    import numpy as np

    table = np.asarray(sizes, dtype=float)
    if table.ndim != 2:
        raise PartitionError(f"sizes must be [partitions, ranks]; got {list(table.shape)}")
    parts = []
    for low in range(0, len(table), _BATCH):
        parts.append(_played(table[low : low + _BATCH], setting).finish())
    return np.concatenate(parts) if parts else np.empty(0)


_BATCH = 2048
"""Partitions simulated together: enough to hide Python's part, few enough to stay in the cache."""


def ease(sizes: Any, setting: Setting) -> Array:
    """What ranks' times are multiplied by because others are idle now and then, of many partitions; ``[n]``.

    Between all at work and one alone it falls with the share of time that ranks are idle.
    """
    import numpy as np

    table = np.asarray(sizes, dtype=float)
    if not _shared(setting, table):
        return np.ones(len(table))
    run = _Run(table, setting)
    run.play()
    return run.ease()


def _shared(setting: Setting, sizes: Array) -> bool:
    """Whether some of these ranks are faster while others are idle."""
    return setting.alone_speed != 1 and sizes.shape[1] > 1


def _played(sizes: Array, setting: Setting, keep: bool = False) -> _Run:
    run = _Run(sizes, setting, keep, ease(sizes, setting) if _shared(setting, sizes) else None)
    run.play()
    return run


class _Run:
    """The schedule itself, for ``n`` partitions at once; times are arrays ``[n]``."""

    def __init__(self, sizes: Array, setting: Setting, keep: bool = False, ease: Array | None = None) -> None:
        import numpy as np

        self.ranks = sizes.shape[1]
        _check(setting, self.ranks)
        self.setting = setting
        self.keep = keep
        chunks = np.ascontiguousarray(sizes.T)
        starts = setting.past + np.cumsum(chunks, axis=0) - chunks
        cost, layers = setting.cost, setting.layers
        slow = np.array([setting.slowness(rank) for rank in range(self.ranks)])[:, None] / layers
        if ease is not None:
            slow = slow * ease
        if cost.steps:
            slow = slow * step_of(cost, chunks)
        work = (cost.fixed_s + cost.per_token_s * chunks) * slow
        own = cost.per_own_pair_s * chunks * chunks * slow * (1.0 if setting.dense else 0.5)
        prefix = cost.per_prefix_pair_s * chunks * starts * slow
        self.before_kv = work * cost.kv_share
        self.before_wait = own if setting.overlap else np.zeros_like(own)
        self.after_wait = work * (1 - cost.kv_share) + prefix + (0 if setting.overlap else own)
        self.bytes = chunks * setting.entry_bytes
        self.now = np.zeros_like(chunks)
        self.free: dict[tuple[int, int], Any] = {}
        self.computed: list[list[float]] = []
        self.waited: list[list[float]] = []
        self.sent: list[list[float]] = []
        self.tails: list[float] = []

    def play(self) -> None:
        """All layers, one after the other."""
        for layer in range(self.setting.layers):
            self._layer(layer)
        if self.keep:
            self.tails = [float(self.after_wait[rank][0]) for rank in range(self.ranks)]

    def finish(self) -> Array:
        """When the last rank is done."""
        result: Array = self.now[-1]
        return result

    def ease(self) -> Array:
        """See `ease`."""
        computed = self.setting.layers * (self.before_kv + self.before_wait + self.after_wait).sum(axis=0)
        idle = 1 - computed / (self.ranks * self.now.max(axis=0))
        # While slow links keep everybody waiting, more than all but one are idle.
        others: Array = (idle / (1 - 1 / self.ranks)).clip(0, 1)
        return 1 - others * (1 - 1 / self.setting.alone_speed)

    def _layer(self, layer: int) -> None:
        import numpy as np

        setting = self.setting
        noisy = noisy_link(layer, self.ranks, setting.noise, setting.noise_seed)
        arrived: list[list[Any]] = [[None] * self.ranks for _ in range(self.ranks)]
        computed, waited, sent = [], [], [0.0] * self.ranks
        for rank in range(self.ranks):
            began = self.now[rank]
            ready = began + self.before_kv[rank]
            if noisy == rank:
                self._send(rank, rank + 1, float(setting.noise), ready)
            if setting.topology == "fanout":
                for target in range(rank + 1, self.ranks):
                    arrived[target][rank] = self._send(rank, target, self.bytes[rank], ready)
                    sent[rank] += self._held(rank, target, self.bytes[rank])
            elif rank + 1 < self.ranks:
                arrived[rank + 1][rank] = self._send(rank, rank + 1, self.bytes[rank], ready)
                sent[rank] += self._held(rank, rank + 1, self.bytes[rank])
                for chunk in range(rank - 1, -1, -1):
                    arrived[rank + 1][chunk] = self._send(
                        rank, rank + 1, self.bytes[chunk], np.maximum(arrived[rank][chunk], ready)
                    )
                    sent[rank] += self._held(rank, rank + 1, self.bytes[chunk])
            free = ready + self.before_wait[rank]
            resume = free
            for chunk in range(rank):
                resume = np.maximum(resume, arrived[rank][chunk])
            if self.keep:
                # A layer counts from the end of the wait before it, like a measured timeline.
                tail = float(self.after_wait[rank][0]) if layer else 0.0
                computed.append(float(free[0] - began[0]) + tail)
                waited.append(float(resume[0] - free[0]))
            self.now[rank] = resume + self.after_wait[rank]
        self.computed.append(computed)
        self.waited.append(waited)
        self.sent.append(sent)

    def _send(self, source: int, target: int, nbytes: Any, ready: Any) -> Any:
        """When a message has arrived; the link is busy until its last byte has left."""
        import numpy as np

        link = self.setting.link_between(source, target)
        start = ready if (source, target) not in self.free else np.maximum(self.free[source, target], ready)
        left = start + nbytes * link.seconds_per_byte
        self.free[source, target] = left
        return left + link.latency_s

    def _held(self, source: int, target: int, nbytes: Any) -> float:
        if not self.keep:
            return 0.0
        return float(nbytes[0]) * self.setting.link_between(source, target).seconds_per_byte


def step_of(cost: ChunkCost, chunks: Array) -> Array:
    """`ChunkCost.step` of many chunks at once."""
    import numpy as np

    if not cost.steps:
        return np.ones_like(chunks)
    sizes, factors = (np.array(column) for column in zip(*cost.steps, strict=True))
    at = np.searchsorted(sizes, chunks).clip(max=len(sizes) - 1)
    found: Array = np.where(sizes[at] == chunks, factors[at], 1.0)
    return found


def gathering_ttft(method: GatheringMethod, context: int, ranks: int, setting: Setting) -> float:
    """TTFT in seconds of a method that gathers all KV in every layer: TSP, TSP causal or zigzag.

    All ranks meet in each layer, and a ring's links carry everyone's rows but one rank's. Chunks are even.

    Raises:
        PartitionError: speeds or links for another number of ranks, or an unknown method.
    """
    if method not in GATHERING:
        raise PartitionError(f"{method!r} does not gather; there are {', '.join(GATHERING)}")
    _check(setting, ranks)
    cost, chunk = setting.cost, context / ranks
    hops = [setting.link_between(rank, rank + 1) for rank in range(ranks - 1)]
    slowest = max(hops, key=lambda link: link.seconds(chunk * setting.entry_bytes), default=FREE_LINK)
    carried = (ranks - 1) * chunk * setting.entry_bytes
    before, after = [], []
    for rank in range(ranks):
        slow = setting.slowness(rank) * cost.step(chunk) / setting.layers
        work = (cost.fixed_s + cost.per_token_s * chunk) * slow
        if method == "tsp":
            attention = cost.per_prefix_pair_s * chunk * (setting.past + context)
        elif method == "tsp-causal":
            attention = cost.per_own_pair_s * chunk * chunk / 2 + cost.per_prefix_pair_s * chunk * (
                setting.past + rank * chunk
            )
        else:
            half = chunk / 2
            rest = half * (setting.past + rank * half) + half * (setting.past + (2 * ranks - 1 - rank) * half)
            attention = cost.per_own_pair_s * half * half + cost.per_prefix_pair_s * rest
        before.append(work * cost.kv_share)
        after.append(work * (1 - cost.kv_share) + attention * slow)
    total = 0.0
    now = [0.0] * ranks
    for layer in range(setting.layers):
        met = max(now[rank] + before[rank] for rank in range(ranks))
        foreign = setting.noise if noisy_link(layer, ranks, setting.noise, setting.noise_seed) is not None else 0
        gathered = met + (slowest.seconds(carried + foreign) if ranks > 1 else 0.0)
        now = [gathered + after[rank] for rank in range(ranks)]
        total = now[0] if method == "zigzag" else now[-1]
    return total


@dataclass(frozen=True)
class Bounds:
    """What no schedule of these costs beats, in seconds.

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


def bounds(context: int, ranks: int, setting: Setting, partition: Partition | None = None) -> Bounds:
    """Bounds for a context; all ranks as fast as ``cost`` says, but for ``practical_s``.

    Raises:
        PartitionError: a partition with another past than the setting's.
    """
    if partition is not None and partition.past != setting.past:
        raise PartitionError(f"the partition has past {partition.past}, the setting past {setting.past}")
    cost = setting.cost
    pairs = context * context * (1.0 if setting.dense else 0.5)
    single = (
        cost.fixed_s
        + cost.per_token_s * context
        + cost.per_own_pair_s * pairs
        + cost.per_prefix_pair_s * context * setting.past
    )
    practical = None
    if partition is not None:
        practical = max(
            setting.slowness(rank)
            * cost.step(size)
            * (
                cost.fixed_s
                + cost.per_token_s * size
                + cost.per_own_pair_s * size * size * (1.0 if setting.dense else 0.5)
                + cost.per_prefix_pair_s * size * start
            )
            for rank, (size, start) in enumerate(zip(partition.sizes, partition.starts, strict=True))
        )
    return Bounds(single, single / 2 * (1 / ranks + 1 / ranks**2), single / ranks, practical)


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


def best_split(context: int, ranks: int, setting: Setting, quantum: int = 1) -> Partition:
    """The partition with the shortest simulated TTFT.

    Equal work is best only where links cost nothing: slow links favour a first rank that hands over early
    and a last one that does not wait. From the balanced and the even split a pattern search moves boundaries,
    alone and together, by steps that halve until they reach the quantum.

    Raises:
        PartitionError: a context too short for so many ranks, or speeds or links that do not fit.
    """
    import numpy as np

    _check(setting, ranks)
    even = Partition.even(context, ranks, quantum=quantum, past=setting.past)
    if ranks == 1:
        return even
    equal = balanced(setting.cost, context, ranks, past=setting.past, speeds=setting.speeds)
    starts = np.array([equal.ends[:-1], even.ends[:-1]], dtype=float) - setting.past
    moves = _moves(ranks - 1)
    times = _ttft_of_boundaries(starts, context, setting)
    best, best_s = starts[int(times.argmin())], float(times.min())
    least = max(1.0, quantum / 2)
    step = context / ranks / 4
    while step >= least:
        tried = best + step * moves
        times = _ttft_of_boundaries(tried, context, setting)
        at = int(times.argmin())
        if times[at] < best_s * (1 - 1e-9):
            best, best_s = tried[at], float(times[at])
        else:
            step /= 2
    edges = [0.0, *best.tolist(), float(context)]
    fractions = [high - low for low, high in itertools.pairwise(edges)]
    rounded = Partition.from_fractions(fractions, context, quantum=quantum, past=setting.past)
    # Rounding may cost more than starting from a split that needs none.
    candidates = [rounded, even]
    found = ttft([one.sizes for one in candidates], setting)
    return candidates[int(found.argmin())]


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
    context: int, setting: Setting, links: Sequence[Sequence[LinkCost]] | None = None, quantum: int = 1
) -> Ordered:
    """The order of unequal devices in which the best split is fastest.

    Up to six devices every order is tried. With more, orders by speed, by what the links carry and at random are
    improved by exchanging two devices until no exchange helps. Orders are told apart by the split with equal work,
    the best of them by their best split.

    Args:
        context: tokens of the prompt.
        setting: of the devices; ``speeds`` in order of devices. Its links count where ``links`` is None.
        links: from each device to each other one.

    Raises:
        PartitionError: no speeds, a context too short, or a table of links that does not fit.
    """
    devices = len(setting.speeds)
    if not devices:
        raise PartitionError("an order needs devices that differ: give the setting their speeds")
    if links is not None and (len(links) != devices or any(len(row) != devices for row in links)):
        raise PartitionError(f"links between {devices} devices are a table of {devices} rows and columns")
    if links is None and not isinstance(setting.link, LinkCost):
        raise PartitionError("links that differ must be told from each device to each other: give links=")

    def told(order: tuple[int, ...]) -> Setting:
        hops = setting.link
        if links is not None:
            hops = tuple(links[before][after] for before, after in itertools.pairwise(order))
        return replace(setting, speeds=tuple(setting.speeds[device] for device in order), link=hops)

    known: dict[tuple[int, ...], float] = {}

    def roughly(order: tuple[int, ...]) -> float:
        if order not in known:
            one = told(order)
            split = balanced(one.cost, context, devices, past=one.past, speeds=one.speeds)
            known[order] = float(ttft([split.sizes], one)[0])
        return known[order]

    pairs = list(itertools.combinations(range(devices), 2))
    if devices <= 6:
        for order in itertools.permutations(range(devices)):
            roughly(order)
    else:
        by_speed = tuple(sorted(range(devices), key=lambda device: setting.speeds[device]))
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
        split = best_split(context, devices, told(order), quantum=quantum)
        found.append(Ordered(order, split, simulate(split, told(order)).ttft_s))
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


def _ttft_of_boundaries(boundaries: Array, context: int, setting: Setting) -> Array:
    import numpy as np

    edges = np.concatenate(
        [np.zeros((len(boundaries), 1)), boundaries, np.full((len(boundaries), 1), float(context))], axis=1
    )
    sizes = np.diff(edges, axis=1)
    times = ttft(np.maximum(sizes, 1.0), setting)
    times[(sizes < 1.0).any(axis=1)] = np.inf
    return times


def _check(setting: Setting, ranks: int) -> None:
    if setting.speeds and len(setting.speeds) != ranks:
        raise PartitionError(f"{len(setting.speeds)} speeds do not fit {ranks} ranks")
    if not isinstance(setting.link, LinkCost) and len(setting.link) != ranks - 1:
        raise PartitionError(
            f"{len(setting.link)} links do not join {ranks} ranks; give {ranks - 1}, or one for all"
        )


def _chunks(cost: ChunkCost, seconds: float, pace: Sequence[float], past: int) -> list[float]:
    """The longest chunk each rank can compute in that time, one after the other."""
    chunks: list[float] = []
    start = float(past)
    for speed in pace:
        chunks.append(cost.chunk_for(seconds * speed, start))
        start += chunks[-1]
    return chunks
