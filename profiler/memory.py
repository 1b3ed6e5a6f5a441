"""How much memory a prefill takes on a GPU, so that what cannot fit is refused before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvr_partition.errors import UnsupportedError
from kvr_partition.partition import Partition
from kvr_partition.runtime.fused.layers import MLP_ROWS
from kvr_partition.runtime.links.plan import visible_prefix
from kvr_partition.runtime.rows import LayerKV

APART = 2 << 30
"""Bytes that everything else takes at most: the CUDA context, workspaces, plans, recorded launches."""

_WIDTHS = 8
"""Tensors as long as a chunk that are there at once, counted as the widest: the residual, what attention reads,
queries, keys before they are rotated, what attention makes, padded copies of some of them."""

_STOCK_WIDTHS = 14
"""The same where layers are the model's own: norms and rotary embeddings keep copies, in single precision."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides how much memory a prefill takes.

    Attributes:
        layers: what each layer keeps of a token.
        hidden, queries, inner: widths of the residual, of all queries, and inside the MLP.
        itemsize: bytes of a number.
        batch: prompts read at once.
        fused: whether an MLP takes some rows at a time.
    """

    layers: Sequence[LayerKV | None]
    hidden: int
    queries: int
    inner: int
    itemsize: int
    batch: int
    fused: bool

    def kv(self, tokens: int) -> int:
        """Bytes of KV that a rank keeps which can see so many tokens, window by window."""
        return sum(
            visible_prefix(tokens, layer.window) * layer.entry(self.batch) * self.itemsize
            for layer in self.layers
            if layer is not None
        )

    def working(self, tokens: int) -> int:
        """Bytes, at most, of all that a chunk of so many tokens needs besides."""
        rows = tokens * self.batch
        widths = (_WIDTHS if self.fused else _STOCK_WIDTHS) * max(self.hidden, self.queries)
        inner = 3 * self.inner * (min(rows, MLP_ROWS) if self.fused else rows)
        return (rows * widths + inner) * self.itemsize + APART


def check_fits(shape: Shape, partition: Partition, weights: int, memory: int, together: bool) -> None:
    """Refuse a split that a GPU has no room for.

    Args:
        weights: bytes of the model.
        memory: bytes of the GPU; 0 where that is not known.
        together: whether all ranks share one GPU and the weights.

    Raises:
        UnsupportedError: which rank needs how much of what.
    """
    if not memory:
        return
    chunks = list(zip(partition.sizes, partition.ends, strict=True))
    if together:
        kv = sum(shape.kv(end) for _, end in chunks)
        working = sum(shape.working(size) - APART for size, _ in chunks) + APART
        needs = [("the ranks of this GPU", kv, working)]
    else:
        needs = [(f"rank {rank}", shape.kv(end), shape.working(size)) for rank, (size, end) in enumerate(chunks)]
    who, kv, working = max(needs, key=lambda need: need[1] + need[2])
    if weights + kv + working > memory:
        text = ", ".join(
            f"{what} {size / 2**30:.1f}" for what, size in (("weights", weights), ("KV", kv), ("working", working))
        )
        plural = "need" if together else "needs"
        raise UnsupportedError(
            f"context {partition.context} does not fit: {who} {plural} up to "
            f"{(weights + kv + working) / 2**30:.1f} GiB ({text}), and the GPU has {memory / 2**30:.1f}; use a "
            "shorter context, a smaller batch or a half-precision dtype"
            + ("" if together else ", or more ranks if chunks are what takes it")
        )
