"""The main job as a library call, on ranks that answer from a profile."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from kvr_partition import PartitionTable, UnsupportedError
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from profiler import MeasurementLog, RankGroup, SamplingPlan, Session
from profiler.session import BUDGET, LEAST_BUDGET
from tests.models import write_folder
from tests.profiles import MACHINE, profile_of

PLAN = SamplingPlan(warmup=0, least=2, most=2)


class Heard:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = 0.0

    def doing(self, what: str) -> None:
        self.lines.append(what)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def advance(self, work: float) -> None:
        self.done += work

    def reach(self, done: float) -> None:
        self.done = max(self.done, done)


@pytest.fixture
def group(tmp_path: Path) -> RankGroup:
    folder = write_folder(tmp_path / "llama", "llama-gqa", max_position_embeddings=8192)
    return RankGroup(folder, 3, backend="simulate", profile=profile_of(folder))


def test_contexts_are_searched_and_those_held_out_predicted(group: RankGroup, tmp_path: Path) -> None:
    heard, tables = Heard(), list[PartitionTable]()
    with MeasurementLog(tmp_path / "log.jsonl") as log, group:
        session = Session(
            group, log, [256, 512, 1024], budget=4, plan=PLAN, listener=heard, on_table=tables.append
        )
        results = session.run(held_out=[384])
        total = session.work([384])
        for purpose in ("search/512", "compare/512", "predict/384"):
            assert log.measurements(purpose)
    assert [(result.context, result.held_out) for result in results] == [
        (256, False),
        (512, False),
        (1024, False),
        (384, True),
    ]
    assert [[entry.context for entry in table.entries] for table in tables] == [
        [256],
        [256, 1024],
        [256, 512, 1024],
    ]
    assert session.table is tables[-1]
    for result in results[:3]:
        assert result.found is not None
        best = simulate(best_split(result.context, 3, MACHINE), MACHINE).ttft_s
        assert result.found.measurement.ttft_s <= 1.001 * best
        assert [name for name, _ in result.named][:2] == ["single", "TSP"]
        assert result.named[-1][0] == "KVR-S"
    assert [name for name, _ in results[3].named] == ["single", "TSP", "KVR-E", "KVR-P"]
    assert heard.done == total
    assert "context 256: searching" in heard.lines
    assert session.costs_known


@pytest.mark.parametrize(
    ("each_s", "budget", "most"), [(0.01, None, BUDGET), (8.0, None, LEAST_BUDGET), (8.0, 6, 6)]
)
def test_what_takes_long_is_searched_with_fewer_partitions(
    each_s: float, budget: int | None, most: int, tmp_path: Path
) -> None:
    factor = each_s / simulate(best_split(512, 3, MACHINE), MACHINE).ttft_s
    cost = MACHINE.cost.of_terms([*(term * factor for term in MACHINE.cost.terms[:4]), MACHINE.cost.kv_share])
    folder = write_folder(tmp_path / "llama", "llama-gqa", max_position_embeddings=8192)
    slow = RankGroup(folder, 3, backend="simulate", profile=replace(profile_of(folder), cost=cost))
    with MeasurementLog(tmp_path / "log.jsonl") as log, slow:
        # A sampler that always has something new to offer.
        session = Session(slow, log, [512], budget=budget, plan=PLAN, sampler="tpe", quantum=1)
        found = session.search(512).found
    assert found is not None
    assert len(found.trials) == most


def test_a_session_goes_on_where_its_log_ends(group: RankGroup, tmp_path: Path) -> None:
    def run() -> tuple[int, PartitionTable]:
        with MeasurementLog(tmp_path / "log.jsonl") as log:
            session = Session(
                group, log, [256, 512], budget=3, plan=PLAN, storage=f"sqlite:///{tmp_path}/study.db"
            )
            session.run()
            return len(log.measurements()), session.table

    with group:
        first, again = run(), run()
    assert first[0] == again[0]
    assert [entry.sizes for entry in first[1].entries] == [entry.sizes for entry in again[1].entries]


def test_a_profile_of_shorter_contexts_is_refused_before_anything_is_measured(
    group: RankGroup, tmp_path: Path
) -> None:
    assert group.profile is not None
    with MeasurementLog(tmp_path / "log.jsonl") as log, group:
        session = Session(group, log, [256, 8192], plan=PLAN, profile=group.profile)
        with pytest.raises(UnsupportedError, match="the profile"):
            session.run()
        assert not log.measurements()
