"""Long prefills are measured less often: samples, trials and sizes within a time, each at least once."""

from __future__ import annotations

from collections import Counter

import pytest

from kvr_partition.measurement import RankTimes, Sample
from kvr_partition.partition import Partition
from profiler.measure import Candidate, SamplingPlan, measure_interleaved

LONG, SHORT = Candidate("single", Partition((4096,))), Candidate("kvr", Partition((2048, 2048)))


def sample(seconds: float) -> Sample:
    return Sample(seconds, (RankTimes(seconds, 0.0, 0.0),), 0)


def taken(plan: SamplingPlan, seconds: dict[Candidate, float]) -> tuple[Counter[Candidate], list[str]]:
    count: Counter[Candidate] = Counter()

    def take(candidate: Candidate) -> Sample:
        count[candidate] += 1
        return sample(seconds[candidate] * (1 + 0.1 * (count[candidate] % 3)))

    found = measure_interleaved(list(seconds), take, plan)
    return count, [one.stopped for one in found]


def test_one_that_has_had_its_share_of_time_sits_out_and_the_others_go_on() -> None:
    plan = SamplingPlan(warmup=1, least=6, most=20, tolerance=0.001, patience_s=10.0)
    count, stopped = taken(plan, {LONG: 4.0, SHORT: 0.2})
    assert count == {LONG: 3, SHORT: 21}
    assert stopped == ["cap", "cap"]


def test_each_has_a_sample_that_counts_however_long_it_takes() -> None:
    plan = SamplingPlan(warmup=1, least=6, most=20, patience_s=1.0)
    count, _ = taken(plan, {LONG: 100.0})
    assert count == {LONG: 2}


def test_nobody_sits_out_on_a_cpu() -> None:
    count, _ = taken(SamplingPlan.at_most(8, "cpu"), {LONG: 100.0, SHORT: 1.0})
    assert count[LONG] == count[SHORT]


@pytest.mark.parametrize("backend", ["cuda", "sm"])
def test_gpus_have_a_patience(backend: str) -> None:
    assert SamplingPlan.at_most(None, backend).patience_s < 60


def test_who_says_how_many_samples_gets_them() -> None:
    count, _ = taken(SamplingPlan.at_most(7, "cuda"), {LONG: 100.0})
    assert count == {LONG: 8}
