"""Peer links between process ranks that may share a GPU: as many ranks as a test wants, on one GPU or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from profiler.linktest import tried
from tests.ranks.launch import launch
from tests.ranks.playing import all_told, play, right

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODELS = ("llama-gqa", "mistral-window", "gpt2")
SPLITS = {2: [(24, 23), (46, 1)], 3: [(16, 16, 15), (1, 44, 2)], 4: [(14, 9, 12, 12)], 5: [(1, 1, 42, 1, 2)]}
METHODS = ("attention", "cache", "fanout", "chain-limited", "fanout-limited", "chain")


def cases(ranks: int) -> list[dict[str, Any]]:
    """What is compared with one rank."""
    found = [
        {"model": model, "method": method, "sizes": sizes, "batch": 1 + (at + len(method)) % 2}
        for model in MODELS
        for at, sizes in enumerate(SPLITS[ranks])
        for method in METHODS
        if not (model == "gpt2" and method == "attention")
    ]
    found += [
        {"model": model, "method": method, "sizes": SPLITS[ranks][0], "batch": 2, "past": 31}
        for model in MODELS
        for method in ("past", "past-in-place")
    ]
    return [*found, {"model": "llama-gqa", "method": "padded", "sizes": SPLITS[ranks][0], "batch": 2}]


@pytest.mark.parametrize("ranks", SPLITS)
def test_ranks_over_peer_links_equal_one_rank(ranks: int, tmp_path: Path) -> None:
    wanted = cases(ranks)
    (tmp_path / "cases.json").write_text(json.dumps(wanted))
    (tmp_path / "device").write_text("shared")
    launch("tests.ranks.exactness", tmp_path, ranks)
    (results,) = [
        json.loads(file.read_text()) for file in tmp_path.glob("results*.json") if file.stat().st_size > 2
    ]
    assert len(results) == len(wanted)
    for result in results:
        assert result["link"] == "peer"
        assert result["logits_error"] < 1e-5, result
        assert result["kv_error"] < 1e-5, result
        assert result["same_tokens"], result
        if result["method"] in ("past", "past-in-place"):
            assert result["past_rows_shared"] == (result["method"] == "past-in-place" and result["full_layers"])


@pytest.mark.parametrize("ranks", [3, 5])
def test_a_failed_prefill_over_peer_links_ends_the_group_until_it_is_renewed(ranks: int, tmp_path: Path) -> None:
    names = [
        "failed_prefill",
        "failed_before_its_links",
        "another_order",
        "not_finite",
        "early",
        "mixed_lengths",
        "threads_of_one_model",
        "fuzz",
    ]
    seen = play(tmp_path, ranks, names, device="shared", timeout_s=30)
    for name in names[:2]:
        found = seen[name]
        assert found[1]["first"]["error"] == "OutOfMemoryError"
        after = [one["after"] if isinstance(one["after"], list) else [one["after"]] for one in found]
        for at in range(len(after[0])):
            all_told([one[at] for one in after], "out-of-memory", "unusable", "rank 1 ran out of memory", "renew")
        right(found, "renewed")
    right(seen["another_order"])
    right(seen["early"], "chain")
    right(seen["early"], "fanout")
    assert [one["wrong"] for one in seen["mixed_lengths"]] == [[]] * ranks
    assert [one["wrong"] for one in seen["threads_of_one_model"]] == [[]] * ranks
    assert [one["wrong"] for one in seen["fuzz"]] == [0] * ranks
    assert seen["fuzz"][-1]["right"] > 50


def test_link_memory_is_taken_once_and_given_back(tmp_path: Path) -> None:
    seen = play(tmp_path, 3, ["link_memory_is_kept"], device="shared")["link_memory_is_kept"]
    right(seen)
    for rank, one in enumerate(seen):
        assert one["flat"]
        assert one["reserved"] > 0
        assert (one["used_while_alive"] > 0) == (rank > 0)
        assert one["given_back"] + one["given_back_while_alive"] >= one["reserved"]
        assert one["left"] == 0


def test_every_link_is_tried_and_none_holds_up_another() -> None:
    devices = [f"cuda:{rank % torch.cuda.device_count()}" for rank in range(4)]
    found = tried(devices, 4)
    assert [(one["from"], one["to"]) for one in found["pairs"]] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for one in found["pairs"]:
        assert one["kind"] == "peer"
        assert one["mapped"]
        assert 0 < one["latency_s"] < 1
        assert one["bandwidth"] > 0
        assert one["bandwidth_together"] > 0
    assert [(one["link"], one["moves"]) for one in found["held"]] == [("1→2", True), ("2→3", True)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("eager", [False, True])
def test_kinds_of_links_mix_whatever_the_world_is(eager: bool, tmp_path: Path) -> None:
    ranks = min(3, torch.cuda.device_count())
    seen = play(tmp_path, ranks, ["kinds", "early"], device="cuda", eager=eager)
    for topology in ("chain", "fanout"):
        right(seen["early"], topology)
        for name in ("auto", "nccl", "mixed"):
            right(seen["kinds"], f"{name} {topology}")
    links = {name: seen["kinds"][0][f"{name} link"] for name in ("auto", "nccl", "mixed")}
    assert links == {"auto": "peer", "nccl": "nccl", "mixed": "peer and nccl" if ranks > 2 else "nccl"}


@pytest.mark.parametrize(
    ("name", "ranks", "struck", "kind"),
    [
        ("first_killed", 3, 0, "lost"),
        ("killed_behind_a_full_stream", 3, 1, "lost"),
        ("goes_on_without_the_dead", 3, 1, "lost"),
        ("stopped", 2, 0, "timeout"),
        ("stopped", 3, 0, "timeout"),
    ],
)
def test_a_wait_that_nobody_fulfils_is_ended(
    name: str, ranks: int, struck: int, kind: str, tmp_path: Path
) -> None:
    timeout_s = 8
    seen = play(tmp_path, ranks, [name], timeout_s=timeout_s, missing=struck, device="shared")[name]
    last = seen[-1]
    assert (last["first"]["kind"], last["first"]["rank"]) == (kind, struck), last
    assert "layer" in last["first"]["phase"], last
    if name == "goes_on_without_the_dead":
        assert [one["token"] for one in last["next"]] == last["right"]
