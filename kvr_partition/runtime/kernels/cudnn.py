"""cuDNN's attention; a shape without a plan is put together from pieces whose plans were built ahead."""

from __future__ import annotations

import functools

import torch

from kvr_partition.runtime.kernels import plans
from kvr_partition.runtime.kernels.flash import cuda_flash
from kvr_partition.runtime.kernels.merging import merged
from kvr_partition.runtime.kernels.plans import (
    LEAST_PADDED,
    CudnnPlans,
    Pattern,
    piece_lengths,
    plain_batch_stride,
    row_step,
    rows_planned,
    span,
)


def cuda_cudnn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's fused attention: about twice FlashAttention-2 on Hopper; takes grouped KV heads as they are.

    It builds a plan for every new shape (some 40 ms). See `CudnnPlans` for how a cold shape avoids that.
    """
    assert bias is None
    return merged(cudnn_parts(query, key, value, scale, causal))


def cudnn_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same, unmerged."""
    query, key, value = (plain_batch_stride(states) for states in (query, key, value))
    known = CudnnPlans.here()
    pattern = Pattern.of(query, key, value)
    rows, tokens = query.shape[2], key.shape[2]
    if known.use(pattern, rows, tokens, causal):
        return [plans.cudnn_call(query, key, value, scale, causal)]
    return _attend_in_pieces(query, key, value, scale, causal, known.ahead(pattern))


def split_length(length: int, most: int) -> tuple[list[tuple[int, int]], int]:
    """Runs ``(start, end)`` of `piece_lengths` up to ``most`` that fill a length, and where they end."""
    runs, at = [], 0
    for size in piece_lengths(most):
        while length - at >= size:
            runs.append((at, at + size))
            at += size
    return runs, at


def _attend_in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool, most: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention from plans that exist; what is too short for any of them goes to FlashAttention.

    Rows are padded to a length that has a plan: leaving some over would read all tokens once more for them, and
    put the parts of the output together.

    Returns:
        Attention to some tokens after the other, to be merged.
    """
    if causal:
        return [_own(query, key, value, scale)]
    return _rectangle(query, key, value, scale, most)


def _own(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention; no row sees the padding behind it."""
    rows = query.shape[2]
    if rows < LEAST_PADDED:
        return cuda_flash(query, key, value, scale=scale, causal=True, bias=None)
    planned = rows_planned(rows)
    key, value = (_padded(states, planned) for states in (key, value))
    output, lse = plans.cudnn_call(_padded_query(query, planned), key, value, scale, True)
    return output[:, :, :rows], lse[:, :, :rows]


def _rectangle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, most: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention of all rows to all tokens, some tokens after the other."""
    rows, tokens = query.shape[2], key.shape[2]
    if rows < LEAST_PADDED:
        return [cuda_flash(query, key, value, scale=scale, causal=False, bias=None)]
    planned = rows_planned(rows)
    padded = _padded_query(query, planned)
    runs, end = split_length(tokens, most + row_step(planned) - 1 - planned)
    parts = []
    for low, high in runs:
        some, their = (plain_batch_stride(states[:, :, low:high]) for states in (key, value))
        parts.append(plans.cudnn_call(padded, some, their, scale, False))
    if end < tokens:
        rest = key[:, :, end:], value[:, :, end:]
        parts.append(cuda_flash(query, *rest, scale=scale, causal=False, bias=None))
    return [(output[:, :, :rows], lse[:, :, :rows]) for output, lse in parts]


def _padded_query(query: torch.Tensor, rows: int) -> torch.Tensor:
    """Queries and as many rows more as are missing, whatever is in them: what comes of those is left out.

    Where there is memory behind them nothing is copied; see `query_rows`.
    """
    shape, strides = _shape_of(query, rows)
    # Of several prompts, rows of the next one lie behind those of one.
    behind = (query.untyped_storage().nbytes() // query.itemsize - query.storage_offset()) * (query.shape[0] == 1)
    return query.as_strided(shape, strides) if span(shape, strides) <= behind else _padded(query, rows)


def _shape_of(given: torch.Tensor, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of so many rows, as plans are made for."""
    batch, heads, _, dim = given.shape
    return (batch, heads, rows, dim), (rows * given.stride(2), *given.stride()[1:])


def _padded(given: torch.Tensor, rows: int) -> torch.Tensor:
    """The same rows and as many zeros as are missing, with the strides that plans are made for."""
    tokens = given.shape[2]
    if tokens == rows:
        return plain_batch_stride(given)
    shape, strides = _shape_of(given, rows)
    whole = given.new_empty(span(shape, strides)).as_strided(shape, strides)
    whole[:, :, :tokens] = given
    whole[:, :, tokens:] = 0
    return whole


@functools.cache
def _cudnn_fits(device_index: int) -> bool:
    """Whether a GPU and the cuDNN that is there have the fused attention (Ampere or newer)."""
    return (
        torch.backends.cudnn.is_available()
        and torch.backends.cudnn.version() >= 90000
        and torch.cuda.get_device_capability(device_index) >= (8, 0)
        and hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention")
    )


def cudnn_takes(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.shape[-1] % 8 == 0 and key.shape[2] >= 64 and _cudnn_fits(query.get_device())
