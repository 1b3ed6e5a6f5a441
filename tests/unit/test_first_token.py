"""The first token: what is enqueued, what is waited for, and in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvr_partition.errors import RankError
from kvr_partition.runtime.support import first_token

OUTPUT = SimpleNamespace(logits=torch.randn(2, 3, 50_000, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_token_and_largest_logit_come_over_in_one_copy_and_are_the_same(dtype: torch.dtype) -> None:
    output = SimpleNamespace(logits=OUTPUT.logits.to(dtype))
    logits, token, top = first_token(output)
    last = output.logits[:, -1]
    assert torch.equal(token, last.argmax(-1, keepdim=True))
    assert token.dtype == torch.long
    assert torch.equal(top, last.max(-1).values)
    assert top.dtype == dtype
    assert logits is not None


def test_what_is_not_finite_shows_in_the_largest_logit() -> None:
    logits = OUTPUT.logits.clone()
    logits[1, -1, 7] = torch.nan
    _, _, top = first_token(SimpleNamespace(logits=logits))
    assert top.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("chosen", [False, True])
def test_a_rank_that_failed_ends_the_wait_before_any_token_is_told(chosen: bool) -> None:
    looked: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        looked.append(logits)
        return logits.argmax(-1, keepdim=True)

    def settled() -> None:
        raise RankError("rank 0 was killed", rank=0)

    with pytest.raises(RankError):
        first_token(OUTPUT, choose if chosen else None, settled=settled)
    assert not looked


def test_kernels_are_enqueued_while_the_device_waits_only_once_they_are_loaded() -> None:
    """CUDA may wait for the device to load a kernel, and the device for KV that a dead rank never sends."""
    output = SimpleNamespace(logits=torch.randn(2, 3, 1_237))
    told: list[list[str]] = []
    for _ in range(3):
        told.append([])

        class Ops(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if "argmax" in str(func):
                    told[-1].append("argmax")
                return func(*args, **(kwargs or {}))

        with Ops():
            first_token(output, settled=lambda: told[-1].append("settled"))
    assert told == [["settled", "argmax"], ["argmax", "settled"], ["argmax", "settled"]]
