"""Who waits for whom: what costs of chunks and links mean for the time to first token."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from kvr_partition.errors import PartitionError
from kvr_partition.machine.cost import LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.noise import noisy_link
from kvr_partition.partition import Partition
from kvr_partition.timeline import LayerTimes, RankTimeline

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Timeline:
    """One prefill as simulated: TTFT in seconds, and how each rank spends it."""

    ttft_s: float
    ranks: tuple[RankTimeline, ...]


def simulate(partition: Partition, machine: Machine) -> Timeline:
    """The timeline of a KV-Runahead prefill.

    Within a layer a rank computes until its KV is ready (``cost.kv_share`` of the work per token), hands it
    over, attends to its own block, waits for the prefix, and computes the rest. A link carries one message
    at a time: for each layer the rank's own chunk first, then what it forwards, nearest chunk first. What other
    programs do instead is in `Machine.forwards`.

    Raises:
        PartitionError: speeds or links for another number of ranks.
    """
    import numpy as np

    machine = msgspec.structs.replace(machine, past=partition.past)
    run = _played(np.array([partition.sizes], dtype=float), machine, keep=True)
    ranks = []
    for rank in range(partition.ranks):
        layers = [
            LayerTimes(run.computed[layer][rank], run.waited[layer][rank], run.sent[layer][rank])
            for layer in range(machine.layers)
        ]
        ranks.append(RankTimeline(tuple(layers), run.tails[rank]))
    return Timeline(float(run.finish()[0]), tuple(ranks))


def ttft(sizes: Any, machine: Machine) -> Array:
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
        parts.append(_played(table[low : low + _BATCH], machine).finish())
    return np.concatenate(parts) if parts else np.empty(0)


_BATCH = 2048
"""Partitions simulated together: enough to hide Python's part, few enough to stay in the cache."""


def contention(sizes: Any, machine: Machine) -> Array:
    """Factor on ranks' times, of many partitions, ``[n]``: 1 while all ranks are at work, less the more are idle.

    It falls linearly with the share of time that ranks are idle, to that of one rank alone.
    """
    import numpy as np

    table = np.asarray(sizes, dtype=float)
    if not _shared(machine, table):
        return np.ones(len(table))
    run = _Run(table, machine)
    run.play()
    return run.contention()


def _shared(machine: Machine, sizes: Array) -> bool:
    """Whether some of these ranks are faster while others are idle."""
    return machine.solo_speedup != 1 and sizes.shape[1] > 1


def _played(sizes: Array, machine: Machine, keep: bool = False) -> _Run:
    run = _Run(sizes, machine, keep, contention(sizes, machine) if _shared(machine, sizes) else None)
    run.play()
    return run


