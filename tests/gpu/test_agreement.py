"""Ranks over NCCL that fail, die or stop: nobody waits for them, and no token comes of it. Needs two GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks.playing import all_told, play, right

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def test_a_failed_prefill_over_nccl_ends_the_group_until_it_is_renewed(tmp_path: Path) -> None:
    names = [
        "failed_prefill",
        "failed_before_its_links",
        "another_order",
        "not_finite",
        "without_agreement",
        "fuzz",
    ]
    seen = play(tmp_path, 2, names, device="cuda")
    for name in names[:2]:
        ranks = seen[name]
        assert ranks[1]["first"]["error"] == "OutOfMemoryError"
        after = [one["after"] if isinstance(one["after"], list) else [one["after"]] for one in ranks]
        for at in range(len(after[0])):
            all_told([one[at] for one in after], "out-of-memory", "unusable", "rank 1 ran out of memory", "renew")
        right(ranks, "renewed")
    for at in range(2):
        all_told([one["both"][at] for one in seen["another_order"]], "disagreement", "the prompt of")
    right(seen["another_order"])
    assert seen["not_finite"][1]["first"]["error"] == "NotFiniteError"
    right(seen["without_agreement"], "first")
    assert [one["wrong"] for one in seen["fuzz"]] == [0, 0]
    assert seen["fuzz"][1]["right"] > 50


def test_a_rank_that_is_killed_or_stopped_is_named_over_nccl(tmp_path: Path) -> None:
    for name, kind in (("first_killed", "lost"), ("stopped", "timeout")):
        folder = tmp_path / name
        folder.mkdir()
        last = play(folder, 2, [name], timeout_s=8, missing=0, device="cuda")[name][1]
        assert (last["first"]["kind"], last["first"]["rank"]) == (kind, 0)
