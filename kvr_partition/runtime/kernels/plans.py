"""Which cuDNN plans a thread has, and which are built ahead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvr_partition.runtime.kernels.merging import MOST_MERGED, merge_


def cudnn_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return output, lse.reshape(lse.shape[:3])  # newer versions give it a trailing axis of one


def plain_batch_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The same view; with a batch of one, with the batch stride that follows from the shape.

    A plan is kept by shape and strides, and a slice of a longer tensor would otherwise count as another.
    """
    if tensor.shape[0] != 1:
        return tensor
    return tensor.as_strided(tensor.shape, (tensor.shape[2] * tensor.stride(2), *tensor.stride()[1:]))


@dataclass(frozen=True, slots=True)
class Pattern:
    """What of a call, besides its lengths, decides on a plan."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    dim: int
    strides: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Pattern:
        # Strides of batch and heads may depend on the length; then each length is a pattern of its own.
        return cls(
            query.device,
            query.dtype,
            query.shape[0],
            query.shape[1],
            key.shape[1],
            query.shape[3],
            tuple(
                tensor.stride()[1:] if tensor.shape[0] == 1 else tensor.stride() for tensor in (query, key, value)
            ),
        )

    def tensor(self, which: int, tokens: int) -> torch.Tensor:
        """Random data of this pattern, for query (0), key (1) or value (2)."""
        heads = self.heads if which == 0 else self.kv_heads
        shape = (1, heads, tokens, self.dim)
        strides = (tokens * self.strides[which][1], *self.strides[which])
        data = torch.randn(span(shape, strides), device=self.device, dtype=self.dtype)
        return data.as_strided(shape, strides)

    def merge_parts(self) -> None:
        """Merge any number of parts: each is a kernel to be compiled."""
        for others in range(1, MOST_MERGED):
            part = self.tensor(0, SHORTEST)
            lse = part.new_zeros(part.shape[:3], dtype=torch.float32)
            merge_(part, lse, *((part.clone(), lse) for _ in range(others)))


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a strided tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


SHORTEST, LEAST_PADDED = 256, 128
"""The fewest rows of a plan, and the fewest worth padding to it; fewer go to FlashAttention, which has none."""

SHORTEST_PIECE = 512
"""The fewest tokens of a plan for a rectangle; fewer go to FlashAttention."""


def row_lengths(most: int) -> list[int]:
    """Rows of the plans that are built ahead, up to the first that has ``most``; from 8192 on a 32nd apart."""
    lengths = [SHORTEST]
    while lengths[-1] < most:
        lengths.append(lengths[-1] + row_step(lengths[-1]))
    return lengths


def rows_planned(rows: int) -> int:
    """The fewest of `row_lengths` that hold so many rows."""
    step = row_step(max(rows, SHORTEST) - 1)
    return max(SHORTEST, -(-rows // step) * step)


def query_rows(rows: int) -> int:
    """How many rows to allocate for so many queries, so that none are copied to be padded."""
    return rows if rows < LEAST_PADDED else rows_planned(rows)


def row_step(length: int) -> int:
    return max(SHORTEST, 1 << max(0, length.bit_length() - 6))


def piece_lengths(most: int) -> list[int]:
    """Tokens of the rectangles whose plans are built ahead, longest first.

    Powers of two and half as much again: three of them come within `SHORTEST_PIECE` of any length up to 16k, and
    every piece more costs its output being written and read once.
    """
    powers = [SHORTEST_PIECE << power for power in range(max(0, (most // SHORTEST_PIECE).bit_length()))]
    return sorted({*powers, *(3 * power for power in powers if 3 * power <= most)}, reverse=True)


def planned_shapes(most: int) -> list[tuple[int, int, bool]]:
    """Rows, tokens and whether causal, of all plans for up to ``most`` tokens of a chunk and its prefix."""
    lengths, pieces = row_lengths(most), piece_lengths(most)
    shapes = [(length, length, True) for length in lengths]
    # Some of the rows may be padding, so what is just too long has a plan too.
    for rows in lengths:
        shapes += [(rows, tokens, False) for tokens in pieces if rows + tokens < most + row_step(rows)]
    return shapes


class CudnnPlans:
    """Which cuDNN plans this thread has, since cuDNN keeps them per thread and does not tell.

    After `build_ahead`, a call of an unknown shape is padded and put together from pieces whose plans are
    there, a few percent slower than a plan of its own, and builds nothing. For longer ones, and inside `planning`,
    the plan of the exact shape is built.
    """

    _threads = threading.local()

    def __init__(self) -> None:
        self._known: set[tuple[Pattern, int, int, bool]] = set()
        self._ahead: dict[Pattern, int] = {}
        self._seen: dict[Pattern, None] = {}
        self.exact = False

    @classmethod
    def here(cls) -> CudnnPlans:
        """Those of this thread."""
        plans: CudnnPlans | None = getattr(cls._threads, "plans", None)
        if plans is None:
            plans = cls._threads.plans = cls()
        return plans

    def use(self, pattern: Pattern, rows: int, tokens: int, causal: bool) -> bool:
        """Whether to do this call as it is; False when to do it in pieces."""
        self._seen[pattern] = None
        if (pattern, rows, tokens, causal) in self._known:
            return True
        # What is longer than all plans would take many pieces: for that a plan of its own pays.
        if not self.exact and rows + (0 if causal else tokens) <= self.ahead(pattern):
            return False
        self._known.add((pattern, rows, tokens, causal))
        return True

    def ahead(self, pattern: Pattern) -> int:
        """Up to how many tokens `build_ahead` has built plans of this pattern."""
        return self._ahead.get(pattern, 0)

    def build_ahead(self, most: int) -> int:
        """Build the plans of `planned_shapes` for every pattern this thread has seen.

        Args:
            most: tokens of a chunk and its prefix together.

        Returns:
            How many were built.
        """
        built = 0
        for pattern in list(self._seen):
            if pattern.batch != 1 or self.ahead(pattern) >= most:
                continue
            pattern.merge_parts()
            for rows, tokens, causal in planned_shapes(most):
                if (pattern, rows, tokens, causal) not in self._known:
                    query, key, value = (pattern.tensor(at, n) for at, n in enumerate((rows, tokens, tokens)))
                    cudnn_call(query, key, value, 1.0, causal)
                    self._known.add((pattern, rows, tokens, causal))
                    built += 1
            self._ahead[pattern] = most
        return built


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """While it lasts, kernels of this thread build the plan of every exact shape they meet."""
    plans = CudnnPlans.here()
    before, plans.exact = plans.exact, True
    try:
        yield
    finally:
        plans.exact = before


_without_plans = threading.Lock()

_decoding = 0

_cudnn_was = False


@contextlib.contextmanager
def kernels_without_plans() -> Iterator[None]:
    """While it lasts, torch's own SDPA leaves cuDNN alone.

    On Hopper it takes cuDNN first, which builds a plan for each length, and while decoding every token has another
    one. The switch is the process's: of several that decode at once, the last one out turns it back.
    """
    global _decoding, _cudnn_was
    with _without_plans:
        if _decoding == 0:
            _cudnn_was = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _decoding += 1
    try:
        yield
    finally:
        with _without_plans:
            _decoding -= 1
            if _decoding == 0:
                torch.backends.cuda.enable_cudnn_sdp(_cudnn_was)
