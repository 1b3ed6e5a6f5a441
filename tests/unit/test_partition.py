from __future__ import annotations

import copy
import math
import pickle
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition import Partition, PartitionError

sizes = st.lists(st.integers(1, 10_000), min_size=1, max_size=16)


@given(sizes, st.integers(0, 10_000))
def test_positions_follow_from_sizes(chunks: list[int], past: int) -> None:
    partition = Partition(chunks, past=past)
    assert partition.context == sum(chunks)
    assert partition.starts[0] == past
    assert partition.ends[-1] == past + partition.context
    assert partition.ends[:-1] == partition.starts[1:]
    assert partition.boundaries == (0, *(end - past for end in partition.ends))
    assert Partition.from_boundaries(partition.boundaries, past=past) == partition
    assert math.isclose(sum(partition.fractions), 1)


@given(st.integers(1, 64), st.integers(0, 5_000), st.integers(1, 64))
def test_even_split_differs_by_one_quantum_at_most(ranks: int, more: int, quantum: int) -> None:
    context = ranks * quantum + more
    partition = Partition.even(context, ranks, quantum=quantum)
    assert partition.context == context
    assert all(boundary % quantum == 0 for boundary in partition.boundaries[:-1])
    whole = [*partition.sizes[:-1], partition.sizes[-1] - context % quantum]
    assert max(whole) - min(whole) <= quantum


shares = st.lists(st.floats(0, 1e9), min_size=1, max_size=16).filter(lambda values: sum(values) > 0)


@given(shares, st.integers(0, 100_000), st.integers(1, 128))
def test_any_fractions_round_to_a_partition_that_sums_exactly(
    values: list[float], more: int, quantum: int
) -> None:
    context = len(values) * quantum + more
    partition = Partition.from_fractions(values, context, quantum=quantum)
    assert partition.context == context
    assert min(partition.sizes) >= quantum
    assert all(boundary % quantum == 0 for boundary in partition.boundaries[:-1])


@given(sizes)
def test_a_partitions_own_fractions_give_it_back(chunks: list[int]) -> None:
    partition = Partition(chunks)
    assert Partition.from_fractions(partition.fractions, partition.context) == partition


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=8), st.integers(2_000, 50_000))
def test_rounding_moves_no_chunk_by_a_whole_quantum(values: list[float], context: int) -> None:
    partition = Partition.from_fractions(values, context)
    for size, value in zip(partition.sizes, values, strict=True):
        assert abs(size - value / math.fsum(values) * context) < 1


@given(
    st.lists(st.floats(0.05, 1), min_size=2, max_size=8),
    st.integers(0, 50_000),
    st.sampled_from([2, 64, 100, 128]),
)
def test_quanta_go_to_the_chunks_that_grow_least_by_them(values: list[float], more: int, quantum: int) -> None:
    context = len(values) * quantum + more
    cuts = list(accumulate(value / math.fsum(values) for value in values))[:-1]
    partition = Partition.from_cuts(cuts, context, quantum)
    assert partition.context == context
    assert all(boundary % quantum == 0 for boundary in partition.boundaries[:-1])
    short = -context % quantum
    ideal = [(after - before) * context for before, after in pairwise((0.0, *cuts, 1.0))]
    ideal[-1] += short
    sizes = [*partition.sizes[:-1], partition.sizes[-1] + short]
    if min(ideal) < quantum:
        return
    assert all(abs(size - value) < quantum + 1e-6 for size, value in zip(sizes, ideal, strict=True))
    grown = max(size / value for size, value in zip(sizes, ideal, strict=True))
    # Whoever did not grow would have grown by as much, or more.
    for size, value in zip(sizes, ideal, strict=True):
        if size < value - 1e-6:
            assert (size + quantum) / value >= grown - 1e-9


def test_a_chunk_of_few_tiles_is_not_rounded_up_beyond_the_others() -> None:
    # Boundaries to the nearest tile would give 640 tokens to one of these chunks and 384 to another.
    cuts = [0.1369, 0.2681, 0.3955, 0.5204, 0.6427, 0.7635, 0.8823]
    assert Partition.from_cuts(cuts, 4096, 128).sizes == (512,) * 8
    # Chunks without a quantum of their own are given one.
    assert Partition.from_cuts([0.5, 0.5, 1.0], 1024, 128).sizes == (384, 128, 384, 128)
    # The eight tokens beyond the last whole tile are one more to whoever gets them.
    assert Partition.from_cuts([index / 8 for index in range(1, 8)], 5000, 128).sizes == (*(640,) * 7, 520)


@pytest.mark.parametrize("bad", [(), (0,), (3, -1), (1.5, 2), (True, 2), ("4",)])
def test_sizes_that_are_none_are_refused(bad: tuple[object, ...]) -> None:
    with pytest.raises(PartitionError):
        Partition(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-1.0, 2.0], [0.0, 0.0], []])
def test_fractions_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(PartitionError):
        Partition.from_fractions(bad, 100)


@pytest.mark.parametrize("share", [1e308, 5e-324, 1.0])
def test_the_scale_of_fractions_does_not_matter(share: float) -> None:
    assert Partition.from_fractions([share, share], 100).sizes == (50, 50)


@pytest.mark.parametrize("bad", [(0,), (1, 5), (0, 5, 5), (0, 5, 4)])
def test_boundaries_must_start_at_zero_and_grow(bad: tuple[int, ...]) -> None:
    with pytest.raises(PartitionError):
        Partition.from_boundaries(bad)


def test_more_ranks_than_tokens_is_refused_with_what_to_do() -> None:
    with pytest.raises(PartitionError, match=r"3 tokens cannot give each of 4 ranks a token; use fewer ranks"):
        Partition.even(3, 4)


def test_written_sizes_are_read_and_checked_against_the_context() -> None:
    assert Partition.parse("9728/6656") == Partition.parse("9728,6656", 16384) == Partition((9728, 6656))
    with pytest.raises(PartitionError, match="sum to 16384, not to the context of 16000"):
        Partition.parse("9728/6656", 16000)
    with pytest.raises(PartitionError, match="written as sizes"):
        Partition.parse("a lot")


def test_it_is_a_value() -> None:
    assert len({Partition((3, 2)), Partition([3, 2]), Partition((3, 2), past=1)}) == 2
    with pytest.raises(AttributeError):
        Partition((3, 2)).past = 4  # type: ignore[misc]


def test_a_partition_is_a_value() -> None:
    one, same, other = Partition((3, 2), past=4), Partition([3, 2], past=4), Partition((3, 2))
    assert one == same != other
    assert len({one, same, other}) == 2
    assert one != (3, 2)
    for copied in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), copy.copy(one)):
        assert copied == one
    assert eval(repr(one)) == one
    with pytest.raises(AttributeError, match="immutable"):
        one.past = 0
    with pytest.raises(AttributeError, match="immutable"):
        del one.sizes
    with pytest.raises(AttributeError):
        one.more = 1  # type: ignore[attr-defined]
