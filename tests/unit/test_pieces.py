"""How a shape without a plan is put together from those that have one; the kernels are stood in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition.runtime.kernels import CudnnPlans, cudnn, flash, merge_, plans
from kvr_partition.runtime.kernels.cudnn import split_length
from kvr_partition.runtime.kernels.plain import plain as plain_attention
from kvr_partition.runtime.kernels.plans import Pattern, piece_lengths, planned_shapes, row_lengths, rows_planned
from tests.attention_reference import close, reference


def plain(query: Any, key: Any, value: Any, scale: float, causal: bool) -> Any:
    return plain_attention(query, key, value, scale=scale, causal=causal, bias=None)


@given(st.integers(1, 70_000))
def test_padding_adds_few_rows(rows: int) -> None:
    planned = rows_planned(rows)
    assert planned == row_lengths(rows)[-1]
    assert rows <= planned < rows + max(256, rows / 16)


@given(st.integers(0, 40_000), st.sampled_from([0, 256, 1000, 4096, 16384]))
def test_pieces_fill_a_length(length: int, most: int) -> None:
    runs, end = split_length(length, most)
    known = piece_lengths(most)
    assert [start for start, _ in runs] == [0, *(end for _, end in runs)][: len(runs)]
    assert all(high - low in known for low, high in runs)
    assert end == (runs[-1][1] if runs else 0)
    assert not known or length - end < 512
    if length <= 16384 <= most:
        assert len(runs) <= 3


@pytest.mark.parametrize("rows", [100, 256, 700, 1333])
@pytest.mark.parametrize("prefix", [0, 40, 900])
@pytest.mark.parametrize("room", [False, True], ids=["", "room behind queries"])
def test_pieces_add_up_to_the_whole(rows: int, prefix: int, room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2048
    planned = set(planned_shapes(most))
    calls, copied = [], []

    def cudnn_call(query: Any, key: Any, value: Any, scale: float, causal: bool) -> Any:
        calls.append((query.shape[2], key.shape[2], causal))
        return plain(query, key, value, scale, causal)

    monkeypatch.setattr(plans, "cudnn_call", cudnn_call)
    monkeypatch.setattr(flash, "flash_call", plain)
    padded = cudnn._padded

    def strides_kept(given: Any, length: int) -> Any:
        whole = padded(given, length)
        assert whole.stride()[1:] == given.stride()[1:]
        assert whole.shape[2] == length
        copied.append(given.shape[1])
        return whole

    monkeypatch.setattr(cudnn, "_padded", strides_kept)
    torch.manual_seed(rows + prefix)
    # Token-major, as all tensors are that have plans ahead.
    query = torch.randn(1, rows, 4, 8)
    if room:
        # Whatever is there must not matter.
        query = torch.cat([query, torch.full((1, rows_planned(rows) - rows, 4, 8), torch.nan)], dim=1)
    query = query[:, :rows].transpose(1, 2)
    key, value = torch.randn(2, 1, prefix + rows, 2, 8).transpose(2, 3)
    own = key[:, :, prefix:], value[:, :, prefix:]
    (output, lse), *others = cudnn._attend_in_pieces(query, *own, 0.3, True, most)
    if prefix:
        before = key[:, :, :prefix], value[:, :, :prefix]
        others += cudnn._attend_in_pieces(query, *before, 0.3, False, most)
    merge_(output, lse, *others)
    visible = torch.ones(rows, prefix + rows, dtype=torch.bool).tril(prefix)
    right, right_lse = reference(query, key, value, 0.3, visible)
    assert close(output, right, torch.float32)
    assert close(lse, right_lse, torch.float32)
    assert set(calls) <= planned
    if rows >= 128:
        assert any(causal for _, _, causal in calls)
    if room:
        assert query.shape[1] not in copied


def test_what_is_longer_than_all_plans_ahead_gets_one_of_its_own() -> None:
    known = CudnnPlans()
    pattern = Pattern.of(*torch.zeros(3, 1, 4, 8, 16, dtype=torch.float16).unbind())
    known._ahead[pattern] = 2048
    assert not known.use(pattern, 2001, 2001, causal=True)
    assert not known.use(pattern, 1001, 1001, causal=False)
    assert known.use(pattern, 2049, 2049, causal=True)
    assert known.use(pattern, 1024, 1025, causal=False)


@pytest.mark.parametrize("rows", [1, 2, 77])
@pytest.mark.parametrize("tokens", [2048, 3000])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_few_rows_split_the_tokens(rows: int, tokens: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def flash_call(query: Any, key: Any, value: Any, scale: float, causal: bool) -> Any:
        batches.append(query.shape[0])
        return plain(query, key, value, scale, causal)

    monkeypatch.setattr(flash, "flash_call", flash_call)
    torch.manual_seed(rows)
    query = torch.randn(1, 4, rows, 8)
    key, value = torch.randn(2, tokens, kv_heads, 8).permute(0, 2, 1, 3).unsqueeze(1)
    output, lse = flash.cuda_flash(query, key, value, scale=0.3, causal=False, bias=None)
    right, right_lse = reference(query, key, value, 0.3, torch.ones(rows, tokens, dtype=torch.bool))
    assert close(output, right, torch.float32)
    assert close(lse, right_lse, torch.float32)
    assert batches[0] == 2
