"""The schedule against its slow and obvious twin, against arithmetic, and the best split against all splits."""

from __future__ import annotations

import itertools
import random
from typing import Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvr_partition import Partition
from kvr_partition.errors import PartitionError
from kvr_partition.machine.bounds import bounds, gathering_ttft
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import FREE_LINK, Machine
from kvr_partition.machine.schedule import simulate, ttft
from kvr_partition.machine.solve import balanced, best_order, best_split
from tests.unit.reference_schedule import finished

# A 7B model with 32 layers on one fast GPU, in round numbers.
COST = ChunkCost(2e-3, 2.8e-5, 2e-9, 2e-9, kv_share=0.25)
MACHINE = Machine(COST, layers=32, entry_bytes=16384)

costs = st.builds(
    ChunkCost,
    st.floats(0, 1e-2),
    st.floats(1e-6, 1e-3),
    st.floats(0, 1e-6),
    st.floats(0, 1e-6),
    kv_share=st.floats(0, 1),
)
link_costs = st.builds(LinkCost, st.floats(0, 1e-3), st.floats(0, 1e-6))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Partition, Machine]:
    sizes = draw(st.lists(st.integers(1, 500), min_size=1, max_size=5))
    ranks = len(sizes)
    several = st.lists(link_costs, min_size=ranks - 1, max_size=ranks - 1).map(tuple)
    machine = Machine(
        cost=draw(costs),
        layers=draw(st.integers(1, 5)),
        entry_bytes=draw(st.integers(1, 4096)),
        link=draw(st.one_of(link_costs, several)),
        speeds=tuple(draw(st.lists(st.floats(0.2, 3), min_size=ranks, max_size=ranks)))
        if draw(st.booleans())
        else (),
        topology=draw(st.sampled_from(["chain", "fanout"])),
        overlap=draw(st.booleans()),
        dense=draw(st.booleans()),
        past=draw(st.integers(0, 300)),
        noise=draw(st.sampled_from([0, 100_000])),
        noise_seed=draw(st.integers(0, 3)),
        forwards=draw(st.sampled_from(["chunks", "whole", "blocking"])),
    )
    return Partition(sizes, past=machine.past), machine


@given(cases())
@settings(max_examples=200, deadline=None)
def test_it_agrees_with_the_slow_and_obvious_simulation(case: tuple[Partition, Machine]) -> None:
    partition, machine = case
    right = finished(partition, machine)
    timeline = simulate(partition, machine)
    assert timeline.ttft_s == pytest.approx(right[-1], rel=1e-9)
    assert ttft([partition.sizes], machine)[0] == pytest.approx(right[-1], rel=1e-9)
    for rank, end in zip(timeline.ranks, right, strict=True):
        assert rank.compute_s + rank.wait_s == pytest.approx(end, rel=1e-9)
        assert len(rank.layers) == machine.layers
    if partition.ranks > 1 and not machine.noise:
        # A link sends no faster than it can, and what it sends is what the topology costs.
        entries = sum(partition.sizes[: rank + 1][-1] for rank in range(partition.ranks - 1))
        assert (sum(rank.transfer_s for rank in timeline.ranks) > 0) == any(
            link.seconds_per_byte > 0
            for link in (machine.link if isinstance(machine.link, tuple) else (machine.link,))
        ) * (entries > 0)


@given(cases(), st.floats(1.05, 2))
@settings(max_examples=50, deadline=None)
def test_ranks_that_share_hardware_are_faster_while_others_are_idle(
    case: tuple[Partition, Machine], solo_speedup: float
) -> None:
    partition, machine = case
    assume(partition.ranks > 1)
    apart = simulate(partition, machine)
    end = max(rank.compute_s + rank.wait_s for rank in apart.ranks)
    busy = sum(rank.compute_s for rank in apart.ranks) / (partition.ranks * end)
    # All at work: as timed. One at work: as fast as alone.
    least = 1 / partition.ranks
    factor = 1 - (1 - 1 / solo_speedup) * min(1, max(0, (1 - busy) / (1 - least)))
    cost = machine.cost
    eased = ChunkCost(
        cost.fixed_s * factor,
        cost.per_token_s * factor,
        cost.per_own_pair_s * factor,
        cost.per_prefix_pair_s * factor,
        cost.kv_share,
    )
    right = simulate(partition, replace(machine, cost=eased)).ttft_s
    shared = replace(machine, solo_speedup=solo_speedup)
    assert simulate(partition, shared).ttft_s == pytest.approx(right, rel=1e-9)
    assert ttft([partition.sizes], shared)[0] == pytest.approx(right, rel=1e-9)
    assert 1 / solo_speedup - 1e-9 <= factor <= 1


