"""The wire between hosts keeps the order of the plan, which is the one that the schedule counts with."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvr_partition.machine.cost import ChunkCost
from tests.ranks.asleep import Case, Seen
from tests.ranks.launch import launch

LAYERS = 3


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_rank_that_is_late_sends_its_own_chunk_before_those_that_have_long_arrived(
    ranks: int, tmp_path: Path
) -> None:
    # The second rank takes 0.1 s to its KV of a layer. What it forwards has then been there for long.
    case = Case(
        sizes=(4,) * ranks,
        cost=ChunkCost(0.0, 0.025 * LAYERS / 4, 0.0, 0.0, kv_share=1.0),
        layers=LAYERS,
        entry_bytes=64,
        bandwidth=1e9,
        speeds=(1.0, 0.25) + (1.0,) * (ranks - 2),
    )
    cases = [case, msgspec.structs.replace(case, topology="fanout"), msgspec.structs.replace(case, noise=100)]
    (tmp_path / "cases.json").write_bytes(msgspec.json.encode(cases))
    launch("tests.ranks.asleep", tmp_path, ranks)
    for rank in range(ranks):
        found = msgspec.json.decode((tmp_path / f"seen{rank}.json").read_bytes(), type=list[Seen])
        chain = [
            (layer, rank + 1, chunk)
            for layer in range(LAYERS)
            for chunk in range(rank, -1, -1)
            if rank + 1 < ranks
        ]
        assert list(found[0].sent) == chain == list(found[2].sent)
        for peer in range(rank + 1, ranks):
            to_peer = [message for message in found[1].sent if message[1] == peer]
            assert to_peer == [(layer, peer, rank) for layer in range(LAYERS)]
