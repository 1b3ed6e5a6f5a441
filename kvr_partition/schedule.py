"""Which partition a cost implies."""

from __future__ import annotations

from kvr_partition.cost import ChunkCost
from kvr_partition.partition import Partition


def balanced(cost: ChunkCost, context: int, ranks: int, quantum: int = 1, past: int = 0) -> Partition:
    """The partition in which every rank computes equally long, waits and transfers left out.

    Args:
        cost: time of a chunk.
        context, ranks, quantum, past: as in `Partition.even`.

    Raises:
        PartitionError: a context too short for so many ranks.
    """
    if cost.per_token_s == cost.per_own_pair_s == 0:
        # Nothing grows with the chunk, so nothing tells one split from another.
        return Partition.even(context, ranks, quantum=quantum, past=past)
    low, high = 0.0, cost.seconds(context, past)
    for _ in range(100):
        middle = (low + high) / 2
        fits = sum(_chunks(cost, middle, ranks, past)) >= context
        low, high = (low, middle) if fits else (middle, high)
    # Chunks are limited only now: limited ones would always sum to the context, give or take rounding.
    fractions: list[float] = []
    for chunk in _chunks(cost, high, ranks, past):
        fractions.append(min(chunk, context - sum(fractions)))
    return Partition.from_fractions(fractions, context, quantum=quantum, past=past)


def _chunks(cost: ChunkCost, seconds: float, ranks: int, past: int) -> list[float]:
    """The longest chunk each rank can compute in that time, one after the other."""
    chunks: list[float] = []
    start = float(past)
    for _ in range(ranks):
        chunks.append(cost.chunk_for(seconds, start))
        start += chunks[-1]
    return chunks
