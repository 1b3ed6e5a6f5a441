"""What all links of a process group share: the plan of one prefill, and the messages that carry it out.

All messages of a prefill carry its number, so that none is ever taken for one of another prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvr_partition.partition import Partition
from kvr_partition.runtime.agreement import Turn
from kvr_partition.runtime.links.plan import Hop, LinkLimits, Slot, Topology, receives, sends

_TAGS = 2**31 - 1


@dataclass(eq=False)
class PlannedLinks:
    """The plan of one prefill, which all kinds of links carry out."""

    partition: Partition
    rank: int
    topology: Topology
    limits: LinkLimits
    turn: Turn
    sent_bytes: int = field(init=False, default=0)
    _slots: Sequence[Slot] = field(init=False, default=())
    _receives: list[list[Hop]] = field(init=False, default_factory=list)
    _sends: list[dict[int, list[Hop]]] = field(init=False, default_factory=list)
    _background: torch.Tensor | None = field(init=False, default=None)

    def _plan(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        # Once for all layers that see as far: devices have nothing to do meanwhile.
        of = self.partition, self.rank
        windows = {slot.window for slot in slots}
        into = {window: receives(*of, window, self.topology) for window in windows}
        out = {window: sends(*of, window, self.topology) for window in windows}
        self._receives = [into[slot.window] for slot in slots]
        self._sends = [out[slot.window] for slot in slots]
        if self.limits.noise:
            self._background = torch.zeros(self.limits.noise, dtype=torch.uint8, device=slots[0].rows.device)

    def _noisy(self, layer: int) -> int | None:
        return self.limits.noisy_link(layer, self.partition.ranks)


@dataclass(frozen=True)
class Messages:
    """The messages of one prefill, over a process group or a backend of one.

    Attributes:
        group: has ``send`` and ``recv`` of a process group.
        number: of the prefill.
        layers, ranks: how many it has.
    """

    group: Any
    number: int
    layers: int
    ranks: int

    def _tag(self, layer: int, chunk: int) -> int:
        of_one = self.layers * (self.ranks + 1)
        # Tags are 31 bits wide; by the time they come round again, nothing of the first prefill is left.
        return self.number % (_TAGS // of_one) * of_one + layer * (self.ranks + 1) + chunk

    def send(self, layer: int, hop: Hop, rows: torch.Tensor) -> Any:
        """Send a piece of a layer; returns what is waited for."""
        return self.group.send([rows], hop.peer, self._tag(layer, hop.piece.chunk))

    def receive(self, layer: int, hop: Hop, rows: torch.Tensor) -> Any:
        """Receive a piece of a layer in place; returns what is waited for."""
        return self.group.recv([rows], hop.peer, self._tag(layer, hop.piece.chunk))

    def send_background(self, layer: int, peer: int, background: torch.Tensor) -> Any:
        """Send background traffic ahead of a layer's KV."""
        return self.group.send([background], peer, self._tag(layer, self.ranks))

    def receive_background(self, layer: int, peer: int, background: torch.Tensor) -> Any:
        """Receive background traffic as large as ``background``."""
        # What arrives is never read; a buffer of its own keeps it from what this rank may be sending.
        into = torch.empty_like(background)
        return self.group.recv([into], peer, self._tag(layer, self.ranks))
