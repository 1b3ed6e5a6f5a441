from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition import Partition
from kvr_partition.machine.cost import ChunkCost, FitError, TimedChunk
from kvr_partition.machine.solve import balanced
from profiler.calibrate import chunk_design

TRUTH = ChunkCost(2e-3, 4e-5, 3e-9, 5e-9)
costs = st.builds(ChunkCost, st.floats(0, 1e-2), st.floats(1e-7, 1e-3), st.floats(0, 1e-7), st.floats(0, 1e-7))


@given(costs, st.floats(1, 1e5), st.floats(0, 1e5))
def test_chunk_for_inverts_seconds(cost: ChunkCost, chunk: float, prefix: float) -> None:
    assert math.isclose(cost.chunk_for(cost.seconds(chunk, prefix), prefix), chunk, rel_tol=1e-6)


@given(st.integers(64, 65536), st.integers(2, 8))
def test_the_design_determines_every_term(context: int, ranks: int) -> None:
    timed = [TimedChunk(c, s, TRUTH.seconds(c, s)) for c, s in chunk_design(context, ranks)]
    try:
        fitted = ChunkCost.fit(timed)
    except FitError:
        # Where attention does not show in any chunk, terms cannot be told apart, and the fit says so.
        assert context < 2048
        return
    for one in timed:
        assert math.isclose(fitted.seconds(one.chunk, one.prefix), one.seconds, rel_tol=1e-3)


def test_fits_that_mean_nothing_are_refused_with_the_chunk_to_add() -> None:
    good = [TimedChunk(c, s, TRUTH.seconds(c, s)) for c, s in chunk_design(16384, 4)]
    with pytest.raises(FitError, match="at least 5"):
        ChunkCost.fit(good[:4])
    with pytest.raises(FitError, match=r"too alike .* add one of 4096 tokens"):
        ChunkCost.fit([TimedChunk(c, s, 1.0) for c in (1024, 1500, 2048) for s in (0, 1024)])
    with pytest.raises(FitError, match="behind another prefix"):
        ChunkCost.fit([TimedChunk(c, 0, 1.0 + c) for c in (1024, 2048, 4096, 8192, 16384)])
    with pytest.raises(FitError, match="equally long whatever their size"):
        ChunkCost.fit([TimedChunk(one.chunk, one.prefix, 0.01) for one in good])
    off = [*good[:-1], TimedChunk(good[-1].chunk, good[-1].prefix, 4 * good[-1].seconds)]
    with pytest.raises(FitError, match=r"time it again|only good to"):
        ChunkCost.fit(off)


@given(costs, st.integers(8, 50_000), st.integers(1, 8), st.integers(0, 20_000))
def test_balanced_ranks_take_equally_long(cost: ChunkCost, context: int, ranks: int, past: int) -> None:
    partition = balanced(cost, context, ranks, past=past)
    assert partition.context == context
    times = [cost.seconds(c, s) for c, s in zip(partition.sizes, partition.starts, strict=True)]
    one_token = max(
        cost.seconds(c + 1, s + ranks) - cost.seconds(c, s)
        for c, s in zip(partition.sizes, partition.starts, strict=True)
    )
    # Whole tokens allow no better than a token more or less, and every rank keeps at least one.
    bare = [t for t, c in zip(times, partition.sizes, strict=True) if c > 1]
    assert not bare or max(bare) - min(bare) <= 2 * one_token + 1e-9


def test_attention_makes_earlier_chunks_longer() -> None:
    sizes = balanced(TRUTH, 16384, 4).sizes
    assert list(sizes) == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    assert balanced(ChunkCost(1e-3, 0, 0, 0), 1000, 3) == Partition.even(1000, 3)
    flat = ChunkCost(0, 1e-5, 0, 0)
    assert balanced(flat, 16384, 4) == Partition.even(16384, 4)
