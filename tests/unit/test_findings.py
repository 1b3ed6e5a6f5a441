"""What a measurement shows that its schedule does not is told by name; what is as it should be is not told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvr_partition import Partition
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.findings import Finding, contradict, findings, worst
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.measurement import Measurement, RankTimes, Sample

MACHINE = Machine(
    ChunkCost(1e-3, 2e-5, 2e-9, 2e-9, kv_share=0.2),
    layers=8,
    entry_bytes=8192,
    link=(LinkCost.of(20e9, 2e-5),) * 3,
)
SPLIT = Partition((6000, 4000, 3300, 3084))


def sample(partition: Partition, truth: Machine, noise: float = 0.0, seed: int = 0) -> Sample:
    draw = np.random.default_rng(seed)
    slower = 1 + noise * draw.standard_normal(partition.ranks)
    told = replace(
        truth, speeds=tuple(1 / (truth.slowness(rank) * slower[rank]) for rank in range(partition.ranks))
    )
    timeline = simulate(partition, told)
    return Sample(timeline.ttft_s, tuple(RankTimes.of(one) for one in timeline.ranks), 0)


def measured(*samples: Sample, partition: Partition = SPLIT, method: str = "kvr") -> Measurement:
    return Measurement(method, partition.sizes, samples, "precise")


def delayed(one: Sample, rank: int, seconds: float, first: bool) -> Sample:
    """A rank that waits longer, and with it all after it."""
    ranks = list(one.ranks)
    for at in range(rank, len(ranks)):
        before = ranks[at]
        assert before.first_wait_s is not None
        ranks[at] = RankTimes(
            before.compute_s,
            before.wait_s + seconds,
            before.transfer_s,
            before.first_wait_s + seconds * (1.0 if first else 0.1),
        )
    return Sample(one.ttft_s + seconds, tuple(ranks), 0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(200, 9000), min_size=2, max_size=4).map(tuple),
    st.integers(0, 1000),
    st.sampled_from(["chain", "fanout"]),
    st.floats(0.8, 1.2),
)
def test_what_is_as_it_should_be_is_not_told(sizes: tuple[int, ...], seed: int, topology: str, off: float) -> None:
    machine = replace(MACHINE, link=LinkCost.of(20e9, 2e-5), topology=topology)  # type: ignore[arg-type]
    # Costs are off by a fifth, ranks run 3% of noise: that is what a search corrects.
    truth = replace(machine, cost=replace(machine.cost, per_token_s=machine.cost.per_token_s * off))
    split = Partition(sizes)
    samples = [sample(split, truth, 0.03, seed + at) for at in range(3)]
    assert findings(measured(*samples, partition=split), machine) == []


def test_a_rank_that_begins_late_is_told_with_what_it_cost() -> None:
    late = [delayed(sample(SPLIT, MACHINE, 0.01, at), 2, 0.77, first=True) for at in range(3)]
    (found,) = findings(measured(*late), MACHINE)
    assert (found.kind, found.rank) == ("late", 2)
    assert found.text == (
        "rank 2 began 0.77 s after its KV could have been there: links carry one message at a time?"
    )


def test_one_sample_in_which_a_rank_was_late_is_noise() -> None:
    good = [sample(SPLIT, MACHINE, 0.01, at) for at in range(3)]
    assert findings(measured(delayed(good[0], 2, 0.5, first=True), *good[1:]), MACHINE) == []


def test_a_link_that_delivers_less_than_it_was_timed_at_is_told() -> None:
    slow = list(MACHINE.link)  # type: ignore[arg-type]
    slow[1] = LinkCost.of(0.5e9, 2e-5)
    truth = replace(MACHINE, link=tuple(slow))
    (found,) = findings(measured(*(sample(SPLIT, truth, 0.01, at) for at in range(3))), MACHINE)
    assert (found.kind, found.source, found.rank) == ("link", 1, 2)
    assert found.text.startswith("link 1→2 delivers 0.5 GB/s, was timed at 20 GB/s")


def test_waits_that_neither_links_nor_a_late_beginning_explain_are_told() -> None:
    odd = [delayed(sample(SPLIT, MACHINE, 0.01, at), 1, 0.4, first=False) for at in range(3)]
    (found,) = findings(measured(*odd), MACHINE)
    assert (found.kind, found.rank) == ("wait", 1)


def test_ranks_that_compute_longer_than_their_chunks_alone_are_told() -> None:
    hot = replace(MACHINE, speeds=(1 / 1.4,) * 4)
    (found,) = findings(measured(*(sample(SPLIT, hot, 0.01, at) for at in range(3))), MACHINE)
    assert found.kind == "compute"
    assert found.text.startswith("ranks computed 39% longer than their chunks were timed at")
    one = replace(MACHINE, speeds=(1, 1, 1 / 1.6, 1))
    (found,) = findings(measured(*(sample(SPLIT, one, 0.01, at) for at in range(3))), MACHINE)
    assert found.text.startswith("rank 2 computed 59% longer than its chunk was timed at")
    # A guess of costs says nothing about that, and no search stops for it.
    assert (
        findings(measured(*(sample(SPLIT, one, 0.01, at) for at in range(3))), MACHINE, chunks_timed=False) == []
    )
    assert contradict([[found], [found], [found]]) is None


def test_time_that_no_rank_spent_is_told() -> None:
    slow = [replace_ttft(sample(SPLIT, MACHINE, 0.01, at), 0.5) for at in range(3)]
    (found,) = findings(measured(*slow), MACHINE)
    assert found.kind == "unexplained"


def replace_ttft(one: Sample, more: float) -> Sample:
    return Sample(one.ttft_s + more, one.ranks, 0)


@pytest.mark.parametrize("method", ["tsp", "single", "bound"])
def test_only_kv_runahead_has_a_schedule(method: str) -> None:
    late = delayed(sample(SPLIT, MACHINE), 2, 0.77, first=True)
    assert findings(measured(late, method=method), MACHINE) == []


def test_findings_about_the_same_are_one_and_stop_a_search_once_they_repeat() -> None:
    small, large = Finding("late", "a", 0.1, 2), Finding("late", "b", 0.4, 2)
    other = Finding("compute", "c", 0.3)
    assert worst([small, other, large]) == [large, other]
    assert contradict([[small], [], [other]]) is None
    assert contradict([[small], [], [large]]) == "b"
