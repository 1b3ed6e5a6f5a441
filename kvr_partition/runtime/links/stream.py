"""Links between CUDA devices: ordered by streams, so that the host waits for none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kvr_partition.runtime.links.messages import PlannedLinks
from kvr_partition.runtime.links.plan import Hop, Slot


class Wire(Protocol):
    """What carries rows to or from one other rank, in the order of streams.

    A stream is a ``torch.cuda.Stream``. What `send` puts on it has left once the stream comes to what follows.
    """

    def post(self, layer: int, hop: Hop, slot: Slot) -> Any:
        """Have rows received in their place in a slot; returns what `wait` takes."""

    def wait(self, posted: Any, stream: Any) -> None:
        """Have a stream wait for rows."""

    def send(self, layer: int, hop: Hop, rows: torch.Tensor, stream: Any) -> None:
        """Send rows on a stream."""

    def post_background(self, layer: int, background: torch.Tensor) -> None:
        """Have background traffic received, as large as ``background``, which nobody reads."""

    def send_background(self, layer: int, background: torch.Tensor, stream: Any) -> None:
        """Send background traffic on a stream."""


class Watch(Protocol):
    """Looks after the waits of one prefill, and ends those that nobody will fulfil."""

    def begin(self, receives: Sequence[Sequence[Hop]]) -> None:
        """The prefill is about to begin on the current stream."""

    def waits(self, layer: int, before: Any, after: Any) -> None:
        """The model's stream waits for a layer's rows between two events."""

    def end(self) -> None:
        """The prefill is over.

        Raises:
            RankError: waits were ended, so that what was read counts for nothing.
        """


class Streams:
    """Where links put their work on the current CUDA device: a stream to each peer, kept for all prefills."""

    def __init__(self) -> None:
        self._to: dict[int, Any] = {}

    def current(self, device: int | None = None) -> Any:
        """The stream of the model's own work, on the current device when None, which takes longer to find out."""
        return torch.cuda.current_stream(device)

    def to(self, peer: int) -> Any:
        """The stream of what is sent to a peer."""
        if peer not in self._to:
            self._to[peer] = torch.cuda.Stream()
        return self._to[peer]

    def timer(self) -> Any:
        """An event that knows its time."""
        return torch.cuda.Event(enable_timing=True)

    def hold(self, stream: Any, seconds: float) -> None:
        """Keep a stream busy for so long."""
        from kvr_partition.runtime.triton_kernels import hold

        with torch.cuda.stream(stream):
            hold(seconds)


@dataclass(eq=False)
class StreamLinks(PlannedLinks):
    """Sends and receives that are ordered by streams, whatever carries them.

    Each peer has a stream of its own. What goes to it is put there in the order of `plan`: background traffic, the
    rank's own chunk, then what it forwards, nearest chunk first. A message waits for those ahead of it to the same
    peer, and for no other.
    """

    wires: Mapping[int, Wire]
    streams: Streams
    watch: Watch | None = None
    _posted: list[list[tuple[Hop, Any]]] = field(init=False, default_factory=list)
    _used: dict[int, Any] = field(init=False, default_factory=dict)
    _arrived: Any = field(init=False, default=None)
    _device: int | None = field(init=False, default=None)
    _spans: list[list[tuple[Any, Any]]] = field(init=False, default_factory=list)

    def start(self, slots: Sequence[Slot]) -> None:
        self._plan(slots)
        self._spans = [[] for _ in slots]
        self._device = slots[0].rows.device.index if slots else None
        compute = self.streams.current(self._device)
        if self.watch is not None:
            self.watch.begin(self._receives)
        peers = {hop.peer for by_chunk in self._sends for hops in by_chunk.values() for hop in hops}
        if any(self._noisy(layer) == self.rank for layer in range(len(slots))):
            peers.add(self.rank + 1)
        for peer in sorted(peers):
            # Nothing may be sent before what is under way on the rows now.
            self._used[peer] = self.streams.to(peer)
            self._used[peer].wait_stream(compute)
        for layer, hops in enumerate(self._receives):
            if self._noisy(layer) == self.rank - 1:
                assert self._background is not None
                self.wires[self.rank - 1].post_background(layer, self._background)
            self._posted.append([(hop, self.wires[hop.peer].post(layer, hop, slots[layer])) for hop in hops])

    def kv_ready(self, layer: int) -> None:
        self._check()
        if self._noisy(layer) == self.rank:
            assert self._background is not None
            stream = self._used[self.rank + 1]
            self._hold(stream, self.limits.noise)
            self.wires[self.rank + 1].send_background(layer, self._background, stream)
        sends = self._sends[layer]
        own = sends.get(self.rank, ())
        if own:
            # Asked for each time: a model may run some layers on a stream of its own.
            ready = self.streams.current(self._device).record_event()
            for hop in own:
                self._used[hop.peer].wait_event(ready)
                self._send(layer, hop)
        for received, posted in self._posted[layer]:
            for hop in sends.get(received.piece.chunk, ()):
                self.wires[received.peer].wait(posted, self._used[hop.peer])
                self._send(layer, hop)

    def wait_prefix(self, layer: int) -> None:
        self._check()
        compute = self.streams.current(self._device)
        before = compute.record_event()
        for hop, posted in self._posted[layer]:
            self.wires[hop.peer].wait(posted, compute)
        self._arrived = compute.record_event()
        if self.watch is not None:
            self.watch.waits(layer, before, self._arrived)

    def finish(self) -> list[float]:
        if self._arrived is not None:
            # Until then rows may be on their way here, or never come.
            self.turn.wait_for_device(self._arrived, self.rank - 1)
        for peer, stream in self._used.items():
            self.turn.wait_for_device(stream.record_event(), peer)
        if self.watch is not None:
            self.watch.end()
        return [sum(begin.elapsed_time(end) for begin, end in spans) / 1e3 for spans in self._spans]

    def abort(self) -> None:
        pass

    def _check(self) -> None:
        if self.turn.failure is not None:
            raise self.turn.failed()

    def _send(self, layer: int, hop: Hop) -> None:
        stream, rows = self._used[hop.peer], self._slots[layer].at(hop.piece)
        begin, end = self.streams.timer(), self.streams.timer()
        begin.record(stream)
        self._hold(stream, rows.nbytes)
        self.wires[hop.peer].send(layer, hop, rows, stream)
        end.record(stream)
        self._spans[layer].append((begin, end))
        self.sent_bytes += rows.nbytes

    def _hold(self, stream: Any, nbytes: int) -> None:
        if self.limits.bandwidth is not None:
            self.streams.hold(stream, self.limits.throttled_s(nbytes))
