"""Small fused CUDA kernels, written in Triton, which comes with torch's CUDA builds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def _place(odd_strides, batch, head, row):  # type: ignore[no-untyped-def]
    return (
        batch * ((odd_strides[0] - 3) // 2)
        + head * ((odd_strides[1] - 3) // 2)
        + row * ((odd_strides[2] - 3) // 2)
    )


# Triton compiles a kernel anew for the first number that is no multiple of 16, and numbers here depend on lengths:
# some prompt would wait for it. In tuples it cannot be told not to, so strides are given as odd numbers.
@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    outputs, lses, strides, odd_lse_strides,
    rows, heads,
    COUNT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    # Heads of one row lie side by side in token-major layout, so they are taken together.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * heads
    row = (at // heads).to(tl.int64)
    head = at % heads
    column = tl.arange(0, WIDTH)
    both = inside[:, None] & (column < DIM)[None, :]
    ours = lses[0] + _place(odd_lse_strides[0], batch, head, row)
    lse = tl.load(ours, mask=inside, other=0.0)
    places = batch * strides[0][0] + (head * strides[0][1] + row * strides[0][2])[:, None] + column[None, :]
    to = outputs[0] + places
    output = tl.load(to, mask=both, other=0.0).to(tl.float32)
    for one in tl.static_range(1, COUNT):
        theirs = _place(odd_lse_strides[one], batch, head, row)
        new = tl.load(lses[one] + theirs, mask=inside, other=0.0)
        places = (
            batch * strides[one][0] + (head * strides[one][1] + row * strides[one][2])[:, None] + column[None, :]
        )
        other = tl.load(outputs[one] + places, mask=both, other=0.0).to(tl.float32)
        output += tl.sigmoid(new - lse)[:, None] * (other - output)
        most = tl.maximum(lse, new)
        lse = most + tl.log(tl.exp(lse - most) + tl.exp(new - most))
    tl.store(ours, lse, mask=inside)
    tl.store(to, output.to(outputs[0].dtype.element_ty), mask=both)


def merge(output: torch.Tensor, lse: torch.Tensor, others: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """`kernels.merge_` in one pass over memory; the last axis of all outputs must be dense.

    How many there are makes another kernel; see `kernels.MOST_MERGED`.
    """
    batch, heads, rows, dim = output.shape
    # One warp a program: several would each read the log-sum-exp, and one could do so after another wrote it.
    block = 8
    parts = [(output, lse), *others]
    _merge_kernel[(triton.cdiv(rows * heads, block), batch)](
        tuple(one for one, _ in parts), tuple(one for _, one in parts),
        tuple(one.stride()[:3] for one, _ in parts),
        tuple(tuple(2 * stride + 3 for stride in one.stride()) for _, one in parts),
        rows, heads,
        COUNT=len(parts), DIM=dim, WIDTH=triton.next_power_of_2(dim), BLOCK=block, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["nanoseconds"])
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


@triton.jit(do_not_specialize=["nanoseconds"])
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
