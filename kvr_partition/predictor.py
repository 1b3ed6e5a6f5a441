"""PartitionPredictor: the trained KVR-P that serving code imports; needs nothing but msgspec."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import lt
from typing import Literal

import msgspec

from kvr_partition import jsonfile
from kvr_partition.errors import FileFormatError, OutOfRangeError, PartitionError
from kvr_partition.hull import Hull
from kvr_partition.machine.cost import ChunkCost
from kvr_partition.partition import Partition, whole
from kvr_partition.provenance import Provenance
from kvr_partition.table import Lookup

SCHEMA = "kvr-partition/predictor/3"

Fallback = Literal["cost-model", "even"]

MOST_RANKS, MOST_NODES, MOST_TOKENS = 1024, 1_000_000, 1 << 40
"""Beyond these a file is nobody's predictor."""


class Regret(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TTFT of predicted partitions over that of the best ones, minus 1.

    Attributes:
        mean: over all cases.
        p95, max: 95th percentile and largest. Of measured partitions each case counts with what is uncertain about
            it, the fewer cases the more.
        cases: contexts, left out one at a time.
    """

    mean: float
    p95: float
    max: float
    cases: int


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one way to predict lost on data that it had not seen.

    Attributes:
        method: how it predicts.
        held_out: what was left out at a time: ``"context"``, ``"past"``, ``"model"``, ``"bandwidth"`` or
            ``"hardware"``.
        ranks: on so many ranks; None for all together.
    """

    method: str
    held_out: str
    ranks: int | None
    regret: Regret


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a predictor was made from.

    Attributes:
        method: the way to predict that lost least, which this predictor keeps.
        rows: searched partitions it learnt from; ``measured`` of them on hardware, the rest simulated.
        digest: SHA-256 of those rows.
        scores: of every way that was tried.
    """

    method: str
    rows: int
    measured: int
    digest: str
    scores: tuple[Score, ...]


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Boundaries of one rank count at some contexts and past shares, between which they are interpolated.

    Attributes:
        ranks: chunks of a partition.
        contexts: of the nodes, ascending, in tokens.
        past_shares: of the nodes, ``past ÷ (past + context)``, ascending.
        boundaries: ``[past shares][contexts][ranks - 1]`` inner boundaries as shares of the context.
        searched: contexts and pasts that partitions were searched at. Nothing is predicted outside their `Hull`.
        quantum: boundaries are multiples of so many tokens, as the searched ones are: an odd number of rows can
            take some percent longer than an even one.
        whole: whether every multiple of the quantum in the range is a node, and its boundaries lie on such. Where
            chunk sizes go well or badly one by one nothing is interpolated: a context takes the node above it, and
            the last chunk is short by what it lacks.
        speeds: of each rank, relative to the cost of a chunk, for ``fallback="cost-model"``; alike when empty.
    """

    ranks: int
    contexts: tuple[int, ...]
    past_shares: tuple[float, ...]
    boundaries: tuple[tuple[tuple[float, ...], ...], ...]
    searched: tuple[tuple[int, int], ...]
    quantum: int = 1
    whole: bool = False
    speeds: tuple[float, ...] = ()

    @property
    def wrong(self) -> str | None:
        """Why nothing can be predicted from it, or None."""
        if not 2 <= self.ranks <= MOST_RANKS:
            return f"ranks must be 2 to {MOST_RANKS}"
        if not self.contexts or self.contexts[0] < self.ranks or not _grows(self.contexts):
            return "contexts must grow, from at least as many tokens as ranks"
        if self.contexts[-1] > MOST_TOKENS:
            return f"no prompt has more than {MOST_TOKENS} tokens"
        if self.quantum < 1 or self.quantum * self.ranks > self.contexts[0]:
            return "quantum must be at least 1 and leave every rank one"
        if not self.past_shares or not _grows(self.past_shares):
            return "past_shares must grow"
        if self.past_shares[0] < 0 or self.past_shares[-1] >= 1:
            return "past_shares lie in [0, 1)"
        if self.speeds and (len(self.speeds) != self.ranks or min(self.speeds) <= 0):
            return f"speeds must be {self.ranks} numbers above 0, or none"
        if len(self.past_shares) * len(self.contexts) * self.ranks > MOST_NODES:
            return f"more than {MOST_NODES} nodes"
        if len(self.boundaries) != len(self.past_shares) or any(
            len(rows) != len(self.contexts) for rows in self.boundaries
        ):
            return "boundaries must have a row for each past share and context"
        for rows in self.boundaries:
            for cuts in rows:
                if len(cuts) != self.ranks - 1 or not _grows((0.0, *cuts, 1.0)):
                    return f"boundaries must be {self.ranks - 1} growing shares between 0 and 1"
        if not self.searched or not all(self._has(context, past) for context, past in self.searched):
            return "searched contexts and pasts must lie among the nodes, one at least"
        if self.whole:
            first = self.contexts[0]
            if any(context != first + at * self.quantum for at, context in enumerate(self.contexts)) or (
                first % self.quantum
            ):
                return f"contexts must be every multiple of {self.quantum} tokens where boundaries are whole"
            if any(min(sizes) < 1 for rows in self.sizes for sizes in rows):
                return f"boundaries must lie on different multiples of {self.quantum} tokens"
        return None

    def _has(self, context: int, past: int) -> bool:
        """Whether nodes surround a context and past, which may be off by a token."""
        if not self.contexts[0] <= context <= self.contexts[-1] or not 0 <= past <= MOST_TOKENS:
            return False
        return self.past_shares[0] - 1 / context <= past / (past + context) <= self.past_shares[-1] + 1 / context

    @property
    def sizes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Of a `whole` grid: ``[past shares][contexts][ranks]``, its nodes' chunk sizes."""
        return tuple(
            tuple(
                tuple(
                    (round(after * context / self.quantum) - round(before * context / self.quantum)) * self.quantum
                    for before, after in pairwise((0.0, *cuts, 1.0))
                )
                for context, cuts in zip(self.contexts, rows, strict=True)
            )
            for rows in self.boundaries
        )


class Explanation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What there is to expect of a prediction.

    Attributes:
        inside: whether it lies in the range that was trained.
        reason: why not, or what surrounds it.
        method: how it is predicted.
        nearest: the searched contexts around it.
        regret: what that lost on contexts that it had not seen; None where that was not measured.
    """

    inside: bool
    reason: str
    method: str
    nearest: tuple[int, ...]
    regret: Regret | None


class PredictorFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A predictor as a file keeps it."""

    schema: str
    provenance: Provenance | None
    training: Training
    cost: ChunkCost
    grids: tuple[Grid, ...]


class PartitionPredictor:
    """Predicts the partition of any context inside the range it was trained for; immutable, for any thread.

    Additions, multiplications and divisions are all it does, in one order, so every platform gets the same tokens.

    Args:
        grids: one for each rank count.
        training: what it was made from.
        cost: of a chunk, for ``fallback="cost-model"``.
        provenance: of the machine it is for; None for a simulated one.

    Raises:
        PartitionError: no grid, two for a rank count, or one that makes no sense.

    Example:
        >>> grid = Grid(2, (8, 16), (0.0,), (((0.5,), (0.75,)),), ((8, 0), (16, 0)))
        >>> cost = ChunkCost(0.0, 1.0, 0.0, 0.0, 0.0)
        >>> predictor = PartitionPredictor([grid], Training("interpolation", 2, 2, "", ()), cost)
        >>> predictor.predict(12)
        Lookup(partition=Partition(sizes=(8, 4), past=0), source='predicted')
    """

    def __init__(
        self,
        grids: Iterable[Grid],
        training: Training,
        cost: ChunkCost,
        provenance: Provenance | None = None,
    ) -> None:
        self._grids: dict[int, Grid] = {}
        for grid in sorted(grids, key=lambda one: one.ranks):
            if grid.wrong is not None:
                raise PartitionError(f"grid of {grid.ranks} ranks: {grid.wrong}")
            if grid.ranks in self._grids:
                raise PartitionError(f"two grids for {grid.ranks} ranks; keep one")
            self._grids[grid.ranks] = grid
        if not self._grids:
            raise PartitionError("a predictor needs a grid for one rank count at least")
        if cost.wrong is not None:
            raise PartitionError(cost.wrong)
        self._hulls = {ranks: Hull(grid.searched) for ranks, grid in self._grids.items()}
        self._without_past = {ranks: hull.without_past for ranks, hull in self._hulls.items()}
        self._whole = {ranks: grid.sizes for ranks, grid in self._grids.items() if grid.whole}
        self._only = next(iter(self._grids)) if len(self._grids) == 1 else None
        self._training = training
        self._cost = cost
        self._provenance = provenance

    def hull(self, ranks: int) -> Hull:
        """What it answers for so many ranks without a fallback.

        Raises:
            OutOfRangeError: it was not trained for so many.
        """
        if ranks not in self._hulls:
            raise OutOfRangeError(f"not trained for {ranks} ranks, but for {_several(self._grids)}")
        return self._hulls[ranks]

    @property
    def grids(self) -> tuple[Grid, ...]:
        """What it interpolates in, by ranks."""
        return tuple(self._grids.values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank counts it was trained for."""
        return tuple(self._grids)

    @property
    def training(self) -> Training:
        """What it was made from."""
        return self._training

    @property
    def cost(self) -> ChunkCost:
        """Of a chunk on the machine it is for."""
        return self._cost

    @property
    def provenance(self) -> Provenance | None:
        """The machine it is for."""
        return self._provenance

    def predict(
        self,
        context: int,
        ranks: int | None = None,
        past: int = 0,
        *,
        quantum: int | None = None,
        fallback: Fallback | None = None,
    ) -> Lookup:
        """The partition for a context.

        Args:
            context: tokens of the prompt.
            ranks: how many; may be left out when it was trained for one rank count only.
            past: tokens in the cache before the prompt.
            quantum: boundaries are multiples of so many tokens; as those it was trained on when None.
            fallback: what to do outside the trained range instead of raising: ``"cost-model"`` (equal work by the
                cost of a chunk) or ``"even"``. The result's ``source`` then says so.

        Raises:
            OutOfRangeError: outside the trained range, without a fallback.
            PartitionError: fewer tokens than ranks or their quanta, or numbers that are none.
        """
        if ranks is None:
            ranks = self._only
        if type(context) is not int or type(past) is not int:
            context, past = whole(context, "context", 1), whole(past, "past", 0)
        grid = None if ranks is None else self._grids.get(ranks)
        if grid is not None and past >= 0:
            if past:
                inside = self._hulls[grid.ranks].holds(context, past)
                share = past / (past + context)
            else:
                least, most = self._without_past[grid.ranks]
                inside, share = least <= context <= most, 0.0
            if inside:
                contexts, shares = grid.contexts, grid.past_shares
                # A past in whole tokens can be a share just beside the last node's.
                share = min(max(share, shares[0]), shares[-1])
                if grid.whole and quantum in (None, grid.quantum):
                    node = -(-context // grid.quantum) - contexts[0] // grid.quantum
                    row = bisect_right(shares, share) - 1
                    if share == shares[row]:
                        sizes = self._whole[grid.ranks][row][node]
                        short = contexts[node] - context
                        return Lookup(Partition.trusted((*sizes[:-1], sizes[-1] - short), past), "predicted")
                cuts = _between(grid, context, share)
                unit = grid.quantum if quantum is None else quantum
                return Lookup(Partition.from_cuts(cuts, context, unit, past), "predicted")
        return self._outside(context, ranks, past, quantum or 1, fallback)

    def explain(self, context: int, ranks: int | None = None, past: int = 0) -> Explanation:
        """What there is to expect of `predict` with the same arguments."""
        context, past = whole(context, "context", 1), whole(past, "past", 0)
        ranks = self._only if ranks is None else ranks
        method = self._training.method
        reason = self._why_not(context, ranks, past)
        if reason is not None or ranks is None or ranks == 1:
            return Explanation(ranks == 1, reason or "one rank takes all", method, (), None)
        trained = sorted({length for length, _ in self._grids[ranks].searched})
        below = [length for length in trained if length <= context][-1:]
        above = [length for length in trained if length >= context][:1]
        nearest = tuple(dict.fromkeys((*below, *above)))
        known = [
            score.regret
            for score in self._training.scores
            if score.method == method and score.held_out == "context" and score.ranks in (ranks, None)
        ]
        # That of this rank count, if it was told apart.
        regret = next(iter(known[::-1]), None)
        text = " and ".join(str(length) for length in nearest)
        return Explanation(True, f"searched at {text} tokens" if text else "searched", method, nearest, regret)

    def to_json(self) -> bytes:
        """The predictor as a file of the newest schema."""
        return jsonfile.encode(PredictorFile(SCHEMA, self._provenance, self._training, self._cost, self.grids))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the predictor as one JSON file, whole or not at all.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        jsonfile.write_atomic(path, self.to_json())

    @classmethod
    def from_json(cls, content: bytes, path: str | os.PathLike[str] = "predictor") -> PartitionPredictor:
        """The predictor that a JSON document describes; ``path`` only names it in errors.

        Raises:
            FileFormatError: another schema, a torn file, or values that predict nothing.
        """
        file = jsonfile.decode(content, PredictorFile, SCHEMA, path)
        try:
            return cls(file.grids, file.training, file.cost, file.provenance)
        except PartitionError as error:
            raise FileFormatError(f"{os.fspath(path)}: {error}; train it anew") from None

    def _outside(
        self, context: int, ranks: int | None, past: int, quantum: int, fallback: Fallback | None
    ) -> Lookup:
        if ranks is None:
            raise OutOfRangeError(f"trained for {_several(self._grids)} ranks; say which with ranks=")
        even = Partition.even(context, ranks, quantum=quantum, past=past)
        if ranks == 1 or fallback == "even":
            return Lookup(even, "even")
        if fallback == "cost-model":
            from kvr_partition.machine.solve import balanced

            speeds = self._grids[ranks].speeds if ranks in self._grids else ()
            split = balanced(self._cost, context, ranks, quantum=quantum, past=past, speeds=speeds)
            return Lookup(split, "cost-model")
        if fallback is not None:
            raise OutOfRangeError(f"there is no fallback {fallback!r}; use 'cost-model' or 'even'")
        reason = self._why_not(context, ranks, past)
        raise OutOfRangeError(f"{reason}; train it on such partitions, or ask with fallback=")

    def _why_not(self, context: int, ranks: int | None, past: int) -> str | None:
        if ranks is None:
            return f"trained for {_several(self._grids)} ranks, none was named"
        if ranks == 1:
            return None
        grid = self._grids.get(ranks)
        if grid is None:
            return f"not trained for {ranks} ranks, but for {_several(self._grids)}"
        hull = self._hulls[ranks]
        low, high = hull.contexts
        if not low <= context <= high:
            return f"context {context} is outside the trained range of {low} to {high} tokens for {ranks} ranks"
        if not hull.holds(context, past):
            found = hull.pasts(context)
            there = "nothing" if found is None else _span(*found)
            return f"past {past} is outside the trained range for {ranks} ranks, {there} at {context} tokens"
        return None


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _between(grid: Grid, context: int, share: float) -> Sequence[float]:
    """Boundaries interpolated between the nearest nodes."""
    contexts, shares = grid.contexts, grid.past_shares
    at = bisect_right(contexts, context) - 1
    rows = grid.boundaries
    row = 0 if len(shares) == 1 else min(bisect_right(shares, share) - 1, len(shares) - 2)
    low = _along(rows[row], contexts, at, context)
    if len(shares) == 1 or share == shares[row]:
        return low
    high = _along(rows[row + 1], contexts, at, context)
    weight = (share - shares[row]) / (shares[row + 1] - shares[row])
    return [below + weight * (above - below) for below, above in zip(low, high, strict=True)]


def _along(rows: Sequence[Sequence[float]], contexts: Sequence[int], at: int, context: int) -> Sequence[float]:
    start = contexts[at]
    if context == start:
        return rows[at]
    weight = (context - start) / (contexts[at + 1] - start)
    return [below + weight * (above - below) for below, above in zip(rows[at], rows[at + 1], strict=True)]


def _grows(values: Sequence[float]) -> bool:
    return all(map(lt, values, values[1:]))


def _several(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)
