"""The main job as a library call, on ranks that answer from a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from kvr_partition import PartitionTable
from kvr_partition.errors import RankError, StorageError, UnsupportedError
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Sample
from profiler import Candidate, MeasurementLog, RankGroup, SamplingPlan, Session
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


def slower(group: RankGroup, factor: float) -> RankGroup:
    """Ranks of the same model that take so many times as long, and links that are as much slower."""
    assert group.profile is not None
    cost = group.profile.cost
    cost = cost.of_terms([*(term * factor for term in cost.terms[:4]), cost.kv_share])
    device = {"provenance": replace(group.profile.provenance, device="another")}
    return RankGroup(group.model, 3, backend="simulate", profile=replace(group.profile, cost=cost, **device))


def test_a_log_says_the_conditions_of_ranks_that_started_before_it_was_theirs(
    group: RankGroup, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    with group, MeasurementLog(path) as log:
        Session(group, log, [256], budget=2, plan=PLAN).run()
        run = group.run
    with MeasurementLog(path) as log:
        assert set(log.provenance) == {run}
        assert {result.run for result in log.measurements()} == set(log.provenance)
        assert {line.run for line in log.chunks} == set(log.provenance)
        assert log.kept is not None


def test_what_other_ranks_measured_is_not_taken_for_ones_own(group: RankGroup, tmp_path: Path) -> None:
    def found(ranks: RankGroup) -> float:
        with MeasurementLog(tmp_path / "log.jsonl") as log, ranks:
            result = Session(ranks, log, [256], budget=2, plan=PLAN).search(256)
        assert result.found is not None
        return result.found.measurement.ttft_s

    other = slower(group, 10.0)
    first = found(group)
    assert found(other) > 8 * first
    assert found(group) == first


def test_what_held_links_measured_is_not_taken_for_that_of_free_ones(group: RankGroup, tmp_path: Path) -> None:
    with MeasurementLog(tmp_path / "log.jsonl") as log, group:

        def found() -> float:
            return Session(group, log, [256], budget=2, plan=PLAN).search(256).named[-1][1].ttft_s

        free = found()
        group.hold_links(1e6)
        assert found() > 2 * free
        group.hold_links(None)
        lines = len(log.measurements()), len(log.chunks), len(log.links)
        assert found() == free
        assert (len(log.measurements()), len(log.chunks), len(log.links)) == lines


def test_a_table_of_other_ranks_is_refused_before_anything_is_measured(group: RankGroup, tmp_path: Path) -> None:
    with MeasurementLog(tmp_path / "log.jsonl") as log, slower(group, 2.0) as others:
        table = Session(others, log, [256], budget=2, plan=PLAN)
        table.run()
    with MeasurementLog(tmp_path / "other.jsonl") as log, group:
        session = Session(group, log, [512], plan=PLAN, table=table.table)
        with pytest.raises(UnsupportedError, match="the table is of other ranks: device"):
            session.run()
        assert not log.measurements()


@pytest.mark.parametrize("error", [RankError("rank 1 was killed"), StorageError("the disk is full")])
def test_a_failure_while_chunks_are_timed_changes_nothing_about_the_next_try(
    error: Exception, group: RankGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, failed = group.time_chunk, []

    def once(*arguments: object, **named: object) -> object:
        if not failed:
            failed.append(True)
            raise error
        return times(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(group, "time_chunk", once)
    with MeasurementLog(tmp_path / "log.jsonl") as log, group:
        session = Session(group, log, [256], budget=3, plan=PLAN)
        with pytest.raises(type(error)):
            session.run()
        (result,) = session.run()
    assert session.costs_known
    assert result.found is not None
    assert "informed" in {trial.source for trial in result.found.trials}


def test_a_session_keeps_what_it_found_before_a_context_failed(
    group: RankGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, heard = group.sample, Heard()

    def broken(candidate: Candidate) -> Sample:
        if candidate.partition.context == 512:
            raise RankError("rank 2 was killed by SIGKILL", rank=2, kind="lost")
        return sample(candidate)

    monkeypatch.setattr(group, "sample", broken)
    with MeasurementLog(tmp_path / "log.jsonl") as log, group:
        session = Session(group, log, [512, 256], budget=3, plan=PLAN, listener=heard)
        with pytest.raises(RankError):
            session.run()
    assert [result.context for result in session.results] == [256]
    assert any("failed" in line and "SIGKILL" in line for line in heard.lines)


def test_contexts_are_searched_once_in_ascending_order(group: RankGroup, tmp_path: Path) -> None:
    heard = Heard()
    with MeasurementLog(tmp_path / "log.jsonl") as log, group:
        session = Session(group, log, [512, 256, 512], budget=2, plan=PLAN, listener=heard)
        results = session.run(held_out=[384, 384])
    assert [result.context for result in results] == [256, 512, 384]
    assert heard.done == session.work([384])


@pytest.mark.parametrize(
    ("wrong", "said"), [({"budget": 0}, "budget"), ({"quantum": 0}, "quantum"), ({"sampler": "gut"}, "sampler")]
)
def test_words_and_numbers_that_no_search_knows_are_refused(
    wrong: dict[str, Any], said: str, group: RankGroup, tmp_path: Path
) -> None:
    with MeasurementLog(tmp_path / "log.jsonl") as log, pytest.raises(UnsupportedError, match=said):
        Session(group, log, [256], **wrong)


def test_a_session_without_contexts_is_refused(group: RankGroup, tmp_path: Path) -> None:
    with MeasurementLog(tmp_path / "log.jsonl") as log, pytest.raises(UnsupportedError, match="name a context"):
        Session(group, log, []).run()
