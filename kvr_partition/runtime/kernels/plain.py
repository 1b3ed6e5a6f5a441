"""Attention from torch's elementary operations, on any device."""

from __future__ import annotations

import torch


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any device, dtype and shape; a few hundred query rows at a time, so the scores stay small."""
    batch, heads, rows, _ = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, -1)
    keys, values = key.float().unsqueeze(2), value.float().unsqueeze(2)
    outputs, sums = [], []
    step = 256
    for low in range(0, rows, step):
        part = grouped[..., low : low + step, :].float()
        scores = part @ keys.transpose(-1, -2) * scale
        if bias is not None:
            scores = scores + bias[low : low + step].float()
        if causal:
            row = torch.arange(low, low + part.shape[-2], device=query.device)
            hidden = torch.arange(tokens, device=query.device)[None, :] > row[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        outputs.append((torch.exp(scores - lse[..., None]) @ values).to(query.dtype))
        sums.append(lse)
    output = torch.cat(outputs, dim=-2).reshape(batch, heads, rows, value.shape[-1])
    return output, torch.cat(sums, dim=-1).reshape(batch, heads, rows)
