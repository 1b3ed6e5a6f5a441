"""A range of contexts, searched until a predictor is sure of it, on ranks that answer from a profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvr_partition.errors import KVRError, PartitionError, UnsupportedError
from profiler import MeasurementLog, RankGroup, SamplingPlan, Session
from profiler.covering import LEAST_RATIO, Covered, cover
from tests.models import write_folder
from tests.profiles import profile_of

PLAN = SamplingPlan(warmup=0, least=2, most=2)


@pytest.fixture
def group(tmp_path: Path) -> RankGroup:
    folder = write_folder(tmp_path / "llama", "llama-gqa", max_position_embeddings=8192)
    return RankGroup(folder, 3, backend="simulate", profile=profile_of(folder))


def covered(
    group: RankGroup, folder: Path, until: float, most: int = 12, low: int = 256, high: int = 1024
) -> tuple[Session, Covered, int]:
    """A range, searched in a folder; the samples that its log has then."""
    with MeasurementLog(folder / "log.jsonl") as log:
        storage = f"sqlite:///{folder}/study.db"
        session = Session(group, log, [], budget=4, plan=PLAN, storage=storage)
        found = cover(session, low, high, until, most)
        return session, found, sum(len(one.samples) for one in log.measurements())


def test_a_range_is_searched_until_what_is_left_out_loses_little_enough(group: RankGroup, tmp_path: Path) -> None:
    with group:
        session, found, _ = covered(group, tmp_path, until=0.05)
    assert (found.low, found.high, found.reached, found.why) == (256, 1024, True, "")
    assert found.regret is not None
    assert found.regret.max <= 0.05
    # One in the middle is what can be left out.
    assert found.contexts == (256, 512, 1024)
    assert [entry.context for entry in session.table.entries] == [256, 512, 1024]
    by_context = {result.context: result.found for result in session.results}
    assert found.measured == sum(len(one.trials) for one in by_context.values() if one is not None)
    middle = by_context[512]
    assert middle is not None
    assert middle.trials[0].source == "predicted"


def test_a_target_out_of_reach_ends_at_the_most_contexts_and_says_so(group: RankGroup, tmp_path: Path) -> None:
    with group:
        session, found, _ = covered(group, tmp_path, until=1e-9, most=5)
    assert not found.reached
    assert found.why == "5 contexts were searched, and 5 are the most that were asked for"
    assert found.regret is not None
    assert found.regret.cases == 3
    assert len(found.contexts) == 5
    ratios = [high / low for low, high in zip(found.contexts, found.contexts[1:], strict=False)]
    assert min(ratios) >= LEAST_RATIO
    assert max(ratios) <= 2.1
    assert [entry.context for entry in session.table.entries] == list(found.contexts)


def test_the_same_command_goes_on_and_measures_nothing_twice(group: RankGroup, tmp_path: Path) -> None:
    with group:
        _, first, samples = covered(group, tmp_path, until=1e-9, most=4)
        _, again, samples_again = covered(group, tmp_path, until=1e-9, most=4)
        _, more, _ = covered(group, tmp_path, until=1e-9, most=5)
    assert (again.contexts, samples_again) == (first.contexts, samples)
    assert again.regret == first.regret
    assert set(first.contexts) < set(more.contexts)


def test_what_a_table_has_already_is_not_left_out_of_account(group: RankGroup, tmp_path: Path) -> None:
    with group, MeasurementLog(tmp_path / "log.jsonl") as log:
        session = Session(group, log, [300, 2048], budget=3, plan=PLAN)
        session.run()
        found = cover(session, 256, 1024, until=0.5)
    assert found.contexts == (256, 300, 1024)


def test_a_sampler_that_goes_by_no_costs_covers_a_range_too(group: RankGroup, tmp_path: Path) -> None:
    with group, MeasurementLog(tmp_path / "log.jsonl") as log:
        session = Session(group, log, [], budget=2, plan=PLAN, sampler="hierarchical")
        found = cover(session, 256, 1024, until=0.5)
    assert (found.contexts, found.reached) == ((256, 512, 1024), True)


def test_a_range_behind_cached_tokens(group: RankGroup, tmp_path: Path) -> None:
    with group, MeasurementLog(tmp_path / "log.jsonl") as log:
        Session(group, log, [300], budget=2, plan=PLAN).run()
        session = Session(group, log, [], past=128, budget=3, plan=PLAN)
        found = cover(session, 256, 1024, until=0.5)
    assert found.contexts == (256, 512, 1024)
    assert {entry.past for entry in session.table.entries} == {128}


def test_contexts_that_lie_close_together_say_nothing_about_others(group: RankGroup, tmp_path: Path) -> None:
    with group:
        _, found, _ = covered(group, tmp_path, until=0.01, low=256, high=300)
    assert (found.contexts, found.reached, found.regret) == ((256, 300), False, None)
    assert "too close together" in found.why


@pytest.mark.parametrize(
    ("low", "high", "until", "most", "error", "message"),
    [
        (1024, 256, 0.01, 12, UnsupportedError, "from the shorter to the longer one; got 1024 to 256"),
        (0, 256, 0.01, 12, UnsupportedError, "got 0 to 256"),
        (256, 1024, 0.0, 12, UnsupportedError, "a share between 0 and 1; got 0"),
        (256, 1024, 1.5, 12, UnsupportedError, "a share between 0 and 1"),
        (256, 1024, 0.01, 2, UnsupportedError, "got at most 2"),
        (256, 9000, 0.01, 12, PartitionError, "9000"),
        (2, 1024, 0.01, 12, PartitionError, "2"),
    ],
)
def test_ranges_that_make_no_sense_are_refused_before_anything_is_measured(
    low: int,
    high: int,
    until: float,
    most: int,
    error: type[KVRError],
    message: str,
    group: RankGroup,
    tmp_path: Path,
) -> None:
    with group, MeasurementLog(tmp_path / "log.jsonl") as log:
        with pytest.raises(error, match=message):
            cover(Session(group, log, [], plan=PLAN), low, high, until, most)
        assert not log.measurements()
