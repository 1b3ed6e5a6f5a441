"""One record for each method: whoever lacks one cannot be imported, and everyone goes by what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvr_partition import Partition, PartitionError, UnsupportedError
from kvr_partition.cli.compare import NAMES
from kvr_partition.machine import methods as schedules
from kvr_partition.machine.bounds import gathering_ttft
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.methods import BASELINES, GATHERING, METHODS, check_complete, method_of
from profiler import runners
from tests.models import write_folder

MACHINE = Machine(ChunkCost(1e-3, 2e-5, 2e-9, 1.5e-9, 0.25), 3, 512, link=LinkCost.of(2e9, 1e-4))


@pytest.mark.parametrize("lacking", METHODS)
def test_a_part_that_forgets_a_method_cannot_be_imported(lacking: str) -> None:
    for part in (runners.RUNNERS, schedules._SCHEDULES):
        check_complete("this", part)
        with pytest.raises(ImportError, match=f"differ in {lacking}$"):
            check_complete("this", [name for name in part if name != lacking])
    with pytest.raises(ImportError, match="differ in ring"):
        check_complete("this", [*METHODS, "ring"])


def test_what_gathers_is_said_once() -> None:
    assert set(GATHERING) == {name for name, method in METHODS.items() if method.gathers}
    assert set(BASELINES) == {*GATHERING, "tp"}
    for name in GATHERING:
        assert gathering_ttft(name, 512, 2, MACHINE) > 0


def test_every_method_has_a_row_in_comparisons_or_runs_a_split() -> None:
    for name, method in METHODS.items():
        assert (name in NAMES) != method.splits
        assert method.title


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_scheduled_or_says_why_not(name: str) -> None:
    method, ranks = METHODS[name], 2
    split = Partition((512,)) if method.alone else Partition.even(512, ranks)
    if method.unscheduled:
        with pytest.raises(UnsupportedError, match=method.unscheduled):
            schedules.scheduled(name, split, ranks, MACHINE)
        return
    found = schedules.scheduled(name, split, ranks, MACHINE)
    assert found.ttft_s > 0
    assert len(found.times) == len(found.sent_bytes) == ranks
    assert any(found.sent_bytes) == (method.limited and not method.alone)


def test_a_method_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UnsupportedError, match="unknown method 'ring'; there are stock, single, tsp"):
        method_of("ring")


def test_even_chunks_are_not_said_to_be_others(tmp_path: Path) -> None:
    from profiler import Candidate, RankGroup

    group = RankGroup(write_folder(tmp_path / "llama", "llama-gqa"), ranks=2, backend="cpu")
    with pytest.raises(PartitionError, match=r"tsp runs even chunks only, which are 32/32; got 40/24"):
        group.check(Candidate("tsp", Partition((40, 24))))
