"""How KV travels between ranks: posted ahead, received in place, never holding up compute."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from kvr_partition.errors import RankError
from kvr_partition.partition import Partition


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive KV rows of one chunk that a rank needs.

    Attributes:
        chunk: whose tokens they are.
        start, end: absolute token positions.
    """

    chunk: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one layer keeps its KV on this rank.

    Attributes:
        rows: ``[visible tokens, entry]``, token-major: any run of tokens is one contiguous block.
        first: absolute position of row 0.
        window: tokens a query sees, itself included, or None when it sees all before it.
    """

    rows: torch.Tensor
    first: int
    window: int | None

    def at(self, piece: Piece) -> torch.Tensor:
        """The rows of a piece, in place."""
        return self.rows[piece.start - self.first : piece.end - self.first]


def visible_prefix(start: int, window: int | None) -> int:
    """Tokens before position ``start`` that any query from there on can see."""
    return start if window is None else min(start, window - 1)


def needed(partition: Partition, rank: int, window: int | None) -> list[Piece]:
    """The pieces of earlier chunks that a rank must receive, nearest chunk first.

    That is also the order on the wire: a rank's own chunk is ready before anything it forwards, and by
    induction every rank receives in this order, so one order fits links with and without message tags.
    """
    start = partition.starts[rank]
    first = start - visible_prefix(start, window)
    pieces = []
    for chunk in range(rank - 1, -1, -1):
        low, high = max(first, partition.starts[chunk]), partition.ends[chunk]
        if low < high:
            pieces.append(Piece(chunk, low, high))
    return pieces


class Links(Protocol):
    """Moves the KV of one prefill for one rank.

    Calls come in this order: `start` once, then for each layer `own_ready` and, where the rank has a
    prefix, `wait_prefix`; `finish` once.
    """

    sent_bytes: int

    def start(self, slots: Sequence[Slot]) -> None:
        """Post every receive of the prefill."""

    def own_ready(self, layer: int) -> None:
        """The rank's own rows of a layer are in place: send them on."""

    def wait_prefix(self, layer: int) -> None:
        """Return once what follows on this thread or stream may read the layer's prefix rows."""

    def finish(self) -> list[float]:
        """Wait until everything is sent; seconds each layer's sends were on the wire."""

    def abort(self) -> None:
        """Give up after an error on this rank: let go of helpers without waiting for anyone."""


