"""Which chunk sizes kernels like: timed in a few layers, and told to searches and predictors."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvr_partition import Partition
from kvr_partition.errors import FileFormatError, UnsupportedError
from kvr_partition.machine.cost import ChunkCost, LinkCost, size_effects_of
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.profile import Profile, load_profile
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.runtime import probe
from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.links.plan import NoLinks
from kvr_partition.search.beliefs import expected_maximum
from kvr_partition.search.correction import corrected
from kvr_partition.training.dataset import Row
from kvr_partition.training.evaluation import decoded
from kvr_partition.training.features import Query
from kvr_partition.training.regressors import Corrected, CostModel
from profiler import MeasurementLog, RankGroup
from profiler.calibrate import guessed_machine, machine_of_log, measured_machine
from profiler.layers import run_layers
from profiler.models import open_model
from profiler.sizes import (
    FINEST,
    LARGEST,
    LAYERS,
    ROUNDS,
    likely_sizes,
    profile_chunk_sizes,
    time_sizes,
    with_size_effects,
)
from tests.landscapes import measured
from tests.models import ALL, build, provenance, write_folder
from tests.rows import LANDS, rugged_row

SMOOTH = ChunkCost(1e-3, 2e-5, 2e-9, 1.5e-9, 0.25)


def stepped(spread: float = 0.04, quantum: int = 128) -> ChunkCost:
    draw = random.Random(1)
    steps = tuple((size, math.exp(draw.gauss(0.0, spread))) for size in range(quantum, 16385, quantum))
    return replace(SMOOTH, size_effects=steps)


@pytest.fixture
def gpu_like(tmp_path: Path) -> RankGroup:
    """Simulated ranks, of a machine whose kernels take 128 rows at once and like some sizes better."""
    folder = write_folder(tmp_path / "llama", "llama-gqa", num_hidden_layers=6, max_position_embeddings=32768)
    machine = Machine(stepped(), 6, 512, link=(LinkCost.of(2e11, 1e-5),) * 2, speeds=(1.0,) * 3)
    origin = provenance(ranks=3, model=open_model(folder).geometry, backend="sm", dtype="float16")
    profile = Profile.of(machine, 16384, origin)
    return RankGroup(folder, 3, backend="simulate", dtype="float16", profile=profile)


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_model_is_run_up_to_a_layer_and_left_as_it_was(name: str) -> None:
    model = build(name)
    ids = torch.arange(24)[None] % 257
    kept = [index for index, layer in enumerate(probe(model).layers) if layer is not None]

    def logits() -> torch.Tensor:
        cache = chunk_cache(model, ids, prefix=0)
        found = run_chunk(model, ids, cache, rank=0, ranks=1, links=NoLinks()).logits
        assert found is not None
        return found

    before = logits()
    cache = chunk_cache(model, ids, prefix=0)
    for _, layer in cache.kv_layers:
        layer.store.rows.fill_(math.nan)
    result = run_layers(model, ids, cache, 1)
    filled = [index for index, layer in cache.kv_layers if not layer.store.rows.isnan().any()]
    # The KV of the layer after the last one is the end.
    assert filled == kept[:2]
    assert result.first_token is None
    assert len(result.timeline.layers) == 1
    first = result.timeline.first_kv_s
    assert first is not None
    assert 0 < first < result.timeline.compute_s
    assert torch.equal(logits(), before)


def test_steps_are_what_a_smooth_cost_does_not_explain() -> None:
    sizes = range(256, 3072, 128)
    assert [factor for _, factor in size_effects_of([(size, SMOOTH.seconds(size, 0)) for size in sizes])] == (
        pytest.approx([1.0] * len(sizes))
    )
    odd = [(size, SMOOTH.seconds(size, 0) / 16 * (1.2 if size == 1024 else 1.0)) for size in reversed(sizes)]
    found = size_effects_of(odd)
    assert [size for size, _ in found] == list(sizes)
    assert max(found, key=lambda step: step[1])[0] == 1024
    assert dict(found)[1024] / dict(found)[1152] == pytest.approx(1.2, rel=0.03)


@given(
    st.lists(st.integers(1024, 65536), min_size=1, max_size=4),
    st.integers(2, 8),
    st.sampled_from([32, 64, 128]),
)
@settings(max_examples=40, deadline=None)
def test_the_sizes_of_good_splits_are_among_the_likely_ones(contexts: list[int], ranks: int, quantum: int) -> None:
    machine = Machine(SMOOTH, 4, 512, link=LinkCost.of(1e11, 1e-5))
    sizes = likely_sizes(machine, contexts, ranks, quantum)
    assert all(size % quantum == 0 and 0 < size <= max(contexts) for size in sizes)
    # Every quantum, or what is little of a chunk; and nothing where it is even less.
    steps = [(low, high - low) for low, high in itertools.pairwise(sizes)]
    assert all(step == quantum if low < FINEST * quantum else step <= low / FINEST * 2 for low, step in steps)
    assert len(sizes) <= FINEST + (LARGEST - FINEST) // 2 + 1
    between = (min(contexts) + max(contexts)) // 2
    for context in {*contexts, between}:
        chunks = best_split(context, ranks, machine, quantum).sizes[:-1]
        timed = [chunk for chunk in chunks if chunk <= LARGEST * quantum]
        if timed:
            assert sizes[0] <= min(timed)
            assert max(timed) <= sizes[-1] * (1 + 2 / FINEST) + quantum


def test_sizes_are_timed_once_and_kept(gpu_like: RankGroup, tmp_path: Path) -> None:
    told: list[int] = []
    sizes = [512, 640, 768, 896, 1024, 1152]
    with MeasurementLog(tmp_path / "log.jsonl") as log, gpu_like as group:
        group.log = log
        time_sizes(group, sizes, log, told.append)
        assert sorted(set(told)) == sizes
        assert len(told) == len(sizes) * (ROUNDS + 1)
        time_sizes(group, [*sizes, 1280], log, told.append)
        assert told[len(sizes) * (ROUNDS + 1) :] == [1280] * (ROUNDS + 1)
    with MeasurementLog(tmp_path / "log.jsonl") as log:
        assert {(line.layers, line.prefix, line.alone) for line in log.chunks} == {(LAYERS, 0, False)}
        found = dict(with_size_effects(SMOOTH, log).size_effects)
        assert with_size_effects(SMOOTH, log).terms == SMOOTH.terms
    true = dict(stepped().size_effects)
    # The smooth part of so few sizes takes some of it.
    for size in sizes[1:]:
        assert found[size] / found[512] == pytest.approx(true[size] / true[512], rel=0.05)


def test_few_sizes_tell_nothing(gpu_like: RankGroup, tmp_path: Path) -> None:
    with MeasurementLog(tmp_path / "log.jsonl") as log, gpu_like as group:
        time_sizes(group, [512, 640, 768, 896], log)
        assert with_size_effects(SMOOTH, log) == SMOOTH


def test_what_is_told_of_sizes_stands_in_the_log(gpu_like: RankGroup, tmp_path: Path) -> None:
    with MeasurementLog(tmp_path / "log.jsonl") as log, gpu_like as group:
        group.log = log
        assert group.tile_rows == 128
        plain = measured_machine(group, 4096, log)
        assert not plain.cost.size_effects
        machine = profile_chunk_sizes(group, plain, {2048: 128, 4096: 128, 64: 1}, log)
        assert machine.cost.terms == plain.cost.terms
        assert len(machine.cost.size_effects) > 5
        assert machine_of_log(log, group.provenance) == machine
        # Timing whole chunks again does not take parts of them for whole.
        assert measured_machine(group, 4096, log) == plain
        # Steps finer than any kernel's tiles say nothing of kernels.
        assert profile_chunk_sizes(group, plain, {2048: 16, 4096: 16}, log) == plain


def test_cpus_take_single_rows(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "llama-gqa")
    with MeasurementLog(tmp_path / "log.jsonl") as log, RankGroup(folder, 2, log=log) as group:
        guess = guessed_machine(group, 64, lambda one: group.measure_many([one], purpose="guess")[0])
        assert profile_chunk_sizes(group, guess, {64: 32}, log) == guess
        assert not log.chunks
        (first, _), (second, _) = group.time_chunk(32, 16, layers=2)
        assert min(first, second) > 0
        for layers in (0, 3):
            with pytest.raises(UnsupportedError, match=f"{layers} layers of llama cannot be timed; 1 to 2 can"):
                group.time_chunk(32, 16, layers=layers)


def test_a_profile_keeps_steps(gpu_like: RankGroup, tmp_path: Path) -> None:
    profile = gpu_like.profile
    assert profile is not None
    profile.save(tmp_path / "profile.json")
    again = load_profile(tmp_path / "profile.json")
    assert again == profile
    assert again.machine().cost == stepped()
    plain = replace(profile, cost=SMOOTH)
    assert b"steps" not in msgspec.json.encode(plain)
    for steps in (((256, 1.0), (128, 1.0)), ((128, 1.0), (128, 1.1)), ((128, 0.0),), ((0, 1.0),)):
        cost = replace(profile.cost, size_effects=steps)
        replace(profile, cost=cost).save(tmp_path / "wrong.json")
        with pytest.raises(FileFormatError, match="steps need sizes that grow, and factors above 0"):
            load_profile(tmp_path / "wrong.json")


def test_only_a_surprise_that_is_not_shared_delays() -> None:
    met = (100, 200)
    rows = [(100, 200, 200), (100, 200, 300), (300, 300, 300), (400, 300, 300), (100, 300, 400), (300, 400, 500)]
    known, one_beside, same, two, two_beside, three = expected_maximum(rows, met)
    assert known == 0
    # Expected largest of a normal number and zero, of two and of three normal numbers.
    assert one_beside == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-4)
    assert same == pytest.approx(0, abs=1e-4)
    assert two == pytest.approx(1 / math.sqrt(math.pi), abs=1e-4)
    assert three == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-4)
    draw = np.random.default_rng(0).normal(size=(200_000, 2))
    assert two_beside == pytest.approx(np.maximum(0, draw.max(axis=1)).mean(), abs=0.01)


def test_predictors_go_by_what_was_told_of_sizes_that_no_search_met() -> None:
    smooth = LANDS[4].truth
    truth = replace(smooth, cost=replace(smooth.cost, size_effects=stepped().size_effects))
    rows = [rugged_row(context, truth) for context in (3072, 6144)]
    searched = [replace(row, trials=row.trials[:1]) for row in rows]

    def told(row: Row) -> Row:
        cost = replace(row.prior.cost, size_effects=stepped().size_effects)
        return replace(row, prior=replace(row.prior, cost=cost))

    def lost(rows: list[Row], method: type[Corrected | CostModel]) -> float:
        regressor = method().fit(rows)
        times = 0.0
        for context in range(3200, 6144, 256):
            query = dataclasses.replace(Query.of(rows[0]), context=context)
            times += simulate(decoded(regressor, query, 128), truth).ttft_s
        return times

    knowing = [told(row) for row in searched]
    assert lost(knowing, Corrected) < 0.995 * lost(searched, Corrected)
    assert lost(knowing, CostModel) < 0.995 * lost(searched, CostModel)
    # Boundaries are solved without steps: those of single sizes belong to no other context.
    query = Query.of(knowing[0])
    assert CostModel().cuts(query) == CostModel().cuts(Query.of(searched[0]))
    assert decoded(CostModel(), query, 16) == Partition.from_cuts(CostModel().cuts(query), query.context, 16)


@pytest.mark.parametrize("shows", [0.0, 0.5, 1.0])
def test_measurements_say_how_much_of_what_was_told_shows(shows: float) -> None:
    told_steps = stepped(0.06).size_effects
    smooth = Machine(SMOOTH, 16, 16384, link=LinkCost.of(2e12, 1e-5))
    truth = replace(
        smooth, cost=replace(SMOOTH, size_effects=tuple((size, factor**shows) for size, factor in told_steps))
    )
    told = replace(smooth, cost=replace(SMOOTH, size_effects=told_steps))
    draw = random.Random(4)
    splits = []
    for _ in range(8):
        sizes = [128 * draw.randint(11, 21) for _ in range(3)]
        splits.append(Partition((*sizes, 8192 - sum(sizes))))
    found = corrected(told, [measured(one, truth) for one in splits])
    met = {size for one in splits for size in one.sizes}
    unmet = [(size, factor) for size, factor in told_steps if size not in met and 1024 <= size <= 3072]
    steps = dict(found.machine.cost.size_effects)
    off = [math.log(steps[size]) - shows * math.log(factor) for size, factor in unmet]
    assert max(map(abs, off)) <= 0.26 * max(abs(math.log(factor)) for _, factor in unmet)
    assert set(found.measured_sizes) == met
    # Nothing is measured yet: half of it.
    before = dict(corrected(told, []).machine.cost.size_effects)
    assert before[2048] == pytest.approx(dict(told_steps)[2048] ** 0.5)
