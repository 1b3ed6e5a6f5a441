"""PartitionTable: the best partitions found by search, and KVR-P as published: lookup between them."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import msgspec

from kvr_partition import jsonfile
from kvr_partition.errors import FileFormatError, OutOfRangeError, PartitionError
from kvr_partition.partition import Partition, whole
from kvr_partition.provenance import Provenance

SCHEMA = "kvr-partition/table/2"

Source = Literal["searched", "interpolated", "predicted", "cost-model", "even"]


class Lookup(msgspec.Struct, frozen=True):
    """A partition and where it comes from."""

    partition: Partition
    source: Source


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One searched partition: the best one known for its rank count, context and past.

    ``ttft_s`` is its median TTFT in seconds, ``interval_s`` the 95% interval of that median,
    ``measured`` the number of partitions that the search timed and ``quantum`` the tokens that it
    kept boundaries at multiples of, which what is interpolated between entries does as well.
    """

    context: int
    sizes: tuple[int, ...]
    past: int = 0
    ttft_s: float | None = None
    interval_s: tuple[float, float] | None = None
    measured: int | None = None
    quantum: int = 1

    @property
    def partition(self) -> Partition:
        """The chunks of this entry."""
        return Partition(self.sizes, past=self.past)

    @property
    def ranks(self) -> int:
        """Number of chunks."""
        return len(self.sizes)


class TableFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table as a file keeps it."""

    schema: str
    provenance: Provenance | None
    entries: tuple[Entry, ...]


class PartitionTable:
    """Searched partitions by rank count, past and context; immutable.

    Between two searched contexts the fractions are interpolated linearly (KVR-P of Cho, Rastegari and
    Naik, 2024) and rounded to sizes that sum exactly, in quanta of the searches. Outside the searched range
    there is no answer.

    Args:
        entries: at most one for each (ranks, past, context).
        provenance: the conditions under which they were measured, if known.

    Raises:
        PartitionError: sizes that are no partition or do not sum to their context, or an entry given twice.

    Example:
        >>> table = PartitionTable([Entry(8, (5, 3)), Entry(16, (10, 6))])
        >>> table.lookup(12)
        Lookup(partition=Partition(sizes=(8, 4), past=0), source='interpolated')
    """

    def __init__(self, entries: Iterable[Entry], provenance: Provenance | None = None) -> None:
        self._provenance = provenance
        self._series: dict[tuple[int, int], tuple[list[int], list[Partition]]] = {}
        # Inner boundaries as shares of the context, and by how much they grow until the next context.
        self._cuts: dict[tuple[int, int], list[list[tuple[float, float]]]] = {}
        self._quanta: dict[tuple[int, int], list[int]] = {}
        ordered = sorted(
            (_plain(entry) for entry in entries), key=lambda entry: (entry.ranks, entry.past, entry.context)
        )
        for entry in ordered:
            partition = entry.partition
            if partition.context != entry.context:
                raise PartitionError(
                    f"the sizes {'/'.join(map(str, entry.sizes))} sum to {partition.context}, "
                    f"not to their context of {entry.context}"
                )
            if entry.quantum < 1 or entry.quantum * entry.ranks > entry.context:
                raise PartitionError(
                    f"a quantum of {entry.quantum} tokens cannot be for a context of {entry.context}; "
                    f"it is at least 1 and leaves each of {entry.ranks} ranks one"
                )
            contexts, rows = self._series.setdefault((entry.ranks, entry.past), ([], []))
            if contexts and contexts[-1] == entry.context:
                raise PartitionError(
                    f"two entries for context {entry.context} with {entry.ranks} ranks and past {entry.past}; "
                    "keep one"
                )
            contexts.append(entry.context)
            rows.append(partition)
            self._quanta.setdefault((entry.ranks, entry.past), []).append(entry.quantum)
        for key, (contexts, rows) in self._series.items():
            cuts = [
                [boundary / context for boundary in row.boundaries[1:-1]]
                for context, row in zip(contexts, rows, strict=True)
            ]
            self._cuts[key] = [
                [(low, high - low) for low, high in zip(lows, highs, strict=True)]
                for lows, highs in pairwise(cuts)
            ]
        self._entries = tuple(ordered)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, ordered by ranks, past and context."""
        return self._entries

    @property
    def provenance(self) -> Provenance | None:
        """Under which conditions the entries were measured."""
        return self._provenance

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank counts that were searched."""
        return tuple(sorted({ranks for ranks, _ in self._series}))

    def contexts(self, ranks: int, past: int = 0) -> tuple[int, ...]:
        """The contexts that were searched for this rank count and past."""
        contexts, _ = self._series.get((ranks, past), ([], []))
        return tuple(contexts)

    def lookup(self, context: int, ranks: int | None = None, past: int = 0) -> Lookup:
        """The partition for a context: as searched, or interpolated between the two nearest searched ones.

        Args:
            context: tokens of the prompt.
            ranks: how many ranks; may be left out when the table has one rank count only.
            past: tokens in the cache before the prompt; must be one that was searched.

        Raises:
            OutOfRangeError: no such rank count or past, or a context outside the searched range.
            PartitionError: numbers that are no whole ones.
        """
        ranks = self._one_rank_count() if ranks is None else ranks
        if not (type(context) is type(ranks) is type(past) is int):
            context, ranks, past = whole(context, "context", 1), whole(ranks, "ranks", 1), whole(past, "past", 0)
        series = self._series.get((ranks, past))
        if series is None:
            raise OutOfRangeError(self._absent(ranks, past))
        contexts, rows = series
        at = bisect_left(contexts, context)
        if at < len(contexts) and contexts[at] == context:
            return Lookup(rows[at], "searched")
        if at in (0, len(contexts)):
            raise OutOfRangeError(
                f"context {context} is outside the searched range of {contexts[0]} to {contexts[-1]} tokens "
                f"for {ranks} ranks; search it, or ask inside that range"
            )
        start, end = contexts[at - 1], contexts[at]
        weight = (context - start) / (end - start)
        cuts = [low + weight * growth for low, growth in self._cuts[ranks, past][at - 1]]
        quanta = self._quanta[ranks, past]
        return Lookup(Partition.from_cuts(cuts, context, min(quanta[at - 1], quanta[at]), past), "interpolated")

    def with_entry(self, entry: Entry) -> PartitionTable:
        """A table that also has this entry, in place of one with the same ranks, past and context."""
        key = (entry.ranks, entry.past, entry.context)
        kept = [old for old in self._entries if (old.ranks, old.past, old.context) != key]
        return PartitionTable([*kept, entry], self._provenance)

    def without(self, context: int, ranks: int, past: int = 0) -> PartitionTable:
        """A table that lacks this entry: what KVR-P would say had it never been searched."""
        key = (ranks, past, context)
        kept = [old for old in self._entries if (old.ranks, old.past, old.context) != key]
        return PartitionTable(kept, self._provenance)

    def to_json(self) -> bytes:
        """The table as a file of the newest schema."""
        return jsonfile.encode(TableFile(SCHEMA, self._provenance, self._entries))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as one JSON file, whole or not at all.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        jsonfile.write_atomic(path, self.to_json())

    @classmethod
    def from_json(cls, content: bytes, path: str | os.PathLike[str] = "table") -> PartitionTable:
        """The table that a JSON document describes; ``path`` only names it in errors.

        Raises:
            FileFormatError: another schema, a torn file, or values that make no table.
        """
        file = jsonfile.decode(content, TableFile, SCHEMA, path)
        for index, entry in enumerate(file.entries):
            low, high = entry.interval_s or (0.0, 0.0)
            if (entry.ttft_s is not None and entry.ttft_s <= 0) or low < 0 or high < low:
                raise FileFormatError(f"{path}: entries[{index}] has a time that cannot be; measure it again")
        try:
            return cls(file.entries, file.provenance)
        except PartitionError as error:
            raise FileFormatError(f"{path}: entries: {error}") from None

    def _one_rank_count(self) -> int:
        if len(self.ranks) == 1:
            return self.ranks[0]
        raise OutOfRangeError(
            f"the table has partitions for {_several(self.ranks) or 'no'} ranks; say which with ranks="
        )

    def _absent(self, ranks: int, past: int) -> str:
        pasts = sorted(p for r, p in self._series if r == ranks)
        if pasts:
            return f"nothing was searched for past {past} with {ranks} ranks; the table has past {_several(pasts)}"
        return f"nothing was searched for {ranks} ranks; the table has {_several(self.ranks) or 'no entries'}"


def _several(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)


def _plain(entry: Entry) -> Entry:
    """The same entry with whole numbers of the kind that files hold."""
    given = (entry.context, *entry.sizes, entry.past, entry.quantum)
    if all(type(number) is int for number in given):
        return entry
    return msgspec.structs.replace(
        entry,
        context=whole(entry.context, "context", 1),
        sizes=entry.partition.sizes,
        past=whole(entry.past, "past", 0),
        quantum=whole(entry.quantum, "quantum", 1),
    )
