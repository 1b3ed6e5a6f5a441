"""What a rank of SMs does in a prefill, recorded as CUDA graphs that are cut wherever it meets a link."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kvr_partition.errors import KVRError
from kvr_partition.partition import Partition
from kvr_partition.runtime.gather import Runs
from kvr_partition.runtime.links.plan import Hop, Slot, Topology, receives, sends
from kvr_partition.runtime.result import PrefillResult


@dataclass(frozen=True, slots=True)
class Step:
    """One thing a rank does in a replay."""

    kind: Literal["graph", "stamp", "own", "wait", "gather"]
    layer: int = 0
    graph: Any = None


class Recorder:
    """Records what one rank enqueues on its stream: graphs, and the steps between them."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self.steps: list[Step] = []
        self._stream = stream
        self._pool = pool
        self._graph: Any = None

    def begin(self) -> None:
        """Start a graph."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graph = graph

    def end(self) -> None:
        """End the graph, and keep it if there is anything in it."""
        graph, self._graph = self._graph, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a graph is empty is no news here
            graph.capture_end()
        if _nodes(graph):
            graph.instantiate()
            self.steps.append(Step("graph", graph=graph))

    def abandon(self) -> None:
        """Leave capture mode after an error."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with contextlib.suppress(RuntimeError):  # the error that led here is the one to tell
                graph.capture_end()

    def cut(self, step: Step) -> None:
        """Put a step between two graphs."""
        self.end()
        self.steps.append(step)
        self.begin()


def _nodes(graph: Any) -> int:
    from cuda.bindings import driver

    error, _, count = driver.cuGraphGetNodes(driver.CUgraph(graph.raw_cuda_graph()), 0)
    if int(error) != 0:
        raise KVRError(f"a recorded graph cannot be read: {error.name}")
    return int(count)


class RecordedClock:
    """Stamps become steps; their times are those of the latest replay."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._taken = 0
        self.events: list[torch.cuda.Event] = []

    def stamp(self) -> int:
        self._recorder.cut(Step("stamp"))
        self._taken += 1
        return self._taken - 1

    def seconds(self) -> list[float]:
        return [self.events[0].elapsed_time(event) / 1e3 for event in self.events]


class RecordedLinks:
    """Meetings with links become steps."""

    def __init__(self, recorder: Recorder) -> None:
        self.sent_bytes = 0
        self.slots: Sequence[Slot] = ()
        self.transfer_s: list[float] = []
        self._recorder = recorder

    def start(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.transfer_s = [0.0] * len(slots)

    def kv_ready(self, layer: int) -> None:
        self._recorder.cut(Step("own", layer))

    def wait_prefix(self, layer: int) -> None:
        self._recorder.cut(Step("wait", layer))

    def finish(self) -> list[float]:
        return self.transfer_s

    def abort(self) -> None:
        pass


class RecordedGather:
    """Meetings for an all-gather become steps."""

    def __init__(self, recorder: Recorder | None, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self.sent_bytes = 0
        self.rows: list[torch.Tensor] = []
        self.owned: list[Sequence[Runs]] = []
        self._recorder = recorder

    def gather(self, layer: int, rows: torch.Tensor, owned: Sequence[Runs]) -> None:
        own = sum(end - start for start, end in owned[self.rank])
        self.sent_bytes += own * rows[0].nbytes * (self.ranks - 1)
        self.rows.append(rows)
        self.owned.append(owned)
        if self._recorder is not None:
            self._recorder.cut(Step("gather", layer))


@dataclass
class RecordedRank:
    """One rank of a recorded prefill."""

    steps: list[Step]
    result: PrefillResult
    clock: RecordedClock
    links: RecordedLinks | None
    gather: RecordedGather | None


@dataclass
class Recording:
    """A recorded prefill: all ranks of one method on one split."""

    method: str
    partition: Partition
    ranks: list[RecordedRank]
    topology: Topology
    input_ids: torch.Tensor
    """Read by the graphs; they do not keep what they read."""
    host_token: torch.Tensor
    _hops: dict[tuple[int, int | None], tuple[list[Hop], dict[int, list[Hop]]]] = field(default_factory=dict)

    def receives(self, rank: int, window: int | None) -> list[Hop]:
        """`links.receives` of this prefill."""
        return self._plan(rank, window)[0]

    def sends(self, rank: int, window: int | None) -> dict[int, list[Hop]]:
        """`links.sends` of this prefill."""
        return self._plan(rank, window)[1]

    def _plan(self, rank: int, window: int | None) -> tuple[list[Hop], dict[int, list[Hop]]]:
        # Layers share their plans, and working one out takes as long as enqueueing it.
        if (rank, window) not in self._hops:
            self._hops[rank, window] = (
                receives(self.partition, rank, window, self.topology),
                sends(self.partition, rank, window, self.topology),
            )
        return self._hops[rank, window]


GATHERED_LAYERS = 2
"""Layers whose rows a rank of a gathering method keeps.

Each has the whole context, and eight ranks with all their layers do not fit into one GPU. When a rank has
gathered a layer, everyone has read what it had of the layer before, so the next one may take that place.
"""


@dataclass
class Arena:
    """KV rows of the recordings. They share the memory: no two of them are ever under way at once."""

    buffer: torch.Tensor
    _used: int = 0
    _ring: tuple[int, int] | None = None
    """Where the places of `GATHERED_LAYERS` begin, and how large one is."""
    _layer: int = 0

    def begin(self) -> None:
        """A recording begins: every row is free."""
        self._used, self._ring = 0, None

    def begin_gathering(self, place: int) -> None:
        """Rows from here on are of another rank that keeps `GATHERED_LAYERS` of at most so many bytes."""
        self._ring, self._layer = (self._used, place), 0
        self._used += GATHERED_LAYERS * place

    def empty(self, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = shape[0] * shape[1] * dtype.itemsize
        if self._ring is not None:
            first, place = self._ring
            start = first + self._layer % GATHERED_LAYERS * place
            self._layer += 1
        else:
            start = self._used
            self._used = start + aligned(size)
        if max(self._used, start + size) > self.buffer.numel():
            raise torch.OutOfMemoryError("the rows of this method do not fit in the memory set aside for them")
        return self.buffer[start : start + size].view(dtype).view(shape)


def aligned(size: int) -> int:
    return (size + 511) // 512 * 512
