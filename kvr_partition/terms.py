"""Costs and settings as files keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import msgspec

if TYPE_CHECKING:
    from kvr_partition.cost import ChunkCost, LinkCost
    from kvr_partition.schedule import Setting


class ChunkTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`ChunkCost`, in seconds."""

    fixed_s: float
    per_token_s: float
    per_own_pair_s: float
    per_prefix_pair_s: float
    kv_share: float

    @classmethod
    def of(cls, cost: ChunkCost) -> Self:
        """The terms of a cost."""
        return cls(*map(float, cost.terms))

    @property
    def cost(self) -> ChunkCost:
        """What they are the terms of."""
        from kvr_partition.cost import ChunkCost

        return ChunkCost(
            self.fixed_s, self.per_token_s, self.per_own_pair_s, self.per_prefix_pair_s, self.kv_share
        )

    @property
    def wrong(self) -> str | None:
        """Why no chunk can cost that, or None."""
        terms = (self.fixed_s, self.per_token_s, self.per_own_pair_s, self.per_prefix_pair_s)
        if min(terms) < 0 or max(terms[1:]) == 0 or not 0 <= self.kv_share < 1:
            return "its cost must not be negative, must grow with the chunk, and kv_share lies in [0, 1)"
        return None


class SteppedTerms(ChunkTerms, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The same, with the steps of chunk sizes."""

    steps: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, cost: ChunkCost) -> Self:
        """The terms and steps of a cost."""
        steps = tuple((int(size), float(factor)) for size, factor in cost.steps)
        return msgspec.structs.replace(super().of(cost), steps=steps)

    @property
    def cost(self) -> ChunkCost:
        """What they are the terms of."""
        from dataclasses import replace

        return replace(super().cost, steps=self.steps)

    @property
    def wrong(self) -> str | None:
        """Why no chunk can cost that, or None."""
        sizes = [size for size, _ in self.steps]
        if sizes != sorted(set(sizes)) or any(size < 1 or factor <= 0 for size, factor in self.steps):
            return "steps need sizes that grow, and factors above 0"
        return super().wrong


class LinkTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`LinkCost`, in seconds."""

    latency_s: float
    seconds_per_byte: float

    @classmethod
    def of(cls, link: LinkCost) -> LinkTerms:
        """The terms of a link."""
        return cls(float(link.latency_s), float(link.seconds_per_byte))

    @property
    def link(self) -> LinkCost:
        """What they are the terms of."""
        from kvr_partition.cost import LinkCost

        return LinkCost(self.latency_s, self.seconds_per_byte)


class SettingTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`schedule.Setting` without past and noise; a link from each rank to the next."""

    cost: SteppedTerms
    layers: int
    entry_bytes: int
    links: tuple[LinkTerms, ...]
    speeds: tuple[float, ...]
    topology: Literal["chain", "fanout"]
    overlap: bool
    alone_speed: float = 1.0

    @classmethod
    def of(cls, setting: Setting, ranks: int) -> SettingTerms:
        """The terms of a setting for so many ranks."""
        return cls(
            SteppedTerms.of(setting.cost),
            setting.layers,
            setting.entry_bytes,
            tuple(LinkTerms.of(setting.link_between(rank, rank + 1)) for rank in range(ranks - 1)),
            tuple(float(1 / setting.slowness(rank)) for rank in range(ranks)),
            setting.topology,
            setting.overlap,
            setting.alone_speed,
        )

    def setting(self, past: int = 0) -> Setting:
        """What they are the terms of."""
        from kvr_partition.schedule import Setting

        return Setting(
            self.cost.cost,
            self.layers,
            self.entry_bytes,
            tuple(link.link for link in self.links),
            self.speeds,
            self.topology,
            self.overlap,
            past=past,
            alone_speed=self.alone_speed,
        )