class NoLinks:
    """A rank by itself: nothing is sent and the prefix counts as arrived."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self._layers = 0

    def start(self, slots: Sequence[Slot]) -> None:
        self._layers = len(slots)

    def own_ready(self, layer: int) -> None:
        pass

    def wait_prefix(self, layer: int) -> None:
        pass

    def finish(self) -> list[float]:
        return [0.0] * self._layers

    def abort(self) -> None:
        pass


class _Chain:
    """What both chains share: who sends which rows to whom."""

    def __init__(self, partition: Partition, rank: int, group: dist.ProcessGroup | None) -> None:
        self.sent_bytes = 0
        self._partition = partition
        self._rank = rank
        self._group = group
        self._slots: Sequence[Slot] = ()
        self._receives: list[list[Piece]] = []
        self._sends: list[dict[int, Piece]] = []

    def _plan(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._receives = [needed(self._partition, self._rank, slot.window) for slot in slots]
        if self._rank + 1 < self._partition.ranks:
            self._sends = [
                {piece.chunk: piece for piece in needed(self._partition, self._rank + 1, slot.window)}
                for slot in slots
            ]
        else:
            self._sends = [{} for _ in slots]

    def _tag(self, layer: int, chunk: int) -> int:
        return layer * self._partition.ranks + chunk

    def _isend(self, layer: int, piece: Piece) -> dist.Work:
        rows = self._slots[layer].at(piece)
        self.sent_bytes += rows.numel() * rows.element_size()
        work = dist.isend(rows, group=self._group, group_dst=self._rank + 1, tag=self._tag(layer, piece.chunk))
        assert work is not None
        return work

    def _irecv(self, layer: int, piece: Piece) -> dist.Work:
        rows = self._slots[layer].at(piece)
        work = dist.irecv(rows, group=self._group, group_src=self._rank - 1, tag=self._tag(layer, piece.chunk))
        assert work is not None
        return work


class HostChain(_Chain):
    """Chain over a process group that works on host memory (gloo).

    A receiver thread waits for arrivals in order and a sender thread writes to the next rank, so the
    compute thread does neither. A chunk is forwarded the moment it has arrived, before the rest of the
    prefix has: the chain costs one hop of latency per rank, not one whole prefix.
    """

    def __init__(self, partition: Partition, rank: int, group: dist.ProcessGroup | None) -> None:
        super().__init__(partition, rank, group)
        self._arrived: list[threading.Event] = []
        self._outbox: queue.SimpleQueue[tuple[int, Piece] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._transfer_s: list[float] = []
        self._error: BaseException | None = None

    def start(self, slots: Sequence[Slot]) -> None:
        self._plan(slots)
        self._transfer_s = [0.0] * len(slots)
        self._arrived = [threading.Event() for _ in slots]
        works = [[self._irecv(layer, piece) for piece in pieces] for layer, pieces in enumerate(self._receives)]
        if any(works):
            self._spawn("receive", self._receive_all, works)
        if any(self._sends):
            self._spawn("send", self._send_all)

    def own_ready(self, layer: int) -> None:
        piece = self._sends[layer].get(self._rank)
        if piece is not None:
            self._outbox.put((layer, piece))

    def wait_prefix(self, layer: int) -> None:
        if self._receives[layer]:
            self._arrived[layer].wait()
        self._raise_error()

    def finish(self) -> list[float]:
        # The receiver is done when the last layer's prefix arrived; everything it forwards is then queued.
        for thread in self._threads:
            if thread.name.endswith("receive"):
                thread.join()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._raise_error()
        return self._transfer_s

    def abort(self) -> None:
        self._outbox.put(None)

    def _spawn(self, name: str, target: object, *args: object) -> None:
        assert callable(target)
        thread = threading.Thread(
            target=self._guard, args=(target, *args), name=f"kvr-rank{self._rank}-{name}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _guard(self, target: object, *args: object) -> None:
        assert callable(target)
        try:
            target(*args)
        except BaseException as error:  # handed to the compute thread, which raises it
            self._error = self._error or error
            for event in self._arrived:
                event.set()

    def _receive_all(self, works: list[list[dist.Work]]) -> None:
        for layer, (pieces, layer_works) in enumerate(zip(self._receives, works, strict=True)):
            for piece, work in zip(pieces, layer_works, strict=True):
                work.wait()
                onward = self._sends[layer].get(piece.chunk)
                if onward is not None:
                    self._outbox.put((layer, onward))
            self._arrived[layer].set()

    def _send_all(self) -> None:
        while (job := self._outbox.get()) is not None:
            layer, piece = job
            began = time.perf_counter()
            self._isend(layer, piece).wait()
            self._transfer_s[layer] += time.perf_counter() - began

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RankError(
                f"rank {self._rank} lost its link: {self._error}", rank=self._rank, kind="lost"
            ) from self._error


class StreamChain(_Chain):
    """Chain over NCCL: sends and receives are ordered by streams and the host waits for none of them."""

    def __init__(self, partition: Partition, rank: int, group: dist.ProcessGroup | None) -> None:
        super().__init__(partition, rank, group)
        self._receive_stream = torch.cuda.Stream()
        self._send_stream = torch.cuda.Stream()
        self._works: list[list[dist.Work]] = []
        self._spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []

    def start(self, slots: Sequence[Slot]) -> None:
        self._plan(slots)
        self._spans = [[] for _ in slots]
        # The rows were allocated on the compute stream; nothing may be written to them before that.
        self._receive_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._receive_stream):
            self._works = [
                [self._irecv(layer, piece) for piece in pieces] for layer, pieces in enumerate(self._receives)
            ]
        for slot in slots:
            slot.rows.record_stream(self._receive_stream)
            slot.rows.record_stream(self._send_stream)

    def own_ready(self, layer: int) -> None:
        sends = self._sends[layer]
        if not sends:
            return
        self._send_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._send_stream):
            if self._rank in sends:
                self._timed_send(layer, sends[self._rank])
            for piece, work in zip(self._receives[layer], self._works[layer], strict=True):
                onward = sends.get(piece.chunk)
                if onward is not None:
                    work.wait()
                    self._timed_send(layer, onward)

    def wait_prefix(self, layer: int) -> None:
        for work in self._works[layer]:
            work.wait()

    def finish(self) -> list[float]:
        self._send_stream.synchronize()
        return [sum(begin.elapsed_time(end) for begin, end in spans) / 1e3 for spans in self._spans]

    def abort(self) -> None:
        pass

    def _timed_send(self, layer: int, piece: Piece) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._isend(layer, piece).wait()
        end.record()
        self._spans[layer].append((begin, end))


def chain(partition: Partition, rank: int, device: torch.device, group: dist.ProcessGroup | None = None) -> Links:
    """The chain of the paper for one rank: each rank hands everything it sees to the next one."""
    if partition.ranks == 1:
        return NoLinks()
    if device.type == "cuda":
        return StreamChain(partition, rank, group)
    return HostChain(partition, rank, group)