def test_who_stores_and_forwards_waits_for_everything_and_who_blocks_waits_for_the_next() -> None:
    # A second for each token once KV is there, which is at once; a link takes a second for each token's KV.
    machine = Machine(ChunkCost(0.0, 1.0, 0.0, 0.0), layers=1, entry_bytes=1, link=LinkCost(0.0, 1.0))
    split = Partition((2, 3, 4))

    def ends(forwards: Literal["chunks", "whole", "blocking"]) -> list[float]:
        timeline = simulate(split, replace(machine, forwards=forwards))
        return [rank.compute_s + rank.wait_s for rank in timeline.ranks]

    # The second rank's own chunk leaves at 0, the first one's when it has come at 2 and the link is free at 3.
    assert ends("chunks") == [2, 2 + 3, 5 + 4]
    # All five tokens leave at 2.
    assert ends("whole") == [2, 2 + 3, 7 + 4]
    # And who sends computes afterwards.
    assert ends("blocking") == [2 + 2, 7 + 3, 7 + 4]
    # A rank that is at work does not receive: in its second layer the first waits for the second to come.
    two = simulate(split, replace(machine, layers=2, forwards="blocking"))
    assert two.ranks[0].compute_s + two.ranks[0].wait_s == 7 + 1.5 + 2 + 1


def test_many_partitions_at_once_are_each_by_itself() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 4000, (5000, 4))
    machine = replace(MACHINE, link=LinkCost.of(10e9, 1e-5), layers=4)
    together = ttft(sizes, machine)
    assert together.shape == (5000,)
    for at in (0, 2047, 2048, 4999):
        assert together[at] == simulate(Partition(tuple(map(int, sizes[at]))), machine).ttft_s
    assert ttft(np.empty((0, 3)), machine).shape == (0,)
    with pytest.raises(PartitionError, match=r"\[partitions, ranks\]"):
        ttft([1, 2, 3], machine)


def test_one_rank_takes_what_its_chunk_costs() -> None:
    for past in (0, 1000):
        timeline = simulate(Partition((4096,), past=past), replace(MACHINE, past=past))
        assert timeline.ttft_s == pytest.approx(COST.seconds(4096, past))
        assert timeline.ranks[0].wait_s == 0


def test_free_links_and_equal_work_mean_no_waiting_and_the_practical_bound() -> None:
    split = balanced(COST, 16384, 4)
    timeline = simulate(split, MACHINE)
    known = bounds(16384, 4, MACHINE, split)
    assert known.practical_s is not None
    assert timeline.ttft_s == pytest.approx(known.practical_s, rel=1e-3)
    # Only in the first layer: a longer chunk is projected later.
    assert all(rank.wait_s < timeline.ttft_s / MACHINE.layers for rank in timeline.ranks)


def test_bounds_are_those_of_the_paper_and_of_causal_attention() -> None:
    known = bounds(16384, 4, MACHINE)
    assert known.single_s == pytest.approx(COST.seconds(16384, 0))
    assert known.causal_s == pytest.approx(known.single_s / 4)
    assert known.dense_s == pytest.approx(known.single_s / 2 * (1 / 4 + 1 / 16))
    assert known.practical_s is None
    dense = bounds(16384, 4, replace(MACHINE, dense=True))
    assert dense.single_s == pytest.approx(COST.seconds(16384, 0) + COST.per_own_pair_s * 16384**2 / 2)


