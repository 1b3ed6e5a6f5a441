"""The first token: what is enqueued, what is waited for, and in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

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
