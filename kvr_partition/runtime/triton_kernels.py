"""Small fused CUDA kernels, written in Triton, which comes with torch's CUDA builds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    output, lse, other, other_lse,
    rows, heads,
    output_b, output_h, output_r, other_b, other_h, other_r,
    lse_b, lse_h, lse_r, other_lse_b, other_lse_h, other_lse_r,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    # Heads of one row lie side by side in token-major layout, so they are taken together.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * heads
    row = (at // heads).to(tl.int64)
    head = at % heads
    ours = lse + batch * lse_b + head * lse_h + row * lse_r
    old = tl.load(ours, mask=inside, other=0.0)
    new = tl.load(other_lse + batch * other_lse_b + head * other_lse_h + row * other_lse_r, mask=inside, other=0.0)
    weight = tl.sigmoid(new - old)
    most = tl.maximum(old, new)
    tl.store(ours, most + tl.log(tl.exp(old - most) + tl.exp(new - most)), mask=inside)
    column = tl.arange(0, WIDTH)
    both = inside[:, None] & (column < DIM)[None, :]
    to = output + batch * output_b + (head * output_h + row * output_r)[:, None] + column[None, :]
    mine = tl.load(to, mask=both, other=0.0).to(tl.float32)
    theirs = tl.load(
        other + batch * other_b + (head * other_h + row * other_r)[:, None] + column[None, :], mask=both, other=0.0
    ).to(tl.float32)
    tl.store(to, (mine + weight[:, None] * (theirs - mine)).to(output.dtype.element_ty), mask=both)


def merge(output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """`kernels.merge_` in one pass over memory; the last axis of ``output`` and ``other`` must be dense."""
    batch, heads, rows, dim = output.shape
    # One warp a program: several would each read the log-sum-exp, and one could do so after another wrote it.
    block = 8
    _merge_kernel[(triton.cdiv(rows * heads, block), batch)](
        output, lse, other, other_lse,
        rows, heads,
        *output.stride()[:3], *other.stride()[:3],
        *lse.stride(), *other_lse.stride(),
        DIM=dim, WIDTH=triton.next_power_of_2(dim), BLOCK=block, num_warps=1,
    )  # fmt: skip


@triton.jit
def _hold_kernel(nanoseconds):  # type: ignore[no-untyped-def]
    start = globaltimer()
    while globaltimer() - start < nanoseconds:
        pass


def hold(seconds: float) -> None:
    """Keep the current stream busy for a time, whatever the clocks do; takes one warp of one SM."""
    _hold_kernel[(1,)](int(seconds * 1e9), num_warps=1)


@triton.jit
def _note_time_kernel(mark):  # type: ignore[no-untyped-def]
    tl.store(mark, globaltimer())


@triton.jit
def _hold_since_kernel(mark, nanoseconds):  # type: ignore[no-untyped-def]
    start = tl.load(mark)
    while globaltimer() - start < nanoseconds:
        pass


def note_time(mark: torch.Tensor) -> None:
    """Write the time at which the current stream comes here into ``mark``, one int64, for `hold_since`."""
    _note_time_kernel[(1,)](mark, num_warps=1)


def hold_since(mark: torch.Tensor, seconds: float) -> None:
    """Keep the current stream busy until so long after `note_time`."""
    _hold_since_kernel[(1,)](mark, int(seconds * 1e9), num_warps=1)