class _Run:
    """The schedule itself, for ``n`` partitions at once; times are arrays ``[n]``."""

    def __init__(
        self, sizes: Array, machine: Machine, keep: bool = False, contention: Array | None = None
    ) -> None:
        import numpy as np

        self.ranks = sizes.shape[1]
        check_ranks(machine, self.ranks)
        self.machine = machine
        self.keep = keep
        chunks = np.ascontiguousarray(sizes.T)
        starts = machine.past + np.cumsum(chunks, axis=0) - chunks
        cost, layers = machine.cost, machine.layers
        slow = np.array([machine.slowness(rank) for rank in range(self.ranks)])[:, None] / layers
        if contention is not None:
            slow = slow * contention
        work, own, prefix = (part * slow for part in cost.parts(chunks, starts, machine.dense))
        self.before_kv = work * cost.kv_share
        self.before_wait = own if machine.overlap else np.zeros_like(own)
        self.after_wait = work * (1 - cost.kv_share) + prefix + (0 if machine.overlap else own)
        self.bytes = chunks * machine.entry_bytes
        self.now = np.zeros_like(chunks)
        self.free: dict[tuple[int, int], Any] = {}
        self.computed: list[list[float]] = []
        self.waited: list[list[float]] = []
        self.sent: list[list[float]] = []
        self.tails: list[float] = []

    def play(self) -> None:
        """All layers, one after the other."""
        for layer in range(self.machine.layers):
            self._layer(layer)
        if self.keep:
            self.tails = [float(self.after_wait[rank][0]) for rank in range(self.ranks)]

    def finish(self) -> Array:
        """When the last rank is done."""
        result: Array = self.now[-1]
        return result

    def contention(self) -> Array:
        """See `contention`."""
        computed = self.machine.layers * (self.before_kv + self.before_wait + self.after_wait).sum(axis=0)
        idle = 1 - computed / (self.ranks * self.now.max(axis=0))
        # While slow links keep everybody waiting, more than all but one are idle.
        others: Array = (idle / (1 - 1 / self.ranks)).clip(0, 1)
        return 1 - others * (1 - 1 / self.machine.solo_speedup)

    def _layer(self, layer: int) -> None:
        import numpy as np

        machine = self.machine
        noisy = noisy_link(layer, self.ranks, machine.noise, machine.noise_seed)
        arrived: list[list[Any]] = [[None] * self.ranks for _ in range(self.ranks)]
        computed, waited, sent = [], [], [0.0] * self.ranks
        for rank in range(self.ranks):
            began = self.now[rank]
            ready = began + self.before_kv[rank]
            if noisy == rank:
                self._send(rank, rank + 1, float(machine.noise), ready)
            if machine.topology == "fanout":
                for target in range(rank + 1, self.ranks):
                    arrived[target][rank] = self._send(rank, target, self.bytes[rank], ready)
                    sent[rank] += self._held(rank, target, self.bytes[rank])
            elif rank + 1 < self.ranks and machine.forwards == "chunks":
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
            if rank + 1 < self.ranks and machine.forwards != "chunks" and machine.topology == "chain":
                resume = self._store_and_forward(rank, arrived, ready, resume)
                sent[rank] += self._held(rank, rank + 1, self.bytes[: rank + 1].sum(axis=0))
            if self.keep:
                # A layer counts from the end of the wait before it, like a measured timeline.
                tail = float(self.after_wait[rank][0]) if layer else 0.0
                computed.append(float(free[0] - began[0]) + tail)
                waited.append(float(resume[0] - free[0]))
            self.now[rank] = resume + self.after_wait[rank]
        self.computed.append(computed)
        self.waited.append(waited)
        self.sent.append(sent)

    def _store_and_forward(self, rank: int, arrived: list[list[Any]], ready: Any, resume: Any) -> Any:
        """Hand a layer's KV over in one message; when the rank computes again."""
        import numpy as np

        after, blocking = rank + 1, self.machine.forwards == "blocking"
        at = functools.reduce(np.maximum, arrived[rank][:rank], ready)
        if blocking:
            # Both come to it with their own block done, and neither goes on alone.
            at = np.maximum(resume, self.now[after] + self.before_kv[after] + self.before_wait[after])
        message = self._send(rank, after, self.bytes[:after].sum(axis=0), at)
        arrived[after][:after] = [message] * after
        return self.free[rank, after] if blocking else resume

    def _send(self, source: int, target: int, nbytes: Any, ready: Any) -> Any:
        """When a message has arrived; the link is busy until its last byte has left."""
        import numpy as np

        link = self.machine.link_between(source, target)
        start = ready if (source, target) not in self.free else np.maximum(self.free[source, target], ready)
        left = start + nbytes * link.seconds_per_byte
        self.free[source, target] = left
        return left + link.latency_s

    def _held(self, source: int, target: int, nbytes: Any) -> float:
        if not self.keep:
            return 0.0
        return float(nbytes[0]) * self.machine.link_between(source, target).seconds_per_byte


def check_ranks(machine: Machine, ranks: int) -> None:
    if machine.speeds and len(machine.speeds) != ranks:
        raise PartitionError(f"{len(machine.speeds)} speeds do not fit {ranks} ranks")
    if not isinstance(machine.link, LinkCost) and len(machine.link) != ranks - 1:
        raise PartitionError(
            f"{len(machine.link)} links do not join {ranks} ranks; give {ranks - 1}, or one for all"
        )
