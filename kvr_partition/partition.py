"""Partition: how many tokens of a prompt each rank computes. Pure arithmetic."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NoReturn

from kvr_partition.errors import PartitionError


class Partition:
    """Chunk sizes of a prompt, one per rank, in rank order; immutable.

    Args:
        sizes: tokens computed by rank 0, 1, …; each at least 1.
        past: tokens already in the cache before this prompt (a prefix-cache hit); 0 unless said.

    Raises:
        PartitionError: no sizes, a size that is no whole number or below 1, or a negative past.

    Example:
        >>> p = Partition((9728, 6656))
        >>> p.context, p.ranks, p.boundaries
        (16384, 2, (0, 9728, 16384))
    """

    # Written out, since a dataclass would take serving code as long to import as all the rest of this file.
    __slots__ = ("past", "sizes")
    __match_args__ = ("sizes", "past")

    sizes: tuple[int, ...]
    past: int

    def __init__(self, sizes: Iterable[int], past: int = 0) -> None:
        checked = tuple(whole(size, f"size of rank {rank}", 1) for rank, size in enumerate(sizes))
        if not checked:
            raise PartitionError("a partition needs at least one chunk; got no sizes")
        object.__setattr__(self, "sizes", checked)
        object.__setattr__(self, "past", whole(past, "past", 0))

    @classmethod
    def trusted(cls, sizes: tuple[int, ...], past: int = 0) -> Partition:
        """A partition of numbers that are known to make one; nothing is checked."""
        made = object.__new__(cls)
        object.__setattr__(made, "sizes", sizes)
        object.__setattr__(made, "past", past)
        return made

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a partition is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a partition is immutable; cannot delete {name!r}")

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not Partition:
            return NotImplemented
        return self.sizes == other.sizes and self.past == other.past

    def __hash__(self) -> int:
        return hash((self.sizes, self.past))

    def __repr__(self) -> str:
        return f"Partition(sizes={self.sizes!r}, past={self.past!r})"

    def __reduce__(self) -> tuple[type[Partition], tuple[tuple[int, ...], int]]:
        return Partition, (self.sizes, self.past)

    @property
    def context(self) -> int:
        """Tokens of the prompt, the sum of the sizes; past not counted."""
        return sum(self.sizes)

    @property
    def ranks(self) -> int:
        """Number of chunks."""
        return len(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """Prefix of each rank in tokens, past included: ``s_i = past + c_0 + … + c_{i-1}``."""
        return tuple(accumulate(self.sizes[:-1], initial=self.past))

    @property
    def ends(self) -> tuple[int, ...]:
        """First position after each rank's chunk, past included."""
        return tuple(start + size for start, size in zip(self.starts, self.sizes, strict=True))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Cut points inside the prompt, from 0 to the context: ``ranks + 1`` numbers, past not counted."""
        return tuple(accumulate(self.sizes, initial=0))

    @property
    def fractions(self) -> tuple[float, ...]:
        """Share of the prompt of each rank; they sum to 1 but for rounding."""
        context = self.context
        return tuple(size / context for size in self.sizes)

    def __str__(self) -> str:
        text = "/".join(str(size) for size in self.sizes)
        return f"{text}+past{self.past}" if self.past else text

    @classmethod
    def even(cls, context: int, ranks: int, quantum: int = 1, past: int = 0) -> Partition:
        """The KVR-E split: sizes that differ by one quantum at most.

        Args:
            context: tokens of the prompt, at least ``ranks * quantum``.
            ranks: number of chunks, at least 1.
            quantum: every boundary but the last is a multiple of this many tokens.

        Raises:
            PartitionError: more ranks than the context has quanta.
        """
        ranks = whole(ranks, "ranks", 1)
        context = whole(context, "context", 1)
        if ranks > context:
            raise PartitionError(
                f"a context of {context} tokens cannot give each of {ranks} ranks a token; use fewer ranks"
            )
        return cls.from_fractions((1.0,) * ranks, context, quantum=quantum, past=past)

    @classmethod
    def from_fractions(
        cls, fractions: Sequence[float], context: int, quantum: int = 1, past: int = 0
    ) -> Partition:
        """Round shares of the prompt to whole chunks that sum exactly to the context.

        Largest remainder: everyone gets the whole quanta of its share (one at least), and the quanta
        left over go to the largest remainders, earlier ranks first among equals. Tokens beyond the last
        whole quantum belong to the last rank.

        Args:
            fractions: non-negative finite shares, one per rank; they need not sum to 1.
            context: tokens of the prompt, at least ``len(fractions) * quantum``.

        Raises:
            PartitionError: negative, NaN or infinite shares, shares that are all zero, or a context too short.
        """
        context = whole(context, "context", 1)
        quantum = whole(quantum, "quantum", 1)
        if context > LONGEST:
            raise PartitionError(f"a context of {context} tokens is beyond {LONGEST}, which shares are exact for")
        ranks = len(fractions)
        if ranks == 0:
            raise PartitionError("a partition needs at least one chunk; got no fractions")
        if any(not math.isfinite(share) or share < 0 for share in fractions):
            raise PartitionError(f"fractions must be finite and not negative; got {tuple(fractions)}")
        largest = max(fractions)
        if largest == 0:
            raise PartitionError(f"fractions must add up to more than 0; got {tuple(fractions)}")
        # Scaled by the largest, neither huge nor tiny shares overflow or vanish in the sum.
        fractions = [share / largest for share in fractions]
        total = math.fsum(fractions)
        quanta = context // quantum
        if quanta < ranks:
            unit = "token" if quantum == 1 else f"quantum of {quantum} tokens"
            raise PartitionError(
                f"a context of {context} tokens cannot give each of {ranks} ranks a {unit}; "
                "use fewer ranks" + ("" if quantum == 1 else " or a smaller quantum")
            )
        ideal = [share / total * quanta for share in fractions]
        counts = [max(1, math.floor(value)) for value in ideal]
        missing = quanta - sum(counts)
        # Chunks lifted to one quantum may have overdrawn the sum; the chunks furthest above their share
        # give back. Otherwise hand out what flooring left.
        while missing < 0:
            giver = max((r for r in range(ranks) if counts[r] > 1), key=lambda r: (counts[r] - ideal[r], -r))
            counts[giver] -= 1
            missing += 1
        for rank in sorted(range(ranks), key=lambda r: (counts[r] - ideal[r], r))[:missing]:
            counts[rank] += 1
        sizes = [count * quantum for count in counts]
        sizes[-1] += context - quanta * quantum
        return cls(sizes, past=past)

    @classmethod
    def from_cuts(cls, cuts: Sequence[float], context: int, quantum: int = 1, past: int = 0) -> Partition:
        """Round inner boundaries, given as growing shares of the prompt, to whole tokens or quanta.

        Single tokens: each boundary to the nearest. Quanta: as many as the prompt begins are dealt out, the last
        of them short where the prompt ends inside it. A quantum begun takes as long as a whole one, and the chunk
        that grows the most, as a share of itself, keeps the others waiting: those that grow the least round up.

        Where a chunk has no whole token, or quantum, sizes are rounded as in `from_fractions`.

        Raises:
            PartitionError: as `from_fractions`.
        """
        if not (type(context) is type(quantum) is type(past) is int) or quantum < 1:
            context, quantum, past = (
                whole(context, "context", 1),
                whole(quantum, "quantum", 1),
                whole(past, "past", 0),
            )
        sizes = _nearest(cuts, context) if quantum == 1 else _dealt(cuts, context, quantum)
        if min(sizes) > 0:
            return cls.trusted(tuple(sizes), past)
        shares = [after - before for before, after in pairwise((0.0, *cuts, 1.0))]
        return cls.from_fractions(shares, context, quantum=quantum, past=past)

    @classmethod
    def from_boundaries(cls, boundaries: Sequence[int], past: int = 0) -> Partition:
        """The partition with these cut points, from 0 to the context, as the paper writes them.

        Raises:
            PartitionError: fewer than two cut points, a first one that is not 0, or points that do not grow.
        """
        if len(boundaries) < 2 or boundaries[0] != 0:
            raise PartitionError(
                f"boundaries start at 0 and end at the context, at least two numbers; got {tuple(boundaries)}"
            )
        if any(after <= before for before, after in pairwise(boundaries)):
            raise PartitionError(f"boundaries must grow from each to the next; got {tuple(boundaries)}")
        return cls((after - before for before, after in pairwise(boundaries)), past=past)

    @classmethod
    def parse(cls, text: str, context: int | None = None) -> Partition:
        """Read sizes written as ``"9728/6656"`` or ``"9728,6656"``.

        Raises:
            PartitionError: no whole numbers, or sizes that do not sum to ``context``.
        """
        try:
            sizes = [int(part) for part in text.replace(",", "/").split("/")]
        except ValueError:
            raise PartitionError(f"a partition is written as sizes, like 9728/6656; got {text!r}") from None
        partition = cls(sizes)
        if context is not None and partition.context != context:
            raise PartitionError(
                f"sizes {partition} sum to {partition.context}, not to the context of {context} tokens"
            )
        return partition


LONGEST = 2**52
"""Tokens up to which shares of a context are exact in double precision."""

EMPTY = 1e-300
"""Of a chunk between two equal cuts, so that it has a growth."""


def _nearest(cuts: Sequence[float], context: int) -> list[int]:
    sizes = []
    before = 0
    for cut in cuts:
        end = int(cut * context + 0.5)
        sizes.append(end - before)
        before = end
    sizes.append(context - before)
    return sizes


def _dealt(cuts: Sequence[float], context: int, quantum: int) -> list[int]:
    # One loop, and nothing that allocates more than it needs: routers ask this for every prompt.
    quanta = left = -(-context // quantum)
    scale = context / quantum
    sizes = []
    growth = []
    before = 0.0
    for cut in cuts:
        ideal = (cut - before) * scale
        before = cut
        count = int(ideal)
        left -= count
        sizes.append(count * quantum)
        growth.append((count + 1) / (ideal or EMPTY))
    ideal = quanta - before * scale
    count = int(ideal)
    left -= count
    sizes.append((count - quanta) * quantum + context)
    growth.append((count + 1) / (ideal or EMPTY))
    for rank in sorted(range(len(sizes)), key=growth.__getitem__)[:left]:
        sizes[rank] += quantum
    return sizes


def whole(value: object, what: str, least: int) -> int:
    """A whole number of any kind (numpy's and torch's too) as a plain one.

    Raises:
        PartitionError: a truth value, a fraction, something else, or less than ``least``.
    """
    if type(value) is int:
        number = value
    else:
        try:
            if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
                raise TypeError
            number = operator.index(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise PartitionError(f"{what} must be a whole number; got {value!r}") from None
    if number < least:
        raise PartitionError(f"{what} must be at least {least}; got {number}")
    return number