@given(st.integers(2, 6), st.sampled_from([1e9, 1e10, 3e11]))
def test_gathering_methods_meet_in_every_layer(ranks: int, bandwidth: float) -> None:
    machine = replace(MACHINE, link=LinkCost.of(bandwidth, 1e-5))
    context = 8192
    chunk = context / ranks
    wire = 32 * (1e-5 + (ranks - 1) * chunk * 16384 / bandwidth)
    work = COST.fixed_s + COST.per_token_s * chunk
    assert gathering_ttft("tsp", context, ranks, machine) == pytest.approx(wire + work + 2e-9 * chunk * context)
    last = COST.seconds(chunk, context - chunk)
    assert gathering_ttft("tsp-causal", context, ranks, machine) == pytest.approx(wire + last)
    zigzag = gathering_ttft("zigzag", context, ranks, machine)
    assert zigzag == pytest.approx(wire + work + 1e-9 * context**2 / ranks)
    noisy = gathering_ttft("tsp", context, ranks, replace(machine, noise=10**6))
    assert noisy == pytest.approx(gathering_ttft("tsp", context, ranks, machine) + 32 * 1e6 / bandwidth)
    with pytest.raises(PartitionError, match="does not gather"):
        gathering_ttft("kvr", context, ranks, machine)


def test_bounds_and_gathering_count_size_effects_and_dense_attention_as_a_schedule_does() -> None:
    stepped = replace(MACHINE, cost=replace(COST, size_effects=((2048, 0.9), (4096, 1.2))), past=512)
    for machine in (stepped, replace(stepped, dense=True)):
        alone = simulate(Partition((4096,), past=512), machine).ttft_s
        assert bounds(4096, 1, machine).single_s == pytest.approx(alone)
        assert gathering_ttft("tsp-causal", 4096, 1, machine) == pytest.approx(alone)
        # Without waits the last rank of an even split is the slowest one.
        last = bounds(4096, 2, machine, Partition((2048, 2048), past=512)).practical_s
        assert gathering_ttft("tsp-causal", 4096, 2, machine) == pytest.approx(last)
    assert gathering_ttft("zigzag", 4096, 2, replace(stepped, dense=True)) > gathering_ttft(
        "zigzag", 4096, 2, stepped
    )


@pytest.mark.parametrize("bandwidth", [1e9, 1e10, 3e11])
@pytest.mark.parametrize("topology", ["chain", "fanout"])
@pytest.mark.parametrize("speeds", [(), (1.0, 0.6)])
def test_the_best_split_of_two_ranks_is_the_best_of_all(
    bandwidth: float, topology: str, speeds: tuple[float, ...]
) -> None:
    machine = replace(MACHINE, link=LinkCost.of(bandwidth, 1e-5), topology=topology, speeds=speeds)  # type: ignore[arg-type]
    everything = np.array([(first, 8192 - first) for first in range(1, 8192)])
    best = ttft(everything, machine).min()
    found = best_split(8192, 2, machine)
    assert found.context == 8192
    assert simulate(found, machine).ttft_s <= best * 1.0005


@pytest.mark.parametrize("quantum", [32, 128, 256])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_best_split_is_the_best_on_the_quantum_and_not_the_nearest(ranks: int, quantum: int) -> None:
    context = 8192 if ranks == 2 else 32 * quantum
    cuts = itertools.combinations(range(quantum, context, quantum), ranks - 1)
    everything = np.array([np.diff([0, *inner, context]) for inner in cuts])
    for bandwidth, entry_bytes, topology in itertools.product(
        (1e9, 4e9, 3e11), (2048, 16384), ("chain", "fanout")
    ):
        machine = replace(
            MACHINE, link=LinkCost.of(bandwidth, 1e-5), entry_bytes=entry_bytes, topology=topology, layers=16
        )  # type: ignore[arg-type]
        best = ttft(everything, machine).min()
        found = best_split(context, ranks, machine, quantum=quantum)
        assert simulate(found, machine).ttft_s == pytest.approx(best, rel=1e-9), (bandwidth, entry_bytes, topology)


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("bandwidth", [2e9, 1e10, 3e11])
def test_the_best_split_of_more_ranks_beats_a_fine_grid(ranks: int, bandwidth: float) -> None:
    machine = replace(MACHINE, link=LinkCost.of(bandwidth, 1e-5), past=512, layers=16)
    context, steps = 8192, 40
    grid = np.array(
        [
            cut
            for cut in np.stack(np.meshgrid(*[np.arange(1, steps)] * (ranks - 1)), -1).reshape(-1, ranks - 1)
            if (np.diff(cut) > 0).all()
        ]
    )
    edges = np.concatenate([np.zeros((len(grid), 1)), grid, np.full((len(grid), 1), steps)], 1)
    best = ttft(np.diff(edges, axis=1) * context / steps, machine).min()
    found = best_split(context, ranks, machine)
    assert found.past == 512
    assert simulate(found, machine).ttft_s <= best * 1.002


