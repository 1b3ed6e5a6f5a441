"""The links of a process group: which kind each pair of ranks has, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import torch
import torch.distributed as dist

from kvr_partition.errors import UnsupportedError, named_ranks
from kvr_partition.link_kinds import BETWEEN_GPUS, GLOO, KINDS, NCCL, PEER, LinkKind
from kvr_partition.partition import Partition
from kvr_partition.runtime.agreement import Agreement, Turn, agreement_of
from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.execution import EAGER, Execution, on_device
from kvr_partition.runtime.links.host import HostLinks
from kvr_partition.runtime.links.memory import LinkMemory, LinkMemoryUse, link_memory
from kvr_partition.runtime.links.messages import Messages
from kvr_partition.runtime.links.nccl import NcclWire
from kvr_partition.runtime.links.peer import Peers, PeerWire, Rows
from kvr_partition.runtime.links.plan import AnyTopology, LinkLimits, Links, NoLinks, Slot, Topology
from kvr_partition.runtime.links.stream import StreamLinks, Streams, Wire
from kvr_partition.runtime.links.watch import PeerWatch
from kvr_partition.runtime.meeting import host_name
from kvr_partition.runtime.support import probe

WantedLinks = Literal["auto", "peer", "nccl"]
"""One of `BETWEEN_GPUS` by name, or the best that each pair has."""


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """Where one rank is, and what others need to reach it there."""

    host: str
    gpu: str
    flags: bytes
    """Handle of its page of flags; empty where it has no peer links."""


class _Reached(msgspec.Struct, frozen=True, array_like=True):
    ranks: tuple[int, ...]


_encode = msgspec.msgpack.Encoder().encode
_place = msgspec.msgpack.Decoder(_Place).decode
_reached = msgspec.msgpack.Decoder(_Reached).decode


@dataclass(eq=False)
class LinkSetup:
    """What the links of one group have in common from prefill to prefill, on one rank.

    Attributes:
        kinds: of each pair of ranks, the earlier one first.
        peers: where this rank has memory that others write to, or writes to theirs; else None.
    """

    rank: int
    ranks: int
    kinds: dict[tuple[int, int], LinkKind]
    peers: Peers | None = None
    _streams: Streams = field(default_factory=Streams)

    def topology(self, wanted: AnyTopology) -> Topology:
        """The topology that is wanted; of ``"auto"`` the one that suits the links."""
        if wanted != "auto":
            return wanted
        best = {kind.topology for kind in self.kinds.values()}
        return "fanout" if best == {"fanout"} else "chain"

    @property
    def execution(self) -> Execution:
        """How a prefill over these links is carried out: peers can write to its rows where that is needed."""
        if self.peers is None or not self._receives:
            return EAGER
        memory = self.peers.memory
        return Execution(empty=memory.empty, owns=lambda rows: memory.place(rows) is not None, room=memory.room)

    @property
    def has_peers(self) -> bool:
        """Whether any pair of the group has peer links, so that ranks tell each other where their rows are."""
        return any(kind.maps for kind in self.kinds.values())

    @property
    def _receives(self) -> bool:
        return any(kind.maps and high == self.rank for (_, high), kind in self.kinds.items())

    def links(
        self,
        partition: Partition,
        cache: RunaheadCache,
        device: torch.device,
        turn: Turn,
        topology: Topology,
        limits: LinkLimits,
    ) -> Links:
        """The links of one prefill, once all ranks have their rows."""
        slots = [layer.slot for _, layer in cache.kv_layers] if turn.of is not None else ()
        return self.row_links(partition, slots, device, turn, topology, limits)

    def row_links(
        self,
        partition: Partition,
        slots: Sequence[Slot],
        device: torch.device,
        turn: Turn,
        topology: Topology,
        limits: LinkLimits,
    ) -> Links:
        """The same, given each layer's rows."""
        if turn.of is None:
            return NoLinks()
        if device.type != "cuda":
            group = turn.of.links(device, self._near(topology))
            return HostLinks(partition, self.rank, topology, limits, turn, group)
        wires, watch = self.wires(partition, slots, device, turn, self._near(topology), limits.noise)
        return StreamLinks(partition, self.rank, topology, limits, turn, wires, self.streams, watch)

    def wires(
        self,
        partition: Partition,
        slots: Sequence[Slot],
        device: torch.device,
        turn: Turn,
        near: Sequence[int],
        noise: int = 0,
    ) -> tuple[dict[int, Wire], PeerWatch | None]:
        """What carries rows between this rank and some others, and the watchdog's view of it. All ranks call this.

        Args:
            slots: this rank's rows, of each layer.
            near: the other ranks.
            noise: bytes of background traffic.
        """
        rows: list[Rows] = []
        watch = None
        if self.has_peers and self.peers is None:
            turn.exchange(_encode(Rows()))
        elif self.peers is not None:
            rows = self.peers.state_rows(turn, slots if self._receives else (), noise)
            watch = PeerWatch(self.peers, turn, partition.ranks)
        wiring = _Wiring(self, partition, slots, device, turn, rows)
        return {peer: WIRES[self.kind(peer)](wiring, peer) for peer in near}, watch

    @property
    def streams(self) -> Streams:
        """Where work for other ranks is put."""
        return self._streams if self.peers is None else self.peers.streams

    @property
    def link(self) -> str:
        """The kinds between its ranks, as provenance has them."""
        found = set(self.kinds.values())
        return " and ".join(kind.name for kind in KINDS if kind in found) or "none"

    def release(self, turn: Turn) -> int:
        """Give the memory back in which no rows are alive; see `release_link_memory`."""
        if self.peers is not None:
            self.peers.forget()
        assert turn.of is not None
        turn.of.barrier()
        return 0 if self.peers is None else self.peers.memory.release(self.peers)

    def connect(self, turn: Turn, device: torch.device, topology: Topology) -> None:
        """Connect those pairs that need it, while all ranks are in step and nothing can have failed on one."""
        others = [peer for peer in self._near(topology) if not self.kind(peer).maps]
        if others and turn.of is not None:
            turn.of.links(device, others)

    def kind(self, peer: int) -> LinkKind:
        """Of the link between this rank and another."""
        return self.kinds[min(self.rank, peer), max(self.rank, peer)]

    def _near(self, topology: Topology) -> list[int]:
        # In a chain neighbours talk to each other, in a fan-out all do.
        reach = 1 if topology == "chain" else self.ranks
        return [peer for peer in range(self.ranks) if 0 < abs(peer - self.rank) <= reach]


