"""Links that streams order: what is put where, and that no order in which devices get on with it goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvr_partition import Partition
from kvr_partition.errors import RankError
from kvr_partition.runtime.agreement import Turn
from kvr_partition.runtime.links.plan import NO_LIMITS, TOPOLOGIES, Hop, LinkLimits, Slot, Topology, visible_prefix
from kvr_partition.runtime.links.stream import StreamLinks

LAYERS = 3


@dataclass(eq=False)
class Stream:
    """What is put on it, in order; `World` gets on with it."""

    name: str
    work: list[tuple[str, Any]] = field(default_factory=list)
    done: int = 0

    def record_event(self) -> tuple[Stream, int]:
        return self, len(self.work)

    def wait_event(self, event: tuple[Stream, int]) -> None:
        self.work.append(("wait", event))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Timer:
    def record(self, stream: Stream) -> None:
        pass

    def elapsed_time(self, other: Timer) -> float:
        return 1.0


class Streams:
    def __init__(self, rank: int) -> None:
        self.compute = Stream(f"compute {rank}")
        self.sends: dict[int, Stream] = {}
        self.rank = rank

    def current(self, device: int | None = None) -> Stream:
        return self.compute

    def to(self, peer: int) -> Stream:
        return self.sends.setdefault(peer, Stream(f"{self.rank} to {peer}"))

    def timer(self) -> Timer:
        return Timer()

    def hold(self, stream: Stream, seconds: float) -> None:
        stream.work.append(("hold", seconds))


class Wire:
    def __init__(self, rank: int, peer: int) -> None:
        self.rank, self.peer = rank, peer

    def post(self, layer: int, hop: Hop, slot: Slot) -> Any:
        return self.rank, layer, hop.piece.chunk

    def wait(self, posted: Any, stream: Stream) -> None:
        stream.work.append(("has", posted))

    def send(self, layer: int, hop: Hop, rows: torch.Tensor, stream: Stream) -> None:
        stream.work.append(("send", (self.rank, self.peer, layer, hop.piece.chunk)))

    def post_background(self, layer: int, background: torch.Tensor) -> None:
        pass

    def send_background(self, layer: int, background: torch.Tensor, stream: Stream) -> None:
        stream.work.append(("background", layer))


class FakeTurn(Turn):
    def __init__(self) -> None:
        super().__init__(None)
        self.awaited: list[tuple[Stream, int]] = []

    def wait_for_device(self, event: Any, peer: int) -> None:
        self.awaited.append(event)


class World:
    """All ranks of a prefill, on devices that get on with their streams in any order."""

    def __init__(self, sizes: tuple[int, ...], topology: Topology, window: int | None, limits: LinkLimits) -> None:
        self.split = Partition(sizes)
        self.ranks = self.split.ranks
        self.streams = [Streams(rank) for rank in range(self.ranks)]
        self.links = []
        self.there: set[tuple[int, int, int]] = set()
        self.log: list[tuple[str, Any]] = []
        self.awaited: list[list[tuple[Stream, int]]] = []
        for rank in range(self.ranks):
            wires = {peer: Wire(rank, peer) for peer in range(self.ranks) if peer != rank}
            links = StreamLinks(
                self.split,
                rank,
                topology,
                limits,
                FakeTurn(),
                wires,
                self.streams[rank],  # type: ignore[arg-type]
            )
            start, end = self.split.starts[rank], self.split.ends[rank]
            first = start - visible_prefix(start, window)
            links.start([Slot(torch.zeros(end - first, 2), first, window)] * LAYERS)
            for layer in range(LAYERS):
                self.streams[rank].compute.work.append(("rows", (rank, layer, rank)))
                links.kv_ready(layer)
                if first < start:
                    links.wait_prefix(layer)
                self.streams[rank].compute.work.append(("layer", (rank, layer)))
            links.finish()
            self.links.append(links)
            self.awaited.append(links.turn.awaited)  # type: ignore[attr-defined]

    @property
    def all_streams(self) -> list[Stream]:
        return [one for each in self.streams for one in (each.compute, *each.sends.values())]

    def step(self, stream: Stream, stays: tuple[str, Any] | None = None) -> bool:
        """Get on with one piece of a stream's work, unless it has to wait."""
        if stream.done == len(stream.work):
            return False
        kind, what = stream.work[stream.done]
        if (kind, what) == stays:
            return False
        if kind == "wait" and what[0].done < what[1]:
            return False
        if kind == "has" and what not in self.there:
            return False
        if kind == "send":
            rank, peer, layer, chunk = what
            assert (rank, layer, chunk) in self.there, "sent before it was there"
            assert (peer, layer, chunk) not in self.there, "sent twice"
            self.there.add((peer, layer, chunk))
        if kind == "rows":
            self.there.add(what)
        self.log.append((kind, what))
        stream.done += 1
        return True

    def run(self, order: list[int], stays: tuple[str, Any] | None = None) -> None:
        """Get on in the given order, then with whatever can go on; ``stays`` is work that never ends."""
        for at in order:
            self.step(self.all_streams[at % len(self.all_streams)], stays)
        while any([self.step(stream, stays) for stream in self.all_streams]):  # noqa: C419 - a step for each
            pass


