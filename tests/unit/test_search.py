from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvr_partition import Partition
from kvr_partition.errors import RankError, StorageError, UnsupportedError
from kvr_partition.measurement import Failure, Measurement
from kvr_partition.search import SAMPLERS, Seed, search
from kvr_partition.search.space import Space, default_quantum
from tests.studies import CONTEXT, RANKS, Recorder, landscape, measurement, seeds


@pytest.mark.parametrize("sampler", sorted({*SAMPLERS} - {"informed", "hierarchical"}))
def test_seeds_come_first_and_the_sampler_improves_on_them(sampler: str) -> None:
    measure = Recorder()
    found = search(measure, CONTEXT, RANKS, 14, seeds=seeds, sampler=sampler)
    assert measure.asked[0] == Partition.even(CONTEXT, RANKS).sizes
    assert measure.asked[1:3] == [(1500, 1300, 1296), (1600, 1300, 1196)]
    assert len(set(measure.asked)) == len(found.trials) == 14
    assert landscape(found.best) == min(landscape(one.partition) for one in found.trials)
    assert landscape(found.best) <= landscape(Partition((1600, 1300, 1196)))
    assert found.stopped == "budget"
    assert [one.source for one in found.trials[:3]] == ["even", "interpolated", "balanced"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_partition_of_a_search_stands_behind_its_past(sampler: str) -> None:
    from tests.landscapes import FITTED

    pasts = set()

    def measure(partition: Partition) -> Measurement:
        pasts.add(partition.past)
        return measurement(partition, landscape(partition))

    found = search(measure, CONTEXT, RANKS, 5, sampler=sampler, machine=FITTED, past=1000)
    assert pasts == {1000}
    assert found.best.past == 1000


def test_a_stopped_search_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = Recorder()
    search(first, CONTEXT, RANKS, 5, seeds=seeds, storage=storage)
    second = Recorder()

    def no_seeds() -> Sequence[Seed]:
        raise AssertionError("a study that has begun keeps its seeds")

    found = search(second, CONTEXT, RANKS, 9, seeds=no_seeds, storage=storage)
    assert not set(first.asked) & set(second.asked[:-1])
    assert len(first.asked) == 5
    assert len(found.trials) == 9


def test_a_search_that_goes_on_keeps_the_steps_it_began_with(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    first = search(Recorder(), CONTEXT, RANKS, 6, seeds=seeds, sampler="tpe", storage=url, quantum=64)
    on = search(Recorder(), CONTEXT, RANKS, 12, seeds=seeds, sampler="tpe", storage=url, quantum=1)
    assert (first.quantum, on.quantum) == (64, 64)
    proposed = [one.partition for one in on.trials if one.source == "tpe"]
    assert len(proposed) > 6
    assert all(cut % 64 == 0 for partition in proposed for cut in partition.boundaries)


KILLED = """
import os, signal, sys
from kvr_partition.search import search
from tests.studies import CONTEXT, RANKS, Recorder, seeds
count = 0
def measure(partition, recorder=Recorder()):
    global count
    count += 1
    if count > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    print(partition, flush=True)
    return recorder(partition)
search(measure, CONTEXT, RANKS, 8, seeds=seeds, storage="sqlite:///" + sys.argv[1])
"""


def test_killed_in_the_middle_of_a_measurement_it_measures_that_one_and_no_other(tmp_path: Path) -> None:
    database = tmp_path / "study.db"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(database), "4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9
    before = [Partition.parse(line).sizes for line in done.stdout.split()]
    assert len(before) == 4
    after = Recorder()
    found = search(after, CONTEXT, RANKS, 8, seeds=seeds, storage=f"sqlite:///{database}")
    assert not set(before) & set(after.asked[:4])
    assert len(found.trials) == 8
    assert {one.partition.sizes for one in found.trials} == set(before) | set(after.asked[:4])


def test_confirmation_decides_between_the_best() -> None:
    asked: list[tuple[int, ...]] = []

    def confirm(partitions: Sequence[Partition]) -> list[Measurement]:
        asked.extend(one.sizes for one in partitions)
        # Side by side, the third of them turns out the fastest.
        return [measurement(one, 2.0 if one != partitions[2] else 1.0) for one in partitions]

    found = search(Recorder(), CONTEXT, RANKS, 6, seeds=seeds, confirm=confirm)
    assert len(asked) == 4
    assert asked[0] == Partition.even(CONTEXT, RANKS).sizes
    assert found.best.sizes == asked[2]
    assert found.measurement.ttft_s == 1.0


def test_failed_partitions_are_kept_as_failures_and_the_search_goes_on() -> None:
    def measure(partition: Partition) -> Measurement:
        if partition.sizes[0] > 1550:
            return Measurement(
                "kvr", partition.sizes, (), "failed", failure=Failure("out-of-memory", "rank 0 ran out of memory")
            )
        return measurement(partition, landscape(partition))

    found = search(measure, CONTEXT, RANKS, 8, seeds=seeds, sampler="tpe")
    assert found.best.sizes[0] <= 1550
    failed = [one for one in found.trials if one.ttft_s is None]
    assert failed
    assert len(found.trials) == 8


def test_when_everything_fails_it_stops_and_says_why() -> None:
    def measure(partition: Partition) -> Measurement:
        return Measurement("kvr", partition.sizes, (), "failed", failure=Failure("lost", "rank 1 ended"))

    with pytest.raises(RankError, match="3 times in a row, last: rank 1 ended"):
        search(measure, CONTEXT, RANKS, 8, seeds=seeds)


def test_an_exhausted_neighbourhood_ends_the_search() -> None:
    found = search(Recorder(), 5, 2, 100)
    assert found.stopped == "exhausted"
    assert 1 <= len(found.trials) <= 4


def test_another_searchs_study_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    search(Recorder(), CONTEXT, RANKS, 2, storage=storage, study_name="mine")
    with pytest.raises(StorageError, match="is for context 4096 with past 0 on 3 ranks"):
        search(Recorder(), 2048, RANKS, 2, storage=storage, study_name="mine")
    (tmp_path / "study.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(StorageError, match="move the database away") as caught:
        search(Recorder(), CONTEXT, RANKS, 2, storage=storage)
    assert "\n" not in str(caught.value)


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(
        UnsupportedError, match="unknown sampler 'luck'; there are informed, hierarchical, gp, tpe, cmaes"
    ):
        search(Recorder(), CONTEXT, RANKS, 2, sampler="luck")


def test_the_space_holds_all_seeds_and_every_point_decodes() -> None:
    all_seeds = [Seed("even", Partition.even(CONTEXT, RANKS)), *seeds()]
    space = Space.around(all_seeds, default_quantum(CONTEXT, RANKS))
    for seed in all_seeds:
        for (low, high), value in zip(space.ranges, space.params(seed.partition).values(), strict=True):
            assert low < value < high
    for corner in (0, 1):
        params = {name: ends[corner] for name, ends in zip(space.names(), space.ranges, strict=True)}
        assert space.partition(params).context == CONTEXT
    lone = Space.around(all_seeds[:1], 1)
    assert all(math.isclose(high - low, 2 * math.log(2)) for low, high in lone.ranges)


@pytest.mark.parametrize(("context", "ranks", "quantum"), [(512, 2, 2), (16384, 8, 16), (100, 8, 1), (1, 1, 1)])
def test_the_quantum_leaves_each_rank_128_steps(context: int, ranks: int, quantum: int) -> None:
    assert default_quantum(context, ranks) == quantum


@pytest.mark.parametrize(
    ("context", "ranks", "quantum"), [(65536, 2, 256), (16384, 8, 128), (8192, 8, 128), (8191, 8, 64), (16, 8, 1)]
)
def test_the_quantum_is_a_tile_where_every_rank_has_eight(context: int, ranks: int, quantum: int) -> None:
    assert default_quantum(context, ranks, tile=128) == quantum
