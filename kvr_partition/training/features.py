"""Dimensionless features of a partition's boundaries: what the best place of each depends on."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from kvr_partition.machine.machine import Machine
from kvr_partition.machine.solve import best_split
from kvr_partition.training.dataset import MachineKey, Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

NAMES = (
    "place",  # of the boundary if the split were even
    "room",  # place · (1 − place)
    "inverse ranks",
    "attention",  # share of all work on one rank
    "fixed",  # share of a rank's work that does not depend on its chunk
    "communication",  # time of the busiest link ÷ that and a rank's work
    "before KV",  # share of the work per token
    "past",  # share of all tokens
    "speed so far",  # share of all speed up to the boundary, beyond its place
    "speed before",  # of the rank before the boundary, relative to the mean
    "speed after",
    "link",  # slowness of the boundary's link, relative to the mean
    "overlap",
    "fan-out",
)


@dataclass(frozen=True)
class Query:
    """What is to be predicted: a context and past on a machine, and what is known of its costs."""

    machine: MachineKey
    prior: Machine
    context: int
    past: int

    @classmethod
    def of(cls, row: Row) -> Query:
        """The question that a row answers."""
        return cls(row.machine, row.prior, row.context, row.past)

    @property
    def ranks(self) -> int:
        """Chunks of the partition."""
        return self.machine[4]

    @property
    def past_share(self) -> float:
        """``past ÷ (past + context)``."""
        return self.past / (self.past + self.context)


def features(query: Query) -> Array:
    """``[boundaries, features]`` in the order of `NAMES`."""
    import numpy as np

    prior, ranks, context, past = query.prior, query.ranks, query.context, query.past
    cost, links = prior.cost, prior.links(ranks)
    tokens, *pairs = cost.smooth.parts(context, past)
    attention = sum(pairs)
    work = tokens + attention + cost.fixed_s * (ranks - 1)
    slowest = max(link.seconds_per_byte for link in links)
    carried = context * prior.entry_bytes * prior.layers * slowest
    mean_speed = sum(prior.speeds) / ranks
    mean_link = sum(link.seconds_per_byte for link in links) / len(links)
    so_far = list(itertools.accumulate(speed / mean_speed / ranks for speed in prior.speeds))
    rows = []
    for at in range(ranks - 1):
        place = (at + 1) / ranks
        rows.append(
            [
                place,
                place * (1 - place),
                1 / ranks,
                attention / work,
                cost.fixed_s * ranks / work,
                carried / (carried + work / ranks),
                cost.kv_share,
                query.past_share,
                so_far[at] - place,
                prior.speeds[at] / mean_speed - 1,
                prior.speeds[at + 1] / mean_speed - 1,
                links[at].seconds_per_byte / mean_link - 1 if mean_link else 0.0,
                float(prior.overlap),
                float(prior.topology == "fanout"),
            ]
        )
    return np.array(rows)


def places(ranks: int) -> list[float]:
    """Boundaries of the even split as shares of the context."""
    return [(at + 1) / ranks for at in range(ranks - 1)]


@functools.lru_cache(maxsize=100_000)
def solved(machine: Machine, context: int, ranks: int) -> tuple[float, ...]:
    """Boundaries of a machine's best split as shares of the context, without size effects."""
    found = best_split(context, ranks, msgspec.structs.replace(machine, cost=machine.cost.smooth))
    return tuple(boundary / context for boundary in found.boundaries[1:-1])