worlds = st.tuples(
    st.lists(st.integers(1, 20), min_size=2, max_size=5).map(tuple),
    st.sampled_from(TOPOLOGIES),
    st.none() | st.integers(2, 30),
    st.sampled_from([NO_LIMITS, LinkLimits(bandwidth=1e9, noise=8, seed=2)]),
)


@settings(deadline=None)
@given(worlds, st.lists(st.integers(0, 30), max_size=200))
def test_every_rank_gets_what_it_needs_whichever_device_is_ahead(world: Any, order: list[int]) -> None:
    made = World(*world)
    made.run(order)
    assert all(stream.done == len(stream.work) for stream in made.all_streams)
    ended = [what for kind, what in made.log if kind == "layer"]
    assert len(ended) == made.ranks * LAYERS


@given(worlds)
def test_a_peer_s_stream_carries_the_documented_order(world: Any) -> None:
    made = World(*world)
    for rank, streams in enumerate(made.streams):
        for stream in streams.sends.values():
            sent = [what[2:] for kind, what in stream.work if kind == "send"]
            # Layer by layer; of each the own chunk, then the nearest of the others.
            assert sent == sorted(sent, key=lambda one: (one[0], -one[1]))
            assert all(chunk <= rank for _, chunk in sent)
            for at, (kind, layer) in enumerate(stream.work):
                if kind == "background":
                    later = [what[2] for kind, what in stream.work[at:] if kind == "send"]
                    earlier = [what[2] for kind, what in stream.work[:at] if kind == "send"]
                    assert all(one >= layer for one in later)
                    assert all(one < layer for one in earlier)


@given(worlds)
def test_a_prefill_ends_when_all_rows_of_this_rank_have_come_and_gone(world: Any) -> None:
    made = World(*world)
    for streams, awaited in zip(made.streams, made.awaited, strict=True):
        until = dict(awaited)
        for stream in (streams.compute, *streams.sends.values()):
            last = max((at for at, (kind, _) in enumerate(stream.work) if kind in ("has", "send")), default=-1)
            assert until.get(stream, 0) > last


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_later_ranks_have_a_layer_s_kv_though_rank_0_never_ends_the_next_one(topology: Topology) -> None:
    made = World((8, 5, 4, 3), topology, None, NO_LIMITS)
    made.run([], stays=("rows", (0, 1, 0)))
    for rank in range(1, 4):
        assert ("layer", (rank, 0)) in made.log
        assert ("layer", (rank, 1)) not in made.log


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_link_that_stands_still_holds_up_those_behind_it_alone(topology: Topology) -> None:
    made = World((8, 5, 4), topology, None, NO_LIMITS)
    made.run([], stays=("send", (0, 1, 0, 0)))
    # What rank 1 computes itself gets to rank 2 all the same.
    assert (2, 0, 1) in made.there
    assert ((2, 0, 0) in made.there) == (topology == "fanout")


def test_a_rank_stops_at_the_next_layer_once_another_has_failed() -> None:
    class Failed(FakeTurn):
        failure = RankError("rank 1 ran out of memory", rank=1, kind="out-of-memory")  # type: ignore[assignment]

    links = StreamLinks(
        Partition((4, 4)),
        0,
        "chain",
        NO_LIMITS,
        Failed(),
        {1: Wire(0, 1)},
        Streams(0),  # type: ignore[arg-type]
    )
    links.start([Slot(torch.zeros(4, 2), 0, None)] * LAYERS)
    with pytest.raises(RankError, match="ran out of memory"):
        links.kv_ready(0)


def test_rows_are_sent_behind_the_stream_that_is_current_when_they_are_ready() -> None:
    split = Partition((2, 2))
    streams = Streams(0)
    first = streams.compute
    wires: Any = {1: Wire(0, 1)}
    links = StreamLinks(split, 0, "chain", LinkLimits(), FakeTurn(), wires, streams)  # type: ignore[arg-type]
    links.start([Slot(torch.zeros(2, 2), 0, None)] * 2)
    links.kv_ready(0)
    streams.compute = other = Stream("a layer's own")
    other.work.append(("rows", (0, 1, 0)))
    links.kv_ready(1)
    waits = [what for kind, what in streams.sends[1].work if kind == "wait"]
    assert [stream for stream, _ in waits] == [first, first, other]
    assert waits[-1] == (other, 1)
