"""Channel: small messages between the hosts of all ranks of a group, beside the links that carry KV.

A link tells no more than that something broke. The channel tells who: a socket to every other rank, read by a
thread that also answers for a rank which is busy, so that one that died, one that stopped and one that waits for
a third can be told apart.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvr_partition.errors import RankError, named_ranks
from kvr_partition.frames import Frames, framed
from kvr_partition.runtime.board import LONGEST, Board
from kvr_partition.runtime.channel_messages import Bye, Note, Ping, Pong, Wake, decode, encode

LOOK_S = 0.0005
"""Seconds that a rank keeps looking at the board before it sleeps: others are seldom later than that."""

_MOMENT_S, _LONG_MOMENT_S = 0.002, 0.05

ANSWER_S = 2.0
"""Seconds within which a rank that still runs answers; its thread needs no more than the interpreter's lock."""


@dataclass(frozen=True, slots=True)
class Doing:
    """What a rank is at, in words that follow "it is", and the rank that it waits for, if any."""

    what: str
    waits_for: int | None = None


IDLE = Doing("between two prefills")


class Channel:
    """Sockets from this rank to all others, and a thread that reads them.

    Attributes:
        rank, ranks: this rank, of how many.
        timeout_s: seconds to wait for another rank that still runs.
        doing: what this rank is at; others ask for it when they have waited too long.
        store: where backends of ``torch.distributed`` meet.
    """

    def __init__(
        self, rank: int, peers: dict[int, socket.socket], timeout_s: float, store: Any, board: Board | None = None
    ) -> None:
        self.store = store
        self._board = board
        self.rank = rank
        self.ranks = len(peers) + 1
        self.timeout_s = timeout_s
        self.doing = IDLE
        self._peers = peers
        self._sending = {peer: threading.Lock() for peer in peers}
        self._change = threading.Condition()
        self._notes: dict[tuple[str, int], deque[bytes]] = {}
        self._pongs: dict[int, Pong] = {}
        self._pings = 0
        self._left: set[int] = set()
        self._gone: set[int] = set()
        self._watchers: list[Callable[[int, str, bytes], None]] = []
        self._wake, self._woken = socket.socketpair()
        for peer in peers.values():
            peer.settimeout(timeout_s)
        threading.Thread(target=self._listen, name=f"kvr-rank{rank}-channel", daemon=True).start()
        _open.add(self)

    # ------------------------------------------------------------------ notes

    def tell(self, topic: str, body: bytes, to: int | None = None) -> None:
        """Send a note to one rank, or to all others. One that cannot be reached is found out when it is heard."""
        message = framed(encode(Note(topic, body)))
        for peer in self._peers if to is None else (to,):
            self._send(peer, message)

    def hear(
        self,
        topic: str,
        phase: str,
        ranks: Iterable[int] | None = None,
        *,
        timeout_s: float | None = None,
        unless: Callable[[], BaseException | None] = lambda: None,
    ) -> dict[int, bytes]:
        """Wait for a note of a topic from each of some ranks, or from all others.

        Args:
            phase: what this rank is in the middle of, for the error.
            timeout_s: seconds to wait for ranks that still run; the channel's own when None.
            unless: looked at whenever something arrives; what it returns is raised.

        Raises:
            RankError: a rank is gone, stopped, or says nothing in time.
        """
        wanted = [rank for rank in (self._peers if ranks is None else ranks) if rank != self.rank]
        heard: dict[int, bytes] = {}
        within = self.timeout_s if timeout_s is None else timeout_s
        until = time.monotonic() + within
        while len(heard) < len(wanted):
            missing = [rank for rank in wanted if rank not in heard]
            left = max(0.0, until - time.monotonic())
            heard |= self.hear_any(topic, phase, missing, timeout_s=left, unless=unless, waited_s=within)
        return heard

    def hear_any(
        self,
        topic: str,
        phase: str,
        ranks: Iterable[int],
        *,
        timeout_s: float | None = None,
        waited_s: float | None = None,
        unless: Callable[[], BaseException | None] = lambda: None,
    ) -> dict[int, bytes]:
        """Wait for a note of a topic from any of some ranks; see `hear`. One note of each rank at most.

        Args:
            waited_s: seconds that an error says it has been waited, where that is longer.
        """
        wanted = list(ranks)
        within = self.timeout_s if timeout_s is None else timeout_s
        until = time.monotonic() + within
        with self._change:
            while True:
                heard = {
                    rank: self._notes[topic, rank].popleft() for rank in wanted if self._notes.get((topic, rank))
                }
                if heard:
                    return heard
                if (error := unless()) is not None:
                    raise error
                gone = [rank for rank in wanted if rank in self._gone]
                left = until - time.monotonic()
                if gone or left <= 0:
                    break
                self._change.wait(min(left, threading.TIMEOUT_MAX))
        if gone:
            raise self.lost(gone[0], phase)
        raise self.culprit(wanted, phase, within if waited_s is None else waited_s)

    def state(self, body: bytes) -> None:
        """Tell all other ranks what `stated` gives them, as fast as their host allows."""
        board = self._board
        if board is None:
            self.tell(_STATED, body)
            return
        if len(body) > LONGEST:
            self.tell(_STATED, body)
            body = b""  # look at the socket
        board.write(body)
        for peer in self._peers:
            if board.sleeps(peer):
                self._send(peer, _WAKE)

    def stated(
        self, ranks: Iterable[int], phase: str, unless: Callable[[], BaseException | None]
    ) -> dict[int, bytes]:
        """The next statement of each of some ranks; see `hear`."""
        board = self._board
        if board is None:
            return self.hear(_STATED, phase, ranks, unless=unless)
        missing = set(ranks)
        heard: dict[int, bytes] = {}
        began = time.monotonic()
        while True:
            for rank in list(missing):
                body = board.read(rank)
                if body is not None:
                    heard[rank] = body
                    missing.discard(rank)
            if not missing:
                break
            if (error := unless()) is not None:
                raise error
            gone = missing & self._gone
            waited = time.monotonic() - began
            if gone:
                raise self.lost(min(gone), phase)
            if waited > self.timeout_s:
                raise self.culprit(sorted(missing), phase, self.timeout_s)
            if waited < LOOK_S:
                os.sched_yield()
                continue
            # Whoever writes from now on wakes this rank; one that had just looked is found within a moment.
            board.sleep(True)
            with self._change:
                if not any(board.peek(rank) for rank in missing):
                    self._change.wait(min(_MOMENT_S + waited / 10, _LONG_MOMENT_S))
            board.sleep(False)
        longer = [rank for rank, body in heard.items() if not body]
        return heard | self.hear(_STATED, phase, longer, unless=unless) if longer else heard

    def watch(self, watcher: Callable[[int, str, bytes], None]) -> None:
        """Have a function told of each note, as ``(rank, topic, body)``; topic "" is a rank that is gone."""
        with self._change:
            self._watchers.append(watcher)

    @property
    def change(self) -> threading.Condition:
        """Notified of everything that arrives."""
        return self._change

    @property
    def gone(self) -> set[int]:
        """Ranks whose sockets have closed."""
        return set(self._gone)

    # --------------------------------------------------------------- who it is

    def lost(self, rank: int, phase: str) -> RankError:
        """The error about a rank that is gone."""
        how = "has left: its program ended" if rank in self._left else "is gone: its process ended"
        return RankError(f"rank {rank} {how} ({phase})", rank=rank, kind="lost", phase=phase)

    def culprit(self, ranks: Sequence[int], phase: str, waited_s: float) -> RankError:
        """The error about the rank that everybody waits for, found by asking those that are late.

        It names the rank that does not answer, or else the one that waits for nobody.
        """
        asked = set(ranks)
        answers: dict[int, Pong] = {}
        while True:
            answers |= self._ask(asked - answers.keys())
            silent = sorted(asked - answers.keys())
            if silent:
                break
            # Who is late may itself be waiting for somebody.
            further = {pong.waits_for for pong in answers.values()} - {None, self.rank} - asked
            if not further:
                break
            asked |= {rank for rank in further if rank is not None}
        if silent:
            rank = silent[0]
            if rank in self._gone:
                return self.lost(rank, phase)
            return RankError(
                f"{named_ranks(silent)} did not answer within {waited_s:g} s ({phase}): its process is stopped or "
                "hangs, or its host cannot be reached",
                rank=rank,
                kind="timeout",
                phase=phase,
            )
        idle = [rank for rank in sorted(asked) if answers[rank].waits_for is None]
        rank = (idle or sorted(asked))[0]
        return RankError(
            f"rank {rank} was waited for {waited_s:g} s ({phase}); it is {answers[rank].doing}",
            rank=rank,
            kind="timeout",
            phase=phase,
        )

    def _ask(self, ranks: Iterable[int]) -> dict[int, Pong]:
        wanted = set(ranks)
        with self._change:
            self._pings += 1
            number = self._pings
        ping = framed(encode(Ping(number)))
        for rank in wanted:
            self._send(rank, ping)

        def answered() -> set[int]:
            return {rank for rank in wanted if rank in self._pongs and self._pongs[rank].number >= number}

        with self._change:
            self._change.wait_for(lambda: answered() | (wanted & self._gone) == wanted, ANSWER_S)
            return {rank: self._pongs[rank] for rank in answered()}

    # -------------------------------------------------------------------- life

    def leave(self) -> None:
        """Say goodbye, so that the closing socket is not taken for a death. Safe to call more than once."""
        goodbye = framed(encode(Bye()))
        for peer in self._peers:
            self._send(peer, goodbye)
        with contextlib.suppress(OSError):
            self._wake.close()

    def _send(self, peer: int, message: bytes) -> None:
        with contextlib.suppress(OSError), self._sending[peer]:
            self._peers[peer].sendall(message)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            frames = {rank: Frames() for rank in self._peers}
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            selector.register(self._woken, selectors.EVENT_READ, None)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        for peer in self._peers.values():
                            peer.close()
                        return
                    rank = key.data
                    try:
                        data = self._peers[rank].recv(1 << 16)
                        messages = [decode(body) for body in frames[rank].feed(data)]
                    except (OSError, ValueError, msgspec.MsgspecError):
                        data, messages = b"", []
                    for message in messages:
                        self._take(rank, message)
                    if not data:
                        selector.unregister(self._peers[rank])
                        with self._change:
                            self._gone.add(rank)
                            self._tell_watchers(rank, "", b"")

    def _take(self, rank: int, message: object) -> None:
        match message:
            case Note(topic, body):
                with self._change:
                    self._notes.setdefault((topic, rank), deque()).append(body)
                    self._tell_watchers(rank, topic, body)
            case Ping(number):
                self._send(rank, framed(encode(Pong(number, self.doing.what, self.doing.waits_for))))
            case Pong():
                with self._change:
                    self._pongs[rank] = message
                    self._change.notify_all()
            case Wake():
                with self._change:
                    self._change.notify_all()
            case Bye():
                self._left.add(rank)

    def _tell_watchers(self, rank: int, topic: str, body: bytes) -> None:
        for watcher in self._watchers:
            watcher(rank, topic, body)
        self._change.notify_all()

    def has_left(self, rank: int) -> bool:
        """Whether a rank said goodbye before its socket closed."""
        return rank in self._left


_STATED = "statement"
_WAKE = framed(encode(Wake()))

_open: weakref.WeakSet[Channel] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    for channel in list(_open):
        channel.leave()


# ------------------------------------------------------------------------ how ranks meet