@dataclass(frozen=True)
class _Wiring:
    """What any wire of a prefill is made from, on one rank."""

    setup: LinkSetup
    partition: Partition
    slots: Sequence[Slot]
    device: torch.device
    turn: Turn
    rows: Sequence[Rows]
    """Addresses of each rank's rows; empty for ranks that nobody writes to."""


def _peer_wire(wiring: _Wiring, peer: int) -> Wire:
    setup, partition = wiring.setup, wiring.partition
    assert setup.peers is not None
    there = wiring.rows[peer] if peer > setup.rank else None
    start = partition.starts[peer]
    return PeerWire(setup.peers, peer, wiring.turn, partition.ranks, there, start, wiring.slots)


def _nccl_wire(wiring: _Wiring, peer: int) -> Wire:
    assert wiring.turn.of is not None
    group = wiring.turn.of.links(wiring.device, [peer])
    return NcclWire(peer, Messages(group, wiring.turn.number, len(wiring.slots), wiring.partition.ranks))


WIRES: dict[LinkKind, Callable[[_Wiring, int], Wire]] = {PEER: _peer_wire, NCCL: _nccl_wire}
"""How each kind between GPUs is made for one prefill; gloo has `HostLinks` for all peers at once."""

_Reaching = Sequence[Sequence[int]]
"""Of each rank, those whose memory it reaches."""

PAIRED: dict[LinkKind, Callable[[_Reaching, int, int], bool]] = {
    PEER: lambda reaching, low, high: high in reaching[low] and low in reaching[high],
    NCCL: lambda reaching, low, high: True,
}
"""Whether two ranks can have each kind between GPUs; they get the best that they can have."""


def link_group(ranks: Sequence[int] | None = None, links: WantedLinks = "auto") -> dist.ProcessGroup | None:
    """A process group for prefills alone, whose ranks have met. All ranks of the world call this, once.

    Args:
        ranks: of the world, those that prefill together; all when None.
        links: between GPUs. ``"auto"``: the best kind that each pair of ranks has; ``"peer"``: peer memory, or no
            prefill; ``"nccl"``: NCCL, though there may be better.
    """
    group: dist.ProcessGroup | None = dist.new_group(ranks)
    if isinstance(group, dist.ProcessGroup):
        # Ranks meet here, not on the clock of the first prompt.
        agreement_of(group).kept[WantedLinks] = links
    return group


def reserve_link_memory(model: Any, tokens: int, *, batch: int = 1) -> LinkMemoryUse:
    """Take the memory now that peer links need for prompts of up to ``tokens`` tokens, and keep it.

    KV that other ranks write lies in memory that torch does not manage. It is taken when a prompt needs it and
    kept for those that follow: without this call, the first long prompt waits for it.

    Args:
        model: on this rank's device.
        tokens: of the longest prompt, with what precedes it and what is decoded behind it.
        batch: prompts at once.

    Returns:
        What is reserved on this rank's device now.

    Raises:
        UnsupportedError: no CUDA device, or no cuda-bindings.
        OutOfMemoryError: the device is full.
    """
    memory = _memory_of(next(model.parameters()).device)
    width = model.dtype.itemsize
    memory.make_room([kv.entry(batch) * tokens * width for kv in probe(model).layers if kv is not None])
    return memory.use


