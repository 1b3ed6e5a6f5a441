"""Our samplers: Optuna's contract, and that they find what they are for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase

from kvr_partition import Partition
from kvr_partition.errors import UnsupportedError
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate, ttft
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Failure, Measurement, RankTimes, Sample
from kvr_partition.search import HierarchicalGridSampler, InformedSampler, Replay, Seed, compute_times, search
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.correction import corrected
from kvr_partition.search.informed import PartitionSampler
from kvr_partition.search.measured import noise_of
from kvr_partition.search.space import Space
from tests.landscapes import FITTED, TRUTH, measured

CONTEXT, RANKS, QUANTUM = 8192, 4, 16


def space(ranks: int = RANKS, context: int = CONTEXT) -> Space:
    return Space.around([Seed("even", Partition.even(context, ranks))], QUANTUM, math.log(10))


FAST = replace(FITTED, link=LinkCost.of(2e12, 1e-5))


def rugged(seed: int, spread: float) -> tuple[Machine, Machine]:
    """The truth without and with steps: every multiple of the quantum has its own."""
    draw = np.random.default_rng(seed)
    cost = ChunkCost.of_terms(term * draw.uniform(0.85, 1.15) for term in FITTED.cost.terms)
    sizes = range(STEP_QUANTUM, CONTEXT + 1, STEP_QUANTUM)
    steps = tuple((size, math.exp(draw.normal(0.0, spread))) for size in sizes)
    smooth = replace(FAST, cost=cost)
    return smooth, replace(smooth, cost=replace(cost, size_effects=steps))


STEP_QUANTUM = 64


def scattering(truth: Machine, draw: np.random.Generator, within: float, between: float) -> Any:
    """Measures with noise within a measurement, and every rank scattering from one measurement to the next."""

    def measure(partition: Partition) -> Measurement:
        timeline = simulate(partition, truth)
        off = np.exp(draw.normal(0.0, between, partition.ranks)) if between else np.ones(partition.ranks)
        samples = []
        for _ in range(3):
            ranks = tuple(
                RankTimes(one.compute_s * float(shift) * draw.normal(1, within), one.wait_s, one.transfer_s)
                for one, shift in zip(timeline.ranks, off, strict=True)
            )
            samples.append(Sample(timeline.ttft_s * draw.normal(1, within), ranks, 0))
        return Measurement("kvr", partition.sizes, tuple(samples), "cap")

    return measure


def test_a_search_finds_chunk_sizes_that_kernels_like(monkeypatch: pytest.MonkeyPatch) -> None:
    def gain(seed: int) -> float:
        smooth, truth = rugged(seed, 0.035)
        measure = scattering(truth, np.random.default_rng(seed), 0.003, 0.0)
        found = search(
            measure,
            CONTEXT,
            RANKS,
            12,
            machine=FAST,
            quantum=STEP_QUANTUM,
            confirm=lambda splits: [measure(one) for one in splits],
        )
        balanced = best_split(CONTEXT, RANKS, smooth, quantum=STEP_QUANTUM)
        return 1 - simulate(found.best, truth).ttft_s / simulate(balanced, truth).ttft_s

    found = [gain(seed) for seed in range(8)]
    assert min(found) > -0.005
    monkeypatch.setattr(compute_times, "STEP_SPREADS", (0.0,))
    without = [gain(seed) for seed in range(8)]
    assert np.mean(found) > np.mean(without) + 0.004, (found, without)


def test_what_scatters_from_one_measurement_to_the_next_is_no_step() -> None:
    smooth, truth = rugged(0, 0.035)
    draw = np.random.default_rng(3)
    sizes = [
        (2240, 2112, 1984, 1856),
        (2240, 2048, 2048, 1856),
        (2304, 2112, 1920, 1856),
        (2176, 2112, 1984, 1920),
    ]
    for scatter, machine, largest in ((0.03, smooth, (0.0, 0.012)), (0.0, truth, (0.03, 0.2))):
        measure = scattering(machine, draw, 0.003, scatter)
        measurements = [measure(Partition(one)) for one in sizes * 2]
        steps = corrected(FAST, measurements).machine.cost.size_effects
        found = max((abs(factor - 1) for _, factor in steps), default=0.0)
        assert largest[0] <= found <= largest[1]


def test_where_the_space_holds_no_partition_there_is_nothing_more_to_propose() -> None:
    _, truth = rugged(0, 0.035)
    measure = scattering(truth, np.random.default_rng(0), 0.003, 0.0)
    sizes = [(2240, 2112, 1984, 1856), (2240, 2048, 2048, 1856), (2304, 2112, 1920, 1856)]
    measurements = [measure(Partition(one)) for one in sizes * 2]
    assert corrected(FAST, measurements).machine.cost.size_effects
    narrow = Space(CONTEXT, STEP_QUANTUM, ((3.0, 3.0),) * 3)
    assert InformedSampler(narrow, FAST, seed=0).next(measurements) is None


def test_a_step_is_part_of_every_time_that_a_setting_tells() -> None:
    cost = ChunkCost(0.0, 1e-5, 1e-9, 1e-9, 0.2, size_effects=((1000, 1.5),))
    plain, stepped = replace(FAST, cost=replace(cost, size_effects=())), replace(FAST, cost=cost)
    assert cost.seconds(1000, 500) == pytest.approx(1.5 * plain.cost.seconds(1000, 500))
    assert cost.seconds(1001, 500) == plain.cost.seconds(1001, 500)
    one = Partition((1000,))
    assert simulate(one, stepped).ttft_s == pytest.approx(1.5 * simulate(one, plain).ttft_s)
    both = ttft([(1000, 999), (999, 1000)], stepped) / ttft([(1000, 999), (999, 1000)], plain)
    assert 1.0 <= both[0] < 1.5
    assert both[1] > 1.2


class TestInformedContract(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], optuna.samplers.BaseSampler]:
        return lambda: InformedSampler(seed=1)


class TestHierarchicalContract(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], optuna.samplers.BaseSampler]:
        return lambda: HierarchicalGridSampler(seed=1)


def test_a_search_runs_again_from_its_log_alone() -> None:
    asked: list[Measurement] = []

    def measure(partition: Partition) -> Measurement:
        asked.append(measured(partition))
        return asked[-1]

    first = search(measure, CONTEXT, RANKS, 6, machine=FITTED, quantum=QUANTUM, seed=5)
    even = measured(Partition.even(CONTEXT, RANKS))
    replay = Replay([*asked, even])
    again = search(replay, CONTEXT, RANKS, 6, machine=FITTED, quantum=QUANTUM, seed=5)
    assert again == first
    assert not replay.missing
    assert len(replay) == len(first.trials) + 1
    # Another search may ask for what nobody measured: that candidate fails, the others do not.
    other = search(replay, CONTEXT, RANKS, 6, machine=FITTED, quantum=QUANTUM, sampler="hierarchical")
    assert replay.missing
    assert other.best in {one.partition for one in (*asked, even)}


def test_a_machine_that_drifts_teaches_no_wrong_costs() -> None:
    """Measurements taken while everything was slower say the same about the split as the others."""
    splits = [
        (2400, 2300, 1900, 1592),
        (2500, 2200, 1900, 1592),
        (2600, 2000, 2000, 1592),
        (2300, 2100, 2000, 1792),
    ]
    factors = (1.0, 1.4, 0.8, 1.2)
    drifting = []
    for sizes, factor in zip(splits, factors, strict=True):
        one = measured(Partition(sizes))
        times = tuple(RankTimes(r.compute_s * factor, r.wait_s, r.transfer_s) for r in one.samples[0].ranks)
        sample = Sample(one.ttft_s * factor, times, 0)
        drifting.append(msgspec.structs.replace(one, samples=(sample,) * 3))
    found = corrected(FITTED, drifting)
    assert [drift - found.drift[0] for drift in found.drift] == pytest.approx(
        [math.log(factor) for factor in factors], abs=0.03
    )
    still = corrected(FITTED, [measured(Partition(sizes)) for sizes in splits])
    assert still.drift == (0.0,) * 4
    speeds = [ours / theirs for ours, theirs in zip(found.machine.speeds, still.machine.speeds, strict=True)]
    assert max(speeds) / min(speeds) < 1.03
    # The fastest split is told apart from the one that was measured at a good moment.
    ranked = Beliefs.after(FITTED, CONTEXT, drifting).ranked()
    right = min(splits, key=lambda sizes: simulate(Partition(sizes), TRUTH).ttft_s)
    assert ranked[0].sizes == right


def test_noisy_measurements_do_not_send_it_far_away() -> None:
    """Where all that is left is sure to be slower, the least slow of it is next, not the first of the list."""
    few = Space.around([Seed("even", Partition.even(512, 2))], 16, math.log(10))
    truth = replace(FITTED, cost=ChunkCost(0.0, 2e-4, 1.3e-7, 1.3e-7, 0.2))
    known = []
    for size in range(208, 337, 16):
        one = measured(Partition((size, 512 - size)), truth, 1)
        times = [one.ttft_s * off for off in (0.97, 1.0, 1.03)]
        known.append(
            msgspec.structs.replace(
                one, samples=tuple(msgspec.structs.replace(one.samples[0], ttft_s=time) for time in times)
            )
        )
    found = InformedSampler(few, truth, seed=3).next(known)
    assert found is not None
    assert found.sizes[0] in (192, 352)


@pytest.mark.parametrize(
    "make", [lambda: InformedSampler(space(), FITTED, seed=2), lambda: HierarchicalGridSampler(space())]
)
def test_an_own_sampler_drives_a_plain_study(make: Callable[[], PartitionSampler]) -> None:
    sampler = make()
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        params = {
            name: trial.suggest_float(name, low, high)
            for name, (low, high) in zip(space().names(), space().ranges, strict=True)
        }
        partition = sampler.proposals[trial.number]
        assert space().params(partition) == pytest.approx(params)
        found = measured(partition)
        trial.set_user_attr("measurement", msgspec.json.encode(found).decode())
        return found.ttft_s

    study.optimize(objective, n_trials=3)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 3


def test_the_informed_search_finds_a_truth_it_was_not_told_in_a_few_measurements() -> None:
    asked: list[Measurement] = []

    def measure(partition: Partition) -> Measurement:
        asked.append(measured(partition))
        return asked[-1]

    found = search(measure, CONTEXT, RANKS, 12, machine=FITTED, quantum=QUANTUM)
    best = simulate(best_split(CONTEXT, RANKS, TRUTH, quantum=QUANTUM), TRUTH).ttft_s
    assert found.measurement.ttft_s <= best * 1.003
    assert found.stopped == "converged"
    assert len(asked) <= 8
    assert {one.source for one in found.trials} == {"informed"}
    # What it started from was clearly worse.
    assert (
        asked[1].sizes == best_split(CONTEXT, RANKS, corrected(FITTED, asked[:1]).machine, quantum=QUANTUM).sizes
    )


def test_measurements_correct_costs_speeds_and_links() -> None:
    splits = [
        Partition.even(CONTEXT, RANKS),
        Partition((3200, 1600, 1792, 1600)),
        Partition((1600, 2400, 2192, 2000)),
    ]
    machine = corrected(FITTED, [measured(one) for one in splits]).machine
    assert isinstance(machine.link, tuple)
    assert isinstance(TRUTH.link, tuple)
    for found, right in zip(machine.link, TRUTH.link, strict=True):
        assert found.seconds_per_byte == pytest.approx(right.seconds_per_byte, rel=0.02)
    assert machine.speeds[1] / machine.speeds[0] == pytest.approx(0.8, rel=0.02)
    unseen = Partition((2800, 1500, 2000, 1892))
    before = abs(ttft([unseen.sizes], FITTED)[0] / simulate(unseen, TRUTH).ttft_s - 1)
    after = abs(ttft([unseen.sizes], machine)[0] / simulate(unseen, TRUTH).ttft_s - 1)
    assert after < 0.01 < before


def test_links_that_nothing_was_known_of_are_learnt_in_both_topologies() -> None:
    for topology in ("chain", "fanout"):
        told = replace(FITTED, link=LinkCost(), topology=topology)
        true = replace(FITTED, link=LinkCost.of(5e9), topology=topology)
        machine = corrected(told, [measured(Partition.even(CONTEXT, RANKS), true)]).machine
        assert machine.link_between(0, 1).seconds_per_byte == pytest.approx(2e-10, rel=0.01)


def test_nothing_measured_corrects_nothing_and_failures_say_nothing() -> None:
    failed = Measurement("kvr", (4096, 4096), (), "failed", failure=Failure("lost", "gone"))
    assert corrected(FITTED, [failed]).machine == FITTED
    beliefs = Beliefs.after(FITTED, CONTEXT, [failed])
    assert beliefs.ranked() == []
    sampler = InformedSampler(space(2), FITTED, seed=0)
    first = sampler.next([])
    assert first == best_split(CONTEXT, 2, FITTED, quantum=QUANTUM)
    after = sampler.next([Measurement("kvr", first.sizes, (), "failed", failure=Failure("lost", "gone"))])
    assert after is not None
    assert after.sizes != first.sizes


def test_a_lucky_sample_does_not_win_by_itself() -> None:
    best = best_split(CONTEXT, RANKS, TRUTH, quantum=QUANTUM)
    first, *middle, last = best.sizes
    splits = [Partition((first + 32 * at, *middle, last - 32 * at)) for at in range(5)]
    timed = [measured(one, samples=1) for one in splits]
    assert timed[4].ttft_s > 1.01 * timed[0].ttft_s
    lucky = Sample(0.99 * timed[0].ttft_s, timed[4].samples[0].ranks, 0)
    timed[4] = Measurement("kvr", splits[4].sizes, (lucky,), "cap")
    assert min(timed, key=lambda one: one.ttft_s) is timed[4]
    assert Beliefs.after(FITTED, CONTEXT, timed).ranked()[-1] is timed[4]


def test_noise_is_that_of_the_samples() -> None:
    def of(*seconds: float) -> float:
        return noise_of(Measurement("kvr", (1, 1), tuple(Sample(one, (), 0) for one in seconds), "cap"))

    assert of(1.0) == 0.02
    assert of(1.0, 1.0, 1.0) == 1e-3
    assert of(0.9, 1.0, 1.1, 1.0) > of(0.99, 1.0, 1.01, 1.0) > 1e-3


def test_the_informed_sampler_needs_a_machine() -> None:
    with pytest.raises(UnsupportedError, match="needs a machine"):
        search(measured, CONTEXT, RANKS, 5, sampler="informed")


def test_the_grid_halves_as_in_the_paper() -> None:
    # Its example: 96 tokens, boundaries from [32, 64], strides 8, 4 and 2, and a best split at [28, 70].
    sampler = HierarchicalGridSampler(Space(96, 2, ((-3.0, 3.0), (-3.0, 3.0))))
    known: dict[tuple[int, ...], float] = {}
    while (cell := sampler.next(known)) is not None:
        first, second = cell.boundaries[1:3]
        known[cell.sizes] = abs(first - 28) + abs(second - 70) + 1.0
    assert min(known, key=lambda cell: known[cell]) == (28, 42, 26)
    # All but the one cell in which both boundaries meet.
    steps = {cell[0] - 32 for cell in itertools.islice(known, 24)}
    assert steps == {-16, -8, 0, 8, 16}
    assert len(known) <= 3 * 25


@given(st.integers(2, 5), st.integers(64, 3000), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_every_cell_of_the_grid_is_new_and_valid(ranks: int, context: int, budget: int) -> None:
    sampler = HierarchicalGridSampler(Space(context, 4, ((-3.0, 3.0),) * (ranks - 1)))
    known: dict[tuple[int, ...], float] = {}
    for _ in range(budget):
        cell = sampler.next(known)
        if cell is None:
            break
        assert cell.context == context
        assert cell.ranks == ranks
        assert cell.sizes not in known
        known[cell.sizes] = max(np.array(cell.sizes) * np.arange(1, ranks + 1))
