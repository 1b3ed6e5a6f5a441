"""Links between CUDA devices: ordered by streams, so that the host waits for none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from kvr_partition.runtime.links.messages import PlannedLinks
from kvr_partition.runtime.links.plan import Hop, Slot


@dataclass(eq=False)
class StreamLinks(PlannedLinks):
    """Links over NCCL: sends and receives are ordered by streams and the host waits for none of them."""

    _receive_streams: dict[int, torch.cuda.Stream] = field(init=False, default_factory=dict)
    _send_streams: dict[int, torch.cuda.Stream] = field(init=False, default_factory=dict)
    _works: list[list[tuple[Hop, dist.Work]]] = field(init=False, default_factory=list)
    _foreign_works: list[dist.Work] = field(init=False, default_factory=list)
    _spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = field(init=False, default_factory=list)

    def start(self, slots: Sequence[Slot]) -> None:
        self._plan(slots)
        self._spans = [[] for _ in slots]
        for layer, hops in enumerate(self._receives):
            if self._noisy(layer) == self.rank - 1:
                with torch.cuda.stream(self._stream(self._receive_streams, self.rank - 1)):
                    self._foreign_works.append(self._irecv_foreign(layer))
            works = []
            for hop in hops:
                stream = self._stream(self._receive_streams, hop.peer)
                slots[layer].rows.record_stream(stream)
                with torch.cuda.stream(stream):
                    works.append((hop, self._irecv(layer, hop)))
            self._works.append(works)

    def own_ready(self, layer: int) -> None:
        ready = torch.cuda.current_stream().record_event()
        if self._noisy(layer) == self.rank:
            with torch.cuda.stream(self._stream(self._send_streams, self.rank + 1)):
                self._hold(self.limits.noise)
                self._isend_foreign(layer).wait()
        for hop in self._sends[layer].get(self.rank, ()):
            with torch.cuda.stream(self._stream(self._send_streams, hop.peer)):
                torch.cuda.current_stream().wait_event(ready)
                self._timed_send(layer, hop)
        for received, work in self._works[layer]:
            for hop in self._sends[layer].get(received.piece.chunk, ()):
                with torch.cuda.stream(self._stream(self._send_streams, hop.peer)):
                    work.wait()
                    self._timed_send(layer, hop)

    def wait_prefix(self, layer: int) -> None:
        for _, work in self._works[layer]:
            work.wait()

    def finish(self) -> list[float]:
        for peer, stream in self._send_streams.items():
            self.turn.wait_for_device(stream.record_event(), peer)
        return [sum(begin.elapsed_time(end) for begin, end in spans) / 1e3 for spans in self._spans]

    def abort(self) -> None:
        pass

    def _stream(self, streams: dict[int, torch.cuda.Stream], peer: int) -> torch.cuda.Stream:
        if peer not in streams:
            streams[peer] = torch.cuda.Stream()
            # The rows were allocated on the compute stream; nothing may be written to them before that.
            streams[peer].wait_stream(torch.cuda.current_stream())
        return streams[peer]

    def _timed_send(self, layer: int, hop: Hop) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._slots[layer].rows.record_stream(torch.cuda.current_stream())
        begin.record()
        self._hold(self._slots[layer].at(hop.piece).nbytes)
        self._isend(layer, hop).wait()
        end.record()
        self._spans[layer].append((begin, end))

    def _hold(self, nbytes: int) -> None:
        if self.limits.bandwidth is not None:
            from kvr_partition.runtime.triton_kernels import hold

            hold(self.limits.held_s(nbytes))
