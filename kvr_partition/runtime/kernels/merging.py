"""Results of attention to different tokens, merged by their log-sum-exps."""

from __future__ import annotations

import functools
from typing import Any

import torch

MOST_MERGED = 8
"""Results that the fused kernel takes together; each number of them is to be compiled once."""


def merge_(output: torch.Tensor, lse: torch.Tensor, *others: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fold attention over other keys into ``output`` and ``lse``, in place, as if all had been one softmax.

    With ``w = sigmoid(other_lse − lse)`` the joint result of two is ``(1 − w)·output + w·other``: exact, and
    without the overflow of exponentials. One fused kernel for all on CUDA, where Triton is there.

    Args:
        output: ``[batch, heads, rows, dim]``.
        lse: ``[batch, heads, rows]``, float32.
        others: further outputs with their log-sum-exps, of the same shapes.
    """
    fused = _fused_merge() if output.is_cuda else None
    if fused is not None:
        for first in range(0, len(others), MOST_MERGED - 1):
            fused(output, lse, others[first : first + MOST_MERGED - 1])
        return
    for other, other_lse in others:
        weight = torch.sigmoid(other_lse - lse).unsqueeze(-1).to(output.dtype)
        output.lerp_(other, weight)
        torch.logaddexp(lse, other_lse, out=lse)


def merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All parts in the first one."""
    first, *others = parts
    if others:
        merge_(*first, *others)
    return first


@functools.cache
def _fused_merge() -> Any:
    try:
        from kvr_partition.runtime.triton_kernels import merge
    except ImportError:
        return None
    return merge
