"""What all links of a process group share: the plan of one prefill and the messages that carry it out.

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