def link_memory_use(device: torch.device | str | int | None = None) -> LinkMemoryUse:
    """What peer links keep of a device's memory in this process; the current device's when None.

    Raises:
        UnsupportedError: no CUDA device, or no cuda-bindings.
    """
    return _memory_of(torch.device("cuda" if device is None else device)).use


def release_link_memory(group: dist.ProcessGroup | None = None) -> int:
    """Give memory back that no KV lies in any more. All ranks of a group call this, between two prefills.

    Args:
        group: that of the prefills; the default group when None.

    Returns:
        Bytes given back on this rank.

    Raises:
        RankError: a rank is gone, stopped, or did not call this in time.
    """
    agreement = agreement_of(group)
    with agreement.turn(compare=False) as turn:
        setups = [each for key, each in agreement.kept.items() if isinstance(each, LinkSetup)]
        if not setups:
            agreement.barrier()
        return sum(setup.release(turn) for setup in setups)


def _memory_of(device: torch.device) -> LinkMemory:
    if device.type != "cuda":
        raise UnsupportedError(f"peer links are between CUDA devices; this model is on {device}")
    return link_memory(device)


def links_of(group: dist.ProcessGroup | None, device: torch.device) -> LinkSetup:
    """The links of a group, found out now. All its ranks call this, between two prefills.

    Raises:
        UnsupportedError: two ranks share a GPU and have no peer links.
        RankError: a rank is gone, stopped, late or failed.
    """
    with agreement_of(group).turn() as turn, on_device(device):
        turn.open = turn.compare
        return link_setup(turn, device)


def link_setup(turn: Turn, device: torch.device) -> LinkSetup:
    """The links of a turn's group. Found out once, by all its ranks in the same turn.

    Raises:
        UnsupportedError: two ranks share a GPU and have no peer links.
        RankError: a rank is gone, stopped, late or failed.
    """
    agreement = turn.of
    if agreement is None:
        return LinkSetup(0, 1, {})
    key = (LinkSetup, device, turn.compare)
    if key not in agreement.kept:
        agreement.kept[key] = _found_out(agreement, turn, device)
    setup: LinkSetup = agreement.kept[key]
    return setup


def _found_out(agreement: Agreement, turn: Turn, device: torch.device) -> LinkSetup:
    rank, ranks = agreement.rank, agreement.ranks
    pairs = [(low, high) for high in range(ranks) for low in range(high)]
    if device.type != "cuda":
        return LinkSetup(rank, ranks, dict.fromkeys(pairs, GLOO))
    if not turn.compare:
        return LinkSetup(rank, ranks, dict.fromkeys(pairs, NCCL))
    peers = None
    wanted = agreement.kept.get(WantedLinks, "auto")
    if wanted != "nccl":
        try:
            peers = Peers(agreement, device)
        except UnsupportedError:
            if wanted == "peer":
                raise
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    mine = _Place(host_name(), gpu, b"" if peers is None else peers.flags)
    places = [_place(body) for body in turn.exchange(_encode(mine))]
    reached = [
        peer
        for peer, there in enumerate(places)
        if peer != rank
        and peers is not None
        and there.flags
        and there.host == mine.host
        and peers.reach(peer, there.flags)
    ]
    # Those that come later write to nobody before them; that both can is what shows that the way is there.
    reaching = [_reached(body).ranks for body in turn.exchange(_encode(_Reached(tuple(reached))))]
    kinds = {pair: next(kind for kind in BETWEEN_GPUS if PAIRED[kind](reaching, *pair)) for pair in pairs}
    where = [(place.host, place.gpu) for place in places]
    shared = [(low, high) for (low, high), kind in kinds.items() if kind is NCCL and where[low] == where[high]]
    if shared:
        raise UnsupportedError(
            f"{named_ranks(list(shared[0]))} share a GPU, which NCCL refuses, and have no peer links; these need "
            f"{PEER.needs}"
        )
    without = [pair for pair, kind in kinds.items() if kind is NCCL]
    if wanted == "peer" and without:
        raise UnsupportedError(f"{named_ranks(list(without[0]))} have no peer links; these need {PEER.needs}")
    if peers is not None and not any(kind.maps for kind in kinds.values()):
        agreement.guarded.remove(peers)
        peers = None
    return LinkSetup(rank, ranks, kinds, peers)
