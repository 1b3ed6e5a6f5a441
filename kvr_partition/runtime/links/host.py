"""Links over a process group that works on host memory: threads send and receive, compute does neither."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist

from kvr_partition.runtime.links.messages import Messages, PlannedLinks
from kvr_partition.runtime.links.plan import Hop, Slot


@dataclass(eq=False)
class HostLinks(PlannedLinks):
    """Links over a process group that works on host memory (gloo).

    One thread for each rank that sends here waits for arrivals in order, and one for each rank that is
    sent to writes, so the compute thread does neither. A link carries its messages in the order of the plan,
    as links between GPUs do and as `machine.schedule` has it: in each layer this rank's own chunk, then
    what it forwards, nearest chunk first. Each leaves as soon as it is here and those before it have left.
    """

    group: Any
    _messages: Messages = field(init=False)
    _missing: list[int] = field(init=False, default_factory=list)
    _change: threading.Condition = field(init=False)
    _here: set[tuple[int, int]] = field(init=False, default_factory=set)
    """Layers and chunks whose rows can be sent on."""
    _given_up: bool = field(init=False, default=False)
    _receiving: int = field(init=False, default=0)
    _sending: int = field(init=False, default=0)
    _transfer_s: list[float] = field(init=False, default_factory=list)
    _error: tuple[int, BaseException] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._change = self.turn.change

    def start(self, slots: Sequence[Slot]) -> None:
        self._plan(slots)
        self._messages = Messages(self.group, self.turn.number, len(slots), self.partition.ranks)
        self._transfer_s = [0.0] * len(slots)
        self._missing = [len(hops) for hops in self._receives]
        arrivals: dict[int, list[tuple[int, Hop | None, dist.Work]]] = {}
        for layer, hops in enumerate(self._receives):
            if self._noisy(layer) == self.rank - 1:
                assert self._background is not None
                work = self._messages.receive_background(layer, self.rank - 1, self._background)
                arrivals.setdefault(self.rank - 1, []).append((layer, None, work))
            for hop in hops:
                work = self._messages.receive(layer, hop, slots[layer].at(hop.piece))
                arrivals.setdefault(hop.peer, []).append((layer, hop, work))
        outgoing = self._outgoing()
        self._receiving, self._sending = len(arrivals), len(outgoing)
        for peer, messages in outgoing.items():
            self._spawn(f"send{peer}", peer, partial(self._send_to, peer, messages))
        for peer, works in arrivals.items():
            self._spawn(f"receive{peer}", peer, partial(self._receive, works))

    def kv_ready(self, layer: int) -> None:
        self._has(layer, self.rank)

    def wait_prefix(self, layer: int) -> None:
        self._wait_until(lambda: self._missing[layer] <= 0, self.rank - 1)

    def finish(self) -> list[float]:
        self._wait_until(lambda: self._receiving == 0, self.rank - 1)
        self._wait_until(lambda: self._sending == 0, self.rank + 1)
        return self._transfer_s

    def abort(self) -> None:
        with self._change:
            self._given_up = True
            self._change.notify_all()

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
            self._has(layer, hop.piece.chunk)
        self._ended(receiving=1)

    def _has(self, layer: int, chunk: int) -> None:
        with self._change:
            self._here.add((layer, chunk))
            if chunk != self.rank:
                self._missing[layer] -= 1
            self._change.notify_all()

    def _outgoing(self) -> dict[int, list[tuple[int, Hop | None]]]:
        """What is sent to each rank, in order; None stands for background traffic."""
        out: dict[int, list[tuple[int, Hop | None]]] = {}
        for layer, by_chunk in enumerate(self._sends):
            if self._noisy(layer) == self.rank:
                out.setdefault(self.rank + 1, []).append((layer, None))
            for chunk in range(self.rank, -1, -1):
                for hop in by_chunk.get(chunk, ()):
                    out.setdefault(hop.peer, []).append((layer, hop))
        return out

    def _may_send(self, wanted: tuple[int, int]) -> bool:
        return self._given_up or wanted in self._here

    def _send_to(self, peer: int, messages: list[tuple[int, Hop | None]]) -> None:
        free_at = 0.0
        for layer, hop in messages:
            # Background traffic goes ahead of the KV of its layer.
            wanted = layer, self.rank if hop is None else hop.piece.chunk
            with self._change:
                self._change.wait_for(partial(self._may_send, wanted))
                if self._given_up:
                    break
            began = time.perf_counter()
            size = self.limits.noise if hop is None else self._slots[layer].at(hop.piece).nbytes
            free_at = max(free_at, began) + self.limits.throttled_s(size)
            while (left := free_at - time.perf_counter()) > 0:
                time.sleep(left)
            if hop is None:
                assert self._background is not None
                self._messages.send_background(layer, peer, self._background).wait()
            else:
                self.sent_bytes += size
                self._messages.send(layer, hop, self._slots[layer].at(hop.piece)).wait()
                self._transfer_s[layer] += time.perf_counter() - began
        self._ended(sending=1)
