"""Dataset: searched partitions, their machines' priors, and what the regret of other partitions is judged by."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from kvr_partition import jsonfile
from kvr_partition.errors import FileFormatError, PartitionError
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Measurement
from kvr_partition.partition import Partition
from kvr_partition.provenance import Provenance

if TYPE_CHECKING:
    from kvr_partition.search.beliefs import Beliefs

SCHEMA = "kvr-partition/dataset/2"

MOST_QUANTUM = 256
"""No kernel takes more rows at once."""

MachineKey = tuple[str, str, float | None, str, int]
"""Hardware, model, bandwidth, topology, ranks."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One searched partition.

    Attributes:
        origin: ``"measured"`` on hardware, or ``"simulated"``.
        hardware, model, bandwidth, topology, ranks: where; ``bandwidth`` in bytes per second is what links were
            held to, or None.
        context, past: of what.
        prior: what was known of costs before anything was searched.
        sizes: the best partition found.
        trials: every measurement that led to it.
        truth: of a simulated row, the machine that its measurements come from.
        best_s: TTFT in seconds of the best partition of that truth.
        provenance: of the measurements; None of rows that were made up.
    """

    origin: Literal["measured", "simulated"]
    hardware: str
    model: str
    bandwidth: float | None
    topology: Literal["chain", "fanout"]
    ranks: int
    context: int
    past: int
    prior: Machine = msgspec.field(name="told")
    sizes: tuple[int, ...]
    trials: tuple[Measurement, ...]
    truth: Machine | None = None
    best_s: float | None = None
    provenance: Provenance | None = None

    @property
    def machine(self) -> MachineKey:
        """The machine of a row: rows of the same machine differ in context and past only."""
        return self.hardware, self.model, self.bandwidth, self.topology, self.ranks

    @property
    def partition(self) -> Partition:
        """The best one found."""
        return Partition(self.sizes, self.past)

    @property
    def cuts(self) -> tuple[float, ...]:
        """Inner boundaries of the best partition as shares of the context."""
        return tuple(boundary / self.context for boundary in self.partition.boundaries[1:-1])

    @property
    def past_share(self) -> float:
        """``past ÷ (past + context)``."""
        return self.past / (self.past + self.context)

    def regret(self, partition: Partition) -> float:
        """How much longer another partition is expected to take than the best one, as a share."""
        losses = self.losses(partition)
        return math.fsum(losses) / len(losses)

    def losses(self, partition: Partition) -> tuple[float, ...]:
        """How much longer another partition takes than the best one, as shares, each as likely as the others.

        Simulated rows know the truth. Of measured ones it is what their own measurements lead to expect, with all
        its uncertainty: nobody has timed that partition, and the best one is not known either.
        """
        if self.truth is not None and self.best_s is not None:
            return (simulate(partition, self.truth.behind(self.past)).ttft_s / self.best_s - 1,)
        losses = []
        for beliefs, best_s in _believed(self):
            ttft_s = float(beliefs.ttft_s([partition.sizes])[0][0])
            losses.append(ttft_s / min(ttft_s, best_s) - 1)
        return tuple(losses)


DRAWS = 12
"""Of what a measured row's trials lead to expect."""


@functools.lru_cache(maxsize=256)
def _believed(row: Row) -> list[tuple[Beliefs, float]]:
    """Draws of what a measured row's trials lead to expect, and in each TTFT of the best partition."""
    from kvr_partition.search.draws import drawn

    beliefs = drawn(row.prior.behind(row.past), row.context, row.trials, DRAWS)
    known = dict.fromkeys([row.sizes, *(trial.sizes for trial in row.trials if trial.ok)])
    known |= dict.fromkeys(best_split(row.context, row.ranks, one.machine).sizes for one in beliefs)
    return [(one, float(one.ttft_s(list(known))[0].min())) for one in beliefs]


def measured_row(
    provenance: Provenance,
    prior: Machine,
    trials: Sequence[Measurement],
    sizes: tuple[int, ...],
    bandwidth: float | None = None,
) -> Row:
    """The row of one search on hardware.

    Raises:
        PartitionError: trials of several contexts or pasts, or none.
    """
    kinds = {(trial.partition.context, trial.past) for trial in trials}
    if len(kinds) != 1:
        raise PartitionError(f"a row is one search of one context and past; these trials are of {len(kinds)}")
    context, past = kinds.pop()
    return Row(
        origin="simulated" if provenance.backend == "simulate" else "measured",
        hardware=f"{provenance.device}, {provenance.backend}",
        model=provenance.model.name,
        bandwidth=bandwidth,
        topology="fanout" if provenance.topology == "fanout" else "chain",
        ranks=provenance.ranks,
        context=context,
        past=past,
        prior=prior.filed(provenance.ranks),
        sizes=sizes,
        trials=tuple(trials),
        provenance=provenance,
    )


def common_quantum(rows: Sequence[Row]) -> int:
    """What all boundaries searched on one rank count are multiples of, or less where a context has no room for it.

    The even split is on no quantum; where it was the best it says nothing about it.
    """
    uneven = [row for row in rows if row.partition != Partition.even(row.context, row.ranks, past=row.past)]
    common = math.gcd(*(boundary for row in uneven or rows for boundary in row.partition.boundaries[1:-1]))
    shortest = min(rows, key=lambda row: row.context)
    if common > MOST_QUANTUM or common * shortest.ranks > shortest.context:
        # A few boundaries have more in common than the steps of their search, which are powers of two.
        common = min(common & -common, MOST_QUANTUM)
    while common * shortest.ranks > shortest.context:
        common //= 2
    return common


class Dataset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows as one file."""

    rows: tuple[Row, ...]
    schema: str = SCHEMA

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as one JSON file, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        jsonfile.write_atomic(path, msgspec.json.encode(self) + b"\n")


def digest(rows: Sequence[Row]) -> str:
    """SHA-256 of rows."""
    return hashlib.sha256(msgspec.json.encode(list(rows))).hexdigest()


def load_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Read a dataset.

    Raises:
        FileFormatError: none, or rows whose numbers do not fit together.
    """
    found = jsonfile.decode(jsonfile.read_bytes(path), Dataset, SCHEMA, path)
    for index, row in enumerate(found.rows):
        if sum(row.sizes) != row.context or len(row.sizes) != row.ranks or min(row.sizes) < 1 or row.past < 0:
            raise FileFormatError(
                f"{os.fspath(path)}: rows[{index}] has sizes that are no partition of its context"
            )
        links = row.prior.link
        if not isinstance(links, tuple) or len(links) != row.ranks - 1 or len(row.prior.speeds) != row.ranks:
            raise FileFormatError(f"{os.fspath(path)}: rows[{index}] tells of another number of ranks")
    return found
