"""Machine: everything besides the partition that a prefill's time depends on."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvr_partition.machine.cost import ChunkCost, LinkCost

FREE_LINK = LinkCost()
"""A link that takes no time."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything besides the partition that a schedule depends on. Files keep it as `filed`.

    Attributes:
        cost: time of a chunk on a rank of speed 1, over all layers.
        layers: layers that keep KV; all cost the same.
        entry_bytes: bytes of KV that one token keeps in one layer.
        link: of every directed link, or one for each rank's link to the next (a message between ranks
            further apart then takes the slowest link on the way).
        speeds: of each rank, relative to ``cost``; 1 for all when empty.
        topology: ``"chain"`` or ``"fanout"``.
        overlap: whether a rank attends to its own block before the prefix has arrived (attention depth).
        dense: whether every pair is computed and masked, as in the paper, rather than causal ones only.
        past: tokens that every rank has in its cache already, where no partition says so itself.
        noise, noise_seed: background traffic, as in `runtime.links.LinkLimits`.
        solo_speedup: speed of a rank while all others are idle, relative to ``speeds``, which are those of all
            ranks at work at once; ``alone_speed`` in files. Ranks on one GPU share its power and memory; 1 for
            ranks that share nothing.
        forwards: how a rank of a chain hands KV over. ``"chunks"``: its own as soon as it is ready, and each chunk
            before it as soon as that has arrived. ``"whole"``: all KV of a layer as one message, once all is there
            (store and forward). ``"blocking"``: that, and the rank computes nothing until the next one, which must
            have come to receive it, has it; so the paper describes its implementation.
    """

    cost: ChunkCost
    layers: int
    entry_bytes: int
    link: LinkCost | tuple[LinkCost, ...] = msgspec.field(default=FREE_LINK, name="links")
    speeds: tuple[float, ...] = ()
    # Defaults that files show all the same.
    topology: Literal["chain", "fanout"] = msgspec.field(default_factory=lambda: "chain")
    overlap: bool = msgspec.field(default_factory=lambda: True)
    dense: bool = False
    past: int = 0
    noise: int = 0
    noise_seed: int = 0
    solo_speedup: float = msgspec.field(default_factory=lambda: 1.0, name="alone_speed")
    forwards: Literal["chunks", "whole", "blocking"] = "chunks"

    def slowness(self, rank: int) -> float:
        """How many times as long as ``cost`` a rank takes."""
        return 1.0 / self.speeds[rank] if self.speeds else 1.0

    def link_between(self, source: int, target: int) -> LinkCost:
        """Of the directed link from one rank to a later one."""
        if isinstance(self.link, LinkCost):
            return self.link
        return max(self.link[source:target], key=lambda link: link.seconds(1 << 20))

    def behind(self, past: int) -> Machine:
        """The same, where every rank has so many tokens in its cache."""
        return msgspec.structs.replace(self, past=past)

    def links(self, ranks: int) -> tuple[LinkCost, ...]:
        """Of each of so many ranks to the next."""
        return tuple(self.link_between(rank, rank + 1) for rank in range(ranks - 1))

    def filed(self, ranks: int) -> Machine:
        """As files keep it: a speed for each of so many ranks, a link from each to the next, and no past."""
        steps = tuple((int(size), float(factor)) for size, factor in self.cost.size_effects)
        return Machine(
            msgspec.structs.replace(self.cost.plain, size_effects=steps),
            self.layers,
            self.entry_bytes,
            tuple(LinkCost(float(link.latency_s), float(link.seconds_per_byte)) for link in self.links(ranks)),
            tuple(float(1 / self.slowness(rank)) for rank in range(ranks)),
            self.topology,
            self.overlap,
            solo_speedup=float(self.solo_speedup),
        )
