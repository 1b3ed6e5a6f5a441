"""What fused layers are made of: norms, rotary embedding into KV rows, gated activations, products.

Each takes rows ``[tokens, ...]``. On CUDA a kernel each: torch's own or Liger's where there is one, ours where
there is none. On the CPU they are torch's, which is what tests compare with.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""Activations that MLPs may have."""


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``rows / sqrt(mean(rows²) + epsilon) · weight`` along the last axis, in float32, rounded once."""
    return F.rms_norm(rows, weight.shape, weight, epsilon)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) · up``; may write to ``gate``."""
    if gate.is_cuda and activation == "silu" and (swiglu := _liger_swiglu()) is not None:
        both: torch.Tensor = swiglu(gate, up)[2]
        return both
    return ACTIVATIONS[activation](gate).mul_(up)


def rotate_(
    query: torch.Tensor,
    key: torch.Tensor,
    to_key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """Rotary embedding of halves: queries in place, keys to where they are kept.

    Args:
        query: ``[tokens, heads, dim]``, heads of a token dense.
        key, to_key: ``[tokens, kv_heads, dim]``, likewise; may be the same.
        cos, sin: ``[tokens, dim]``, or of fewer tokens, after which they repeat (the prompts of a batch).
        norms: weights of an RMS norm ``[dim]`` over each head of queries and keys before it, and its epsilon.
    """
    if query.is_cuda:
        from kvr_partition.runtime.fused.triton_ops import rotate_ as fused

        fused(query, key, to_key, cos, sin, norms)
        return
    times = query.shape[0] // cos.shape[0]
    if times > 1:
        cos, sin = (angle.repeat(times, 1) for angle in (cos, sin))
    half = query.shape[2] // 2
    weights = (None, None) if norms is None else norms[:2]
    for source, target, weight in zip((query, key), (query, to_key), weights, strict=True):
        if norms is not None and weight is not None:
            source = rms_norm(source, weight, norms[2])
        low, high = source[..., :half], source[..., half:]
        turned = low * sin[:, None, half:]
        new_low = low * cos[:, None, :half] - high * sin[:, None, :half]
        target[..., half:] = high * cos[:, None, half:] + turned
        target[..., :half] = new_low


def product(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, to: torch.Tensor | None = None
) -> torch.Tensor:
    """``rows · weightᵀ + bias``, ``[tokens, out]``, written to ``to`` where that is given."""
    if bias is None:
        return torch.mm(rows, weight.t()) if to is None else torch.mm(rows, weight.t(), out=to)
    if to is None:
        return torch.addmm(bias, rows, weight.t())
    return torch.addmm(bias, rows, weight.t(), out=to)


def add_product_(
    residual: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """``residual += rows · weightᵀ + bias``: the sum is part of the product and costs no kernel."""
    residual.addmm_(rows, weight.t())
    if bias is not None:
        residual.add_(bias)


@functools.cache
def _liger_swiglu() -> Callable[..., Any] | None:
    """Liger's forward kernel; it takes gate and up projections and returns them and their product."""
    try:
        from liger_kernel.ops.swiglu import swiglu_forward
    except ImportError:
        return None
    found: Callable[..., Any] = swiglu_forward
    return found


def missing_kernels(device: torch.device) -> str:
    """What fused layers lack on a device; empty where nothing does."""
    if device.type != "cuda":
        return ""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _liger_swiglu() is None:
        return "liger-kernel is not installed"
    return ""
