"""Who a rank's streams wait for, and the end of that wait when the other one is gone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvr_partition.errors import RankError
from kvr_partition.runtime.agreement import Turn
from kvr_partition.runtime.channel import Doing
from kvr_partition.runtime.links.plan import Hop

if TYPE_CHECKING:
    from kvr_partition.runtime.links.peer import Peers

_LONG_S = 0.2
"""Seconds from which a wait is worth telling ranks that ask."""


@dataclass(eq=False)
class PeerWatch:
    """The waits of one prefill on one rank.

    Attributes:
        stream: that of the model's work.
        begun: an event, recorded when this prefill's number stands in this rank's page of flags.
        released: whether waits were ended that nobody had fulfilled.
    """

    peers: Peers
    turn: Turn
    chunks: int
    stream: Any = None
    begun: Any = None
    released: bool = False
    ended_in: str | None = None
    """The layer whose wait was ended, in words."""
    _receives: Sequence[Sequence[Hop]] = ()
    _waits: list[tuple[int, str, Any, Any]] = field(default_factory=list)
    _next: int = 0
    _since: tuple[int, float] | None = None

    def begin(self, receives: Sequence[Sequence[Hop]]) -> None:
        """The prefill is about to begin on the current stream."""
        self._receives = receives
        self.peers.begin(self)
        self.turn.waits_in = self.waits_in

    def waits(self, layer: int, before: Any, after: Any) -> None:
        """The model's stream waits for a layer's rows between two events."""
        self._waits.append((layer, self.turn.phase, before, after))

    def end(self) -> None:
        """The prefill is over; see `Watch.end`."""
        self.peers.end(self)

    def look(self) -> RankError | None:
        """Why this prefill cannot come to its end: a rank died, or does not send what is waited for."""
        channel = self.turn.of.channel if self.turn.of is not None else None
        if channel is None:
            return None
        at = self._waiting()
        # One that left with a goodbye has done its part.
        died = [rank for rank in channel.gone if not channel.has_left(rank)]
        if died:
            return channel.lost(min(died), self.turn.phase if at is None else self._where(at)[0])
        if at is None:
            self._since = None
            return None
        now = time.monotonic()
        if self._since is None or self._since[0] != at:
            self._since = (at, now)
        waited = now - self._since[1]
        if waited > _LONG_S:
            where, peer = self._where(at)
            if peer is None:
                self._since = None
                return None
            if waited > channel.timeout_s:
                return channel.culprit([peer], where, channel.timeout_s)
            channel.doing = Doing(f"in {where}", peer)
        return None

    def waits_in(self) -> str | None:
        """The layer in which the device waits for KV, or did until that was ended; None while it does not wait."""
        if self.released:
            return self.ended_in
        at = self._waiting()
        return None if at is None else self._where(at)[0]

    def _waiting(self) -> int | None:
        """Which of the waits that the host has put on the stream it is in."""
        waits = self._waits
        while self._next < len(waits) and waits[self._next][3].query():
            self._next += 1
        at = self._next
        return at if at < len(waits) and waits[at][2].query() else None

    def _where(self, at: int) -> tuple[str, int | None]:
        """The layer of a wait and what it lacks, in words, and the rank that should have sent it."""
        layer, phase = self._waits[at][:2]
        missing = self.peers.missing(self._receives[layer], layer, self.turn.number, self.chunks)
        if not missing:
            return phase, None
        chunk = missing[0].piece.chunk
        return f"{phase}, which waits for the KV of chunk {chunk}", missing[0].peer
