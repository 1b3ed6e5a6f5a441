"""A small predictor."""

from __future__ import annotations

from kvr_partition import (
    PartitionPredictor,
)
from kvr_partition.machine.cost import ChunkCost
from kvr_partition.predictor import Grid, Regret, Score, Training
from tests.models import provenance

CONTEXTS = (1000, 2000, 5000, 40_000)
SHARES = (0.0, 0.3, 0.8)


COST = ChunkCost(1e-3, 2e-5, 2e-9, 2e-9, 0.2)


def grid(ranks: int) -> Grid:
    rows = tuple(tuple(cuts(ranks, context, share) for context in CONTEXTS) for share in SHARES)
    searched = [
        (context, round(share / (1 - share) * context)) for context in (1000, 5000, 40_000) for share in SHARES
    ]
    return Grid(ranks, CONTEXTS, SHARES, rows, tuple(searched))


def predictor(*counts: int) -> PartitionPredictor:
    scores = (
        Score("corrected", "context", None, Regret(0.002, 0.004, 0.006, 12)),
        Score("corrected", "context", 3, Regret(0.001, 0.002, 0.003, 4)),
        Score("interpolation", "context", None, Regret(0.02, 0.03, 0.05, 12)),
    )
    training = Training("corrected", 12, 9, "0" * 64, scores)
    return PartitionPredictor([grid(ranks) for ranks in counts or (2, 3, 8)], training, COST, provenance())


def cuts(ranks: int, context: int, share: float) -> tuple[float, ...]:
    """Boundaries that bend with context and past share."""
    bend = 0.2 * context / (context + 8000) * (1 - share)
    return tuple(place + bend * place * (1 - place) for place in ((at + 1) / ranks for at in range(ranks - 1)))
