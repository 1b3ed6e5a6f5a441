"""Links over a ``torch.distributed`` process group: posted ahead, received in place, never holding up compute.

All messages of a prefill carry its number, so that none is ever taken for one of another prefill.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from kvr_partition.partition import Partition
from kvr_partition.runtime.agreement import LINK_CTAS, Turn, agreement_of, made_for_links, timeout_s
from kvr_partition.runtime.links import (
    NO_LIMITS,
    Hop,
    LinkLimits,
    Links,
    NoLinks,
    Slot,
    Topology,
    receives,
    sends,
)


@dataclass(eq=False)
class _GroupLinks:
    """What both kinds share: the plan of a prefill and the messages that carry it out."""

    partition: Partition
    rank: int
    topology: Topology
    limits: LinkLimits
    group: Any
    turn: Turn
    sent_bytes: int = field(init=False, default=0)
    _slots: Sequence[Slot] = field(init=False, default=())
    _receives: list[list[Hop]] = field(init=False, default_factory=list)
    _sends: list[dict[int, list[Hop]]] = field(init=False, default_factory=list)
    _foreign: torch.Tensor | None = field(init=False, default=None)

    def _plan(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._receives = [receives(self.partition, self.rank, slot.window, self.topology) for slot in slots]
        self._sends = [sends(self.partition, self.rank, slot.window, self.topology) for slot in slots]
        if self.limits.noise:
            self._foreign = torch.zeros(self.limits.noise, dtype=torch.uint8, device=slots[0].rows.device)

    def _tag(self, layer: int, chunk: int) -> int:
        of_one = len(self._slots) * (self.partition.ranks + 1)
        # Tags are 31 bits wide; by the time they come round again, nothing of the first prefill is left.
        return self.turn.number % (_TAGS // of_one) * of_one + layer * (self.partition.ranks + 1) + chunk

    def _isend(self, layer: int, hop: Hop) -> Any:
        rows = self._slots[layer].at(hop.piece)
        self.sent_bytes += rows.nbytes
        return self.group.send([rows], hop.peer, self._tag(layer, hop.piece.chunk))

    def _irecv(self, layer: int, hop: Hop) -> Any:
        rows = self._slots[layer].at(hop.piece)
        return self.group.recv([rows], hop.peer, self._tag(layer, hop.piece.chunk))

    def _noisy(self, layer: int) -> int | None:
        return self.limits.noisy_link(layer, self.partition.ranks)

    def _isend_foreign(self, layer: int) -> Any:
        assert self._foreign is not None
        tag = self._tag(layer, self.partition.ranks)
        return self.group.send([self._foreign], self.rank + 1, tag)

    def _irecv_foreign(self, layer: int) -> Any:
        assert self._foreign is not None
        tag = self._tag(layer, self.partition.ranks)
        # What arrives is never read; a buffer of its own keeps it from what this rank may be sending.
        into = torch.empty_like(self._foreign)
        return self.group.recv([into], self.rank - 1, tag)


_TAGS = 2**31 - 1


@dataclass(eq=False)
class HostLinks(_GroupLinks):
    """Links over a process group that works on host memory (gloo).

    One thread for each rank that sends here waits for arrivals in order, and one for each rank that is
    sent to writes, so the compute thread does neither. A chunk is forwarded the moment it has arrived,
    before the rest of the prefix has: the chain costs one hop of latency per rank, not one whole prefix.
    """

    _missing: list[int] = field(init=False, default_factory=list)
    _change: threading.Condition = field(init=False)
    _outboxes: dict[int, queue.SimpleQueue[tuple[int, Hop | None] | None]] = field(
        init=False, default_factory=dict
    )
    _receiving: int = field(init=False, default=0)
    _sending: int = field(init=False, default=0)
    _transfer_s: list[float] = field(init=False, default_factory=list)
    _error: tuple[int, BaseException] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._change = self.turn.change

    def start(self, slots: Sequence[Slot]) -> None:
        self._plan(slots)
        self._transfer_s = [0.0] * len(slots)
        self._missing = [len(hops) for hops in self._receives]
        arrivals: dict[int, list[tuple[int, Hop | None, dist.Work]]] = {}
        for layer, hops in enumerate(self._receives):
            if self._noisy(layer) == self.rank - 1:
                arrivals.setdefault(self.rank - 1, []).append((layer, None, self._irecv_foreign(layer)))
            for hop in hops:
                arrivals.setdefault(hop.peer, []).append((layer, hop, self._irecv(layer, hop)))
        peers = {hop.peer for by_chunk in self._sends for hops in by_chunk.values() for hop in hops}
        if any(self._noisy(layer) == self.rank for layer in range(len(slots))):
            peers.add(self.rank + 1)
        self._outboxes = {peer: queue.SimpleQueue() for peer in sorted(peers)}
        self._receiving, self._sending = len(arrivals), len(peers)
        for peer in peers:
            self._spawn(f"send{peer}", peer, partial(self._send_to, peer))
        for peer, works in arrivals.items():
            self._spawn(f"receive{peer}", peer, partial(self._receive, works))

    def own_ready(self, layer: int) -> None:
        if self._noisy(layer) == self.rank:
            self._outboxes[self.rank + 1].put((layer, None))
        self._send_on(layer, self.rank)

    def wait_prefix(self, layer: int) -> None:
        self._wait_until(lambda: self._missing[layer] <= 0, self.rank - 1)

    def finish(self) -> list[float]:
        # Once everything has arrived, everything that is to be forwarded is queued.
        self._wait_until(lambda: self._receiving == 0, self.rank - 1)
        self.abort()
        self._wait_until(lambda: self._sending == 0, self.rank + 1)
        return self._transfer_s

    def abort(self) -> None:
        for outbox in self._outboxes.values():
            outbox.put(None)

    def _wait_until(self, done: Callable[[], bool], peer: int) -> None:
        """Wait for the threads of the links, as long as no rank has failed."""
        with self._change:
            if not done():
                self.turn.wait_for(peer)
                self._change.wait_for(lambda: done() or self._error is not None or self.turn.failure is not None)
            if done() and self._error is None:
                self.turn.wait_for(None)
                return
            failure, broken = self.turn.failure, self._error
        if failure is not None:
            raise failure
        assert broken is not None
        peer, error = broken
        raise self.turn.explain(peer, error) from error

    def _spawn(self, name: str, peer: int, target: Callable[[], None]) -> None:
        thread = threading.Thread(
            target=self._guard, args=(peer, target), name=f"kvr-rank{self.rank}-{name}", daemon=True
        )
        self.turn.threads.append(thread)
        thread.start()

    def _guard(self, peer: int, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:  # handed to the compute thread, which raises it
            with self._change:
                self._error = self._error or (peer, error)
                self._change.notify_all()

    def _ended(self, receiving: int = 0, sending: int = 0) -> None:
        with self._change:
            self._receiving -= receiving
            self._sending -= sending
            self._change.notify_all()

    def _receive(self, works: list[tuple[int, Hop | None, dist.Work]]) -> None:
        for layer, hop, work in works:
            work.wait()
            if hop is None:
                continue
            self._send_on(layer, hop.piece.chunk)
            with self._change:
                self._missing[layer] -= 1
                self._change.notify_all()
        self._ended(receiving=1)

    def _send_on(self, layer: int, chunk: int) -> None:
        for hop in self._sends[layer].get(chunk, ()):
            self._outboxes[hop.peer].put((layer, hop))

    def _send_to(self, peer: int) -> None:
        free_at = 0.0
        while (job := self._outboxes[peer].get()) is not None:
            layer, hop = job
            began = time.perf_counter()
            size = self.limits.noise if hop is None else self._slots[layer].at(hop.piece).nbytes
            free_at = max(free_at, began) + self.limits.held_s(size)
            while (left := free_at - time.perf_counter()) > 0:
                time.sleep(left)
            if hop is None:
                self._isend_foreign(layer).wait()
            else:
                self._isend(layer, hop).wait()
                self._transfer_s[layer] += time.perf_counter() - began
        self._ended(sending=1)


@dataclass(eq=False)
class StreamLinks(_GroupLinks):
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


def link_group(ranks: Sequence[int] | None = None) -> dist.ProcessGroup | None:
    """A process group made for the links of a prefill, to be given to `prefill`.

    NCCL takes as many SMs for a transfer as make it the fastest. A prefill has a whole layer's time for each one,
    and needs the SMs. All ranks of the world call this, once.

    Args:
        ranks: of the world, those that prefill together; all when None.
    """
    backend, options = None, None
    timeout = timedelta(seconds=timeout_s(dist.group.WORLD))
    if "nccl" in dist.get_backend_config():
        backend, options = "nccl", dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = LINK_CTAS
        # Torch ends the process at its time-out; by then this rank has told who it waited for.
        timeout = 2 * timeout + timedelta(seconds=10)
    group: dist.ProcessGroup | None = dist.new_group(ranks, timeout=timeout, backend=backend, pg_options=options)
    if isinstance(group, dist.ProcessGroup):
        made_for_links.add(group)
        agreement_of(group)  # ranks meet here, not on the clock of the first prompt
    return group


def group_links(
    partition: Partition,
    rank: int,
    device: torch.device,
    *,
    turn: Turn,
    topology: Topology = "chain",
    limits: LinkLimits = NO_LIMITS,
) -> Links:
    """The links of one rank in one turn of its group, whichever its device needs."""
    if turn.of is None:
        return NoLinks()
    kind = StreamLinks if device.type == "cuda" else HostLinks
    # In a chain neighbours talk to each other, in a fan-out all do.
    near = 1 if topology == "chain" else partition.ranks
    peers = [peer for peer in range(partition.ranks) if 0 < abs(peer - rank) <= near]
    return kind(partition, rank, topology, limits, turn.of.links(device, peers), turn)
