"""How much attention a method computes, counted."""

from __future__ import annotations

from collections.abc import Sequence

from kvr_partition.methods import method_of
from kvr_partition.partition import Partition


def attention_dot_products(
    method: str, partition: Partition, windows: Sequence[int | None], depth: str = "attention"
) -> int:
    """Dot products of a query with a key that all ranks together compute, for one attention head.

    Args:
        method: a key of `METHODS`.
        partition: the chunks.
        windows: of each layer that keeps KV, the tokens a query sees, itself included; None for all.
        depth: at cache depth a chunk is masked against everything it is given, own block included.
    """
    how = method_of(method)
    if not how.attends_densely(depth):
        return sum(_causal(partition, window) for window in windows)
    if how.gathers:
        return len(windows) * partition.context * (partition.past + partition.context)
    return sum(_masked(partition, window) for window in windows)


def _causal(partition: Partition, window: int | None) -> int:
    end = partition.past + partition.context
    return _seen(end, window) - _seen(partition.past, window)


def _seen(tokens: int, window: int | None) -> int:
    """Keys that the first ``tokens`` queries see, in all."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def _masked(partition: Partition, window: int | None) -> int:
    """Of chunks under a mask: what a cache with a window has dropped is not computed."""
    kept = [start if window is None else min(start, window - 1) for start in partition.starts]
    return sum(size * (before + size) for size, before in zip(partition.sizes, kept, strict=True))
