"""Who sends what to whom, what a link is held to, and how gathered rows lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition import Partition
from kvr_partition.errors import PartitionError, UnsupportedError
from kvr_partition.runtime.gathering import parts_of
from kvr_partition.runtime.links.plan import TOPOLOGIES, LinkLimits, Topology, needed, receives, sends

partitions = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(lambda sizes: Partition(sizes))
windows = st.none() | st.integers(1, 60)


@given(partitions, windows, st.sampled_from(TOPOLOGIES))
def test_every_piece_that_is_needed_is_sent_once_by_one_who_has_it(
    partition: Partition, window: int | None, topology: Topology
) -> None:
    sent: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for rank in range(partition.ranks):
        has = {rank} | {piece.chunk for piece in needed(partition, rank, window)}
        for chunk, hops in sends(partition, rank, window, topology).items():
            assert chunk in has
            for hop in hops:
                assert hop.piece.chunk == chunk
                sent.setdefault((rank, hop.peer), []).append((chunk, hop.piece.start, hop.piece.end))
    for rank in range(partition.ranks):
        hops = receives(partition, rank, window, topology)
        assert [hop.piece for hop in hops] == needed(partition, rank, window)
        for peer in range(partition.ranks):
            arriving = [(hop.piece.chunk, hop.piece.start, hop.piece.end) for hop in hops if hop.peer == peer]
            # Both sides agree on the order, so links without message tags deliver rightly too.
            assert arriving == sent.get((peer, rank), [])


@given(partitions, st.sampled_from(TOPOLOGIES))
def test_the_wire_carries_what_the_topology_costs(partition: Partition, topology: Topology) -> None:
    entries = sum(
        hop.piece.end - hop.piece.start
        for rank in range(partition.ranks)
        for hops in sends(partition, rank, None, topology).values()
        for hop in hops
    )
    assert entries == sum(partition.ends[:-1])  # a chain repeats earlier chunks, a fan-out its own
    if topology == "chain":
        assert all(
            hop.peer == rank + 1
            for rank in range(partition.ranks)
            for hops in sends(partition, rank, None, topology).values()
            for hop in hops
        )


def test_noise_is_agreed_on_and_visits_every_link() -> None:
    links = [LinkLimits(noise=1, seed=4).noisy_link(layer, 5) for layer in range(200)]
    assert links == [LinkLimits(noise=1, seed=4).noisy_link(layer, 5) for layer in range(200)]
    assert set(links) == {0, 1, 2, 3}
    assert links != [LinkLimits(noise=1, seed=5).noisy_link(layer, 5) for layer in range(200)]
    assert LinkLimits().noisy_link(0, 5) is None
    assert LinkLimits(noise=1).noisy_link(0, 1) is None


def test_a_link_is_held_for_as_long_as_a_message_takes() -> None:
    assert LinkLimits(bandwidth=1e9).throttled_s(5_000_000) == 0.005
    assert LinkLimits().throttled_s(5_000_000) == 0.0
    for bad in (LinkLimits, lambda **given: LinkLimits(**given)):
        with pytest.raises(UnsupportedError, match="more than 0 bytes a second"):
            bad(bandwidth=0.0)
        with pytest.raises(UnsupportedError, match="at least 0"):
            bad(noise=-1)


@given(st.integers(1, 6), st.integers(0, 100), st.sampled_from(["tsp", "zigzag"]))
def test_parts_cover_the_prompt_and_see_exactly_what_stands_before_them(
    ranks: int, more: int, method: str
) -> None:
    context = 2 * ranks + more
    parts = [part for of_rank in parts_of(method, context, ranks) for part in of_rank]  # type: ignore[arg-type]
    position_of_row = {part.rows + offset: part.start + offset for part in parts for offset in range(part.tokens)}
    assert sorted(position_of_row) == list(range(context)) == sorted(position_of_row.values())
    for part in parts:
        seen = {position_of_row[row] for row in range(*part.prefix)}
        assert seen == set(range(part.start))


def test_zigzag_gives_all_ranks_the_same_work() -> None:
    work = {
        sum(part.tokens * part.start + part.tokens**2 // 2 for part in of_rank)
        for of_rank in parts_of("zigzag", 64, 4)
    }
    assert len(work) == 1
    with pytest.raises(PartitionError, match="at least 8 tokens; got 7"):
        parts_of("zigzag", 7, 4)
