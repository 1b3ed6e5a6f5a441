"""Every kernel, the merge and the window against attention written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition.runtime.attention import attend_chunk
from kvr_partition.runtime.kernels import KERNELS, merge_
from tests.attention_reference import TOLERANCE, close, reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def token_major(batch: int, heads: int, tokens: int, dim: int, like: dict[str, Any]) -> torch.Tensor:
    """A strided view, as the cache hands them out."""
    return (
        torch.randn(tokens, batch, 2 * heads * dim, **like)[..., : heads * dim]
        .view(tokens, batch, heads, dim)
        .permute(1, 2, 0, 3)
    )


CHOICES = [
    (choice, dtype, device)
    for choice in KERNELS
    for device in DEVICES
    for dtype in (choice.dtypes or tuple(TOLERANCE))
    if choice.device in (None, device)
]


@pytest.mark.parametrize(
    ("choice", "dtype", "device"), CHOICES, ids=[f"{c.name}-{str(t)[6:]}-{d}" for c, t, d in CHOICES]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("case", ["causal", "rectangle", "one row", "bias"])
def test_a_kernel_returns_attention_and_its_log_sum_exp(
    choice: Any, dtype: torch.dtype, device: str, heads: int, kv_heads: int, batch: int, case: str
) -> None:
    torch.manual_seed(0)
    rows, tokens, dim = {"causal": (70, 70, 64), "one row": (1, 301, 64)}.get(case, (70, 301, 64))
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    query = token_major(batch, heads, rows, dim, like)
    key, value = (token_major(batch, kv_heads, tokens, dim, like) for _ in range(2))
    visible = torch.ones(rows, tokens, dtype=torch.bool)
    bias = None
    if case == "causal":
        visible = visible.tril()
    if case == "bias":
        visible = torch.rand(rows, tokens) > 0.5
        visible[:, 0] = True
        bias = torch.zeros(rows, tokens, **like).masked_fill_(~visible.to(device), -torch.inf)
    if not choice.fits(query, key, value, bias):
        pytest.skip("not in this kernel's line of the table")
    output, lse = choice.kernel(query, key, value, scale=0.2, causal=case == "causal", bias=bias)
    right, right_lse = reference(query, key, value, 0.2, visible)
    assert output.shape == right.shape
    assert close(output, right, dtype)
    assert lse.dtype == torch.float32
    assert close(lse, right_lse, dtype)


def test_some_kernel_fits_whatever_comes() -> None:
    query, value = torch.randn(1, 2, 5, 24), torch.randn(1, 1, 5, 12)
    assert KERNELS[-1].fits(query, value, value, torch.zeros(5, 5))
    assert KERNELS[-1].fits(query.double(), value.double(), value.double(), None)


def test_merging_survives_scores_that_overflow_exponentials() -> None:
    lse, other_lse = torch.tensor([[[500.0, -500.0, 0.0]]]), torch.tensor([[[-500.0, 500.0, 0.0]]])
    output, other = torch.ones(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
    merge_(output, lse, (other, other_lse))
    assert output[0, 0, :, 0].tolist() == [1.0, 0.0, 0.5]


@given(
    st.integers(1, 40),
    st.integers(0, 40),
    st.none() | st.integers(1, 50),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)
def test_a_chunk_behind_a_prefix_equals_attention_in_one_piece(
    chunk: int, prefix: int, window: int | None, heads: tuple[int, int]
) -> None:
    torch.manual_seed(chunk * 41 + prefix)
    query = torch.randn(1, heads[0], chunk, 8)
    key, value = (torch.randn(1, heads[1], prefix + chunk, 8) for _ in range(2))
    position = torch.arange(prefix, prefix + chunk)[:, None]
    token = torch.arange(prefix + chunk)[None, :]
    visible = token <= position
    if window is not None:
        visible &= token > position - window
    kept = prefix if window is None else min(prefix, window - 1)
    calls = 0

    def fetch() -> tuple[torch.Tensor, torch.Tensor] | None:
        nonlocal calls
        calls += 1
        return (key[:, :, prefix - kept : prefix], value[:, :, prefix - kept : prefix]) if kept else None

    output = attend_chunk(query, key[:, :, prefix:], value[:, :, prefix:], fetch, scale=0.35, window=window)
    right, _ = reference(query, key, value, 0.35, visible)
    assert close(output, right, torch.float32)
    assert calls == 1
