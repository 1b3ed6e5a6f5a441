"""Profile: what chunks, ranks and links of a machine cost, with the samples behind it, as one JSON file."""

from __future__ import annotations

import os
from typing import Literal

import msgspec

from kvr_partition import jsonfile
from kvr_partition.errors import FileFormatError
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.provenance import Provenance

SCHEMA = "kvr-partition/profile/2"


class ChunkSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chunk behind a prefix, timed on all ranks at once; seconds of each rank.

    Timed ``alone``, it is the first rank's while all others are idle; with ``layers``, of so many layers only.
    """

    chunk: int
    prefix: int
    seconds: tuple[float, ...]
    first_kv_s: tuple[float, ...]
    alone: bool = False
    layers: int | None = None


class LinkSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Messages of so many bytes; for each link from a rank to the next the seconds of each."""

    nbytes: int
    seconds: tuple[tuple[float, ...], ...]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine as a schedule sees it.

    Attributes:
        context: the longest context the cost was timed for, in tokens.
        layers: layers that keep KV.
        entry_bytes: bytes of KV that a token keeps in one of them.
        cost: of a chunk on a rank of speed 1.
        speeds: of each rank.
        links: from each rank to the next.
        solo_speedup: as in `Machine`.
    """

    schema: str
    provenance: Provenance
    context: int
    layers: int
    entry_bytes: int
    cost: ChunkCost
    speeds: tuple[float, ...]
    links: tuple[LinkCost, ...]
    chunk_samples: tuple[ChunkSample, ...]
    link_samples: tuple[LinkSample, ...]
    solo_speedup: float = msgspec.field(default=1.0, name="alone_speed")

    @classmethod
    def of(
        cls,
        machine: Machine,
        context: int,
        provenance: Provenance,
        chunks: tuple[ChunkSample, ...] = (),
        links: tuple[LinkSample, ...] = (),
    ) -> Profile:
        """A measured machine with the samples behind it."""
        kept = machine.filed(provenance.ranks)
        return cls(
            SCHEMA,
            provenance,
            context,
            kept.layers,
            kept.entry_bytes,
            kept.cost,
            kept.speeds,
            kept.links(provenance.ranks),
            chunks,
            links,
            kept.solo_speedup,
        )

    def machine(self, topology: Literal["chain", "fanout"] = "chain", bandwidth: float | None = None) -> Machine:
        """For `schedule`; links held to ``bandwidth`` bytes a second as well, if it is given."""
        least = 0.0 if bandwidth is None else 1.0 / bandwidth
        return Machine(
            self.cost,
            self.layers,
            self.entry_bytes,
            tuple(LinkCost(link.latency_s, max(link.seconds_per_byte, least)) for link in self.links),
            self.speeds,
            topology,
            self.provenance.depth == "attention",
            solo_speedup=self.solo_speedup,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        jsonfile.write_atomic(path, jsonfile.encode(self))


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile.

    Raises:
        FileFormatError: no profile, one of another version, or one whose numbers make no sense.
    """
    profile = jsonfile.decode(jsonfile.read_bytes(path), Profile, SCHEMA, path)

    def refuse(what: str) -> FileFormatError:
        return FileFormatError(f"{os.fspath(path)} is not a valid profile: {what}; measure it anew")

    ranks = profile.provenance.ranks
    if profile.cost.wrong is not None:
        raise refuse(profile.cost.wrong)
    if len(profile.speeds) != ranks or min(profile.speeds) <= 0:
        raise refuse(f"{ranks} ranks need {ranks} speeds above 0")
    if len(profile.links) != ranks - 1:
        raise refuse(f"{ranks} ranks are joined by {ranks - 1} links, not {len(profile.links)}")
    if any(link.latency_s < 0 or link.seconds_per_byte < 0 for link in profile.links):
        raise refuse("a link cannot take less than no time")
    if not profile.solo_speedup >= 1:
        raise refuse("a rank alone cannot be slower than beside others")
    if profile.layers < 1 or profile.entry_bytes < 1 or profile.context < ranks:
        raise refuse("layers, entry_bytes and context must be positive")
    return profile