@pytest.mark.parametrize("devices", [3, 4, 6])
def test_the_best_order_is_at_least_as_fast_as_any(devices: int) -> None:
    draw = random.Random(devices)
    speeds = tuple(draw.uniform(0.6, 1.2) for _ in range(devices))
    links = [[LinkCost.of(draw.choice([1e9, 5e9, 50e9]), 1e-5) for _ in range(devices)] for _ in range(devices)]
    machine = replace(MACHINE, speeds=speeds, layers=8)
    found = best_order(8192, machine, links, quantum=16)
    assert sorted(found.order) == list(range(devices))
    assert found.partition.context == 8192

    def ttft_of(order: tuple[int, ...]) -> float:
        hops = tuple(links[a][b] for a, b in itertools.pairwise(order))
        told = replace(machine, speeds=tuple(speeds[device] for device in order), link=hops)
        return simulate(best_split(8192, devices, told, quantum=16), told).ttft_s

    assert found.ttft_s == pytest.approx(ttft_of(found.order))
    orders = list(itertools.permutations(range(devices)))
    some = orders if devices < 5 else draw.sample(orders, 40)
    # Orders are told apart by equal work first, which is not quite the best split.
    assert found.ttft_s <= min(map(ttft_of, some)) * (1.0001 if devices < 5 else 1.01)


def test_an_order_needs_devices_that_differ() -> None:
    with pytest.raises(PartitionError, match="give the machine their speeds"):
        best_order(1024, MACHINE)
    with pytest.raises(PartitionError, match="table of 2 rows"):
        best_order(1024, replace(MACHINE, speeds=(1.0, 0.5)), [[LinkCost()]])
    with pytest.raises(PartitionError, match="give links="):
        best_order(1024, replace(MACHINE, speeds=(1.0, 0.5), link=(LinkCost(),)))


@given(cases(), st.sampled_from([1, 16]))
@settings(max_examples=40, deadline=None)
def test_the_best_split_is_never_worse_than_the_even_one(case: tuple[Partition, Machine], quantum: int) -> None:
    partition, machine = case
    assume(partition.context >= partition.ranks * quantum)
    found = best_split(partition.context, partition.ranks, machine, quantum=quantum)
    even = Partition.even(partition.context, partition.ranks, quantum=quantum, past=machine.past)
    assert (found.context, found.ranks, found.past) == (partition.context, partition.ranks, machine.past)
    assert simulate(found, machine).ttft_s <= simulate(even, machine).ttft_s * (1 + 1e-9)


def test_a_slow_rank_gets_less_and_a_slow_link_shifts_work_to_the_front() -> None:
    equal = balanced(COST, 8192, 3)
    slow = balanced(COST, 8192, 3, speeds=(1.0, 0.5, 1.0))
    assert slow.sizes[1] < 0.7 * equal.sizes[1]
    assert sum(slow.sizes) == 8192
    with pytest.raises(PartitionError, match="2 speeds do not fit 3 ranks"):
        balanced(COST, 8192, 3, speeds=(1.0, 0.5))
    with pytest.raises(PartitionError, match="1 links do not join 3 ranks"):
        best_split(8192, 3, replace(MACHINE, link=(FREE_LINK,)))
    with pytest.raises(PartitionError, match="2 speeds do not fit 3 ranks"):
        ttft([[1, 2, 3]], replace(MACHINE, speeds=(1.0, 1.0)))
