"""How KV travels between ranks: who sends which rows to whom, and under which limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from kvr_partition.errors import PartitionError, UnsupportedError
from kvr_partition.noise import noisy_link
from kvr_partition.partition import Partition

Topology = Literal["chain", "fanout"]
AnyTopology = Literal["auto", "chain", "fanout"]
TOPOLOGIES: tuple[Topology, ...] = ("chain", "fanout")


def check_topology(topology: str) -> None:
    """Refuse what is no topology.

    Raises:
        PartitionError: it is none of `TOPOLOGIES`, nor ``"auto"``.
    """
    if topology not in ("auto", *TOPOLOGIES):
        raise PartitionError(f"topology must be one of auto, {', '.join(TOPOLOGIES)}; got {topology!r}")


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


@dataclass(frozen=True, slots=True)
class Hop:
    """A piece on its way from or to another rank."""

    peer: int
    piece: Piece


def receives(partition: Partition, rank: int, window: int | None, topology: Topology) -> list[Hop]:
    """What a rank receives for one layer and from whom, in the order in which it is sent.

    In a chain (the paper's way) everything comes from the rank before; in a fan-out each chunk comes
    straight from the rank that computed it.
    """
    return [
        Hop(rank - 1 if topology == "chain" else piece.chunk, piece) for piece in needed(partition, rank, window)
    ]


def sends(partition: Partition, rank: int, window: int | None, topology: Topology) -> dict[int, list[Hop]]:
    """What a rank sends on for one layer, by the chunk that has to be there first.

    The rank's own chunk is there once it is computed, an earlier one once it is received.
    """
    out: dict[int, list[Hop]] = {}
    last = partition.ranks if topology == "fanout" else min(rank + 2, partition.ranks)
    for peer in range(rank + 1, last):
        for hop in receives(partition, peer, window, topology):
            if hop.peer == rank:
                out.setdefault(hop.piece.chunk, []).append(Hop(peer, hop.piece))
    return out


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """What links are held to, and what else travels on them.

    Attributes:
        bandwidth: bytes per second that each directed link carries at most, None for what it can. Between
            processes a message is held back for as long as it would take, and then sent: its real time
            comes on top.
        noise: bytes of background traffic; in each layer one random pair of neighbouring ranks carries a
            message of this size, ahead of its KV.
        seed: of the choice of pairs; all ranks must agree on it.
    """

    bandwidth: float | None = None
    noise: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise UnsupportedError(
                f"a link's bandwidth must be more than 0 bytes a second; got {self.bandwidth:g}"
            )
        if self.noise < 0:
            raise UnsupportedError(f"noise is a number of bytes, at least 0; got {self.noise}")

    def __str__(self) -> str:
        rate = "what they can" if self.bandwidth is None else f"{self.bandwidth:g} bytes/s"
        return f"{rate}, {self.noise} bytes of noise seeded by {self.seed}" if self.noise else rate

    def throttled_s(self, nbytes: int) -> float:
        """Seconds that a message keeps a link busy."""
        return 0.0 if self.bandwidth is None else nbytes / self.bandwidth

    def noisy_link(self, layer: int, ranks: int) -> int | None:
        """The rank whose link to the next one carries background traffic in a layer; None without noise."""
        return noisy_link(layer, ranks, self.noise, self.seed)


NO_LIMITS = LinkLimits()


class Links(Protocol):
    """Moves the KV of one prefill for one rank.

    Calls come in this order: `start` once, then for each layer `kv_ready` and, where the rank has a
    prefix, `wait_prefix`; `finish` once.
    """

    sent_bytes: int
    """Bytes of KV this rank put on the wire; background traffic is not counted."""

    def start(self, slots: Sequence[Slot]) -> None:
        """Post every receive of the prefill."""

    def kv_ready(self, layer: int) -> None:
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

    def kv_ready(self, layer: int) -> None:
        pass

    def wait_prefix(self, layer: int) -> None:
        pass

    def finish(self) -> list[float]:
        return [0.0] * self._layers

    def abort(self) -> None:
        pass
