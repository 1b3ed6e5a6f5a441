"""FlashAttention as torch ships it, on the CPU and on CUDA."""

from __future__ import annotations

import torch

from kvr_partition.runtime.kernels.merging import merge_


def cpu_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's CPU flash kernel. It wants as many KV heads as query heads.

    Grouped heads become a batch of groups that share one KV head with stride 0, so KV is not repeated.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    if groups > 1:
        query = query.reshape(batch * kv_heads, groups, rows, dim)
        key = key.reshape(batch * kv_heads, 1, tokens, dim).expand(-1, groups, -1, -1)
        value = value.reshape(batch * kv_heads, 1, tokens, dim).expand(-1, groups, -1, -1)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        0.0,
        causal,
        attn_mask=None
        if bias is None
        else bias[None, None].expand(query.shape[0], groups, -1, -1)
        if groups > 1
        else bias[None, None],
        scale=scale,
    )
    return output.reshape(batch, heads, rows, dim), lse.reshape(batch, heads, rows)


def cuda_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention as shipped with torch; takes grouped KV heads as they are."""
    assert bias is None
    if query.shape[2] == 1 and query.shape[1] != key.shape[1]:
        # A single row of grouped heads takes another path inside, whose result does not merge.
        twice = query.expand(-1, -1, 2, -1)
        output, lse = cuda_flash(twice, key, value, scale=scale, causal=False, bias=None)
        return output[:, :, :1], lse[:, :, :1]
    if not causal and query.shape[0] == 1 and query.shape[2] <= FEW_ROWS and key.shape[2] >= 2 * SPLIT_TOKENS:
        return _few_rows(query, key, value, scale)
    return flash_call(query, key, value, scale, causal)


def flash_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return output, lse


FEW_ROWS, SPLIT_TOKENS = 256, 1024
"""So few rows keep only some of the SMs busy unless the tokens are split among the others."""


def _few_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few rows to many tokens: `SPLIT_TOKENS` at a time as if they were a batch, then merged."""
    count = key.shape[2] // SPLIT_TOKENS
    whole = count * SPLIT_TOKENS
    keys, values = (
        states[:, :, :whole].unflatten(2, (count, SPLIT_TOKENS)).squeeze(0).transpose(0, 1)
        for states in (key, value)
    )
    outputs, sums = flash_call(query.expand(count, -1, -1, -1), keys, values, scale, False)
    lse = torch.logsumexp(sums, dim=0, keepdim=True)
    weights = torch.exp(sums - lse).unsqueeze(-1)
    output = (outputs * weights).sum(dim=0, keepdim=True).to(query.dtype)
    if whole < key.shape[2]:
        merge_(output, lse, flash_call(query, key[:, :, whole:], value[:, :, whole:], scale, False))
    return output, lse
