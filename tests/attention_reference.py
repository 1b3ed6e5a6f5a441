"""Attention written down, and how close others must be to it."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = query.shape[1] // key.shape[1]
    query, key, value = (one.double().cpu() for one in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def close(found: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((found.double().cpu() - right).abs().max() <= TOLERANCE[dtype] * right.abs().max())
