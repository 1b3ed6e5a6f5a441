"""Rotary embedding straight into KV rows, written in Triton, which comes with torch's CUDA builds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HEADS = 16
"""Heads of one token that a program takes together."""


# Strides of rows differ from prompt to prompt only by what is in one row, so no number here depends on lengths but
# those that Triton is told not to specialise on: it would compile anew for some prompt.
@triton.jit(do_not_specialize=["rows_of_angles"])
def _rotate_kernel(  # type: ignore[no-untyped-def]
    query, key, to_key, cos, sin, query_weight, key_weight,
    query_stride, key_stride, to_key_stride, angle_stride,
    rows_of_angles, epsilon,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks = (QUERY_HEADS + BLOCK - 1) // BLOCK
    column = tl.arange(0, WIDTH)
    inside = column < HALF
    angle = (row % rows_of_angles) * angle_stride + column
    cos_low = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    if block < query_blocks:
        head = block * BLOCK + tl.arange(0, BLOCK)
        both = (head < QUERY_HEADS)[:, None] & inside[None, :]
        within = (head * 2 * HALF)[:, None] + column[None, :]
        source = query + row * query_stride + within
        target = source
        weight = query_weight
    else:
        head = (block - query_blocks) * BLOCK + tl.arange(0, BLOCK)
        both = (head < KEY_HEADS)[:, None] & inside[None, :]
        within = (head * 2 * HALF)[:, None] + column[None, :]
        source = key + row * key_stride + within
        target = to_key + row * to_key_stride + within
        weight = key_weight
    low = tl.load(source, mask=both, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=both, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        # Rounded as the norms of torch are: the faster root is off by more than single precision.
        root = tl.sqrt_rn(square / (2 * HALF) + epsilon)
        scale = tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)[:, None]
        low = low * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        high = high * scale * tl.load(weight + HALF + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    kind = to_key.dtype.element_ty
    tl.store(target, (low * cos_low - high * sin_low).to(kind), mask=both)
    tl.store(target + HALF, (high * cos_high + low * sin_high).to(kind), mask=both)


def rotate_(
    query: torch.Tensor,
    key: torch.Tensor,
    to_key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """See `ops.rotate_`, of which this is the CUDA part: all heads dense, only rows with a stride of their own."""
    rows, heads, dim = query.shape
    key_heads, half = key.shape[1], dim // 2
    query_weight, key_weight, epsilon = norms if norms is not None else (query, key, 0.0)
    blocks = triton.cdiv(heads, _HEADS) + triton.cdiv(key_heads, _HEADS)
    _rotate_kernel[(rows, blocks)](
        query, key, to_key, cos, sin, query_weight, key_weight,
        query.stride(0), key.stride(0), to_key.stride(0), cos.stride(0),
        cos.shape[0], epsilon,
        QUERY_HEADS=heads, KEY_HEADS=key_heads, HALF=half, WIDTH=triton.next_power_of_2(half),
        NORM=norms is not None, BLOCK=_HEADS, num_warps=4,
    )  # fmt: skip
