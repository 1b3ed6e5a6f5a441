"""The profile file, and ranks that answer from it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvr_partition import Partition
from kvr_partition.errors import FileFormatError, RankError, UnsupportedError
from kvr_partition.machine.bounds import bounds, gathering_ttft
from kvr_partition.machine.cost import ChunkCost, FitError, LinkCost, TimedChunk
from kvr_partition.machine.profile import load_profile
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Failure, Measurement
from profiler import Candidate, MeasurementLog, RankGroup
from profiler.calibrate import guessed_machine, guessed_machine_of_log, machine_of_log, measured_machine
from tests.models import write_folder
from tests.profiles import COST, LINKS, MACHINE, profile_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "llama", "llama-gqa")


@pytest.fixture
def group(folder: Path) -> RankGroup:
    return RankGroup(folder, 3, backend="simulate", profile=profile_of(folder))


def test_a_profile_comes_back_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    profile = profile_of(folder)
    profile.save(tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile
    assert profile.machine() == MACHINE
    held = profile.machine("fanout", bandwidth=1.5e9)
    assert held.topology == "fanout"
    assert [held.link_between(at, at + 1).seconds_per_byte for at in (0, 1)] == [1 / 1.5e9, 1e-9]


def test_a_log_says_what_a_model_keeps_which_its_configuration_may_not(tmp_path: Path) -> None:
    """Falcon with grouped KV heads keeps those of all query heads."""
    folder = write_folder(tmp_path / "falcon", "falcon-new")
    profile = profile_of(folder)
    with (
        MeasurementLog(tmp_path / "log.jsonl") as log,
        RankGroup(folder, 3, backend="simulate", profile=profile, log=log) as group,
    ):
        found = measured_machine(group, 512, log)
        shape = group.geometry
        assert group.entry_bytes == 2 * 2 * shape.kv_heads * shape.head_dim * 4
    with MeasurementLog(tmp_path / "log.jsonl") as log:
        (origin,) = log.provenance.values()
        assert machine_of_log(log, origin).entry_bytes == found.entry_bytes == group.entry_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "kvr-partition/profile/9"}, "this version reads"),
        ({"speeds": [1.0, 1.0]}, "need 3 speeds"),
        ({"speeds": [1.0, 1.0, 0.0]}, "speeds above 0"),
        ({"alone_speed": 0.5}, "a rank alone cannot be slower"),
        ({"links": []}, "joined by 2 links"),
        ({"layers": 0}, "must be positive"),
        ({"cost": {"fixed_s": 0, "per_token_s": -1, "per_own_pair_s": 0, "per_prefix_pair_s": 0, "kv_share": 0}},
         "must not be negative"),
        ({"surprise": 1}, "unknown field"),
    ],
)  # fmt: skip
def test_a_bad_profile_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({**msgspec.to_builtins(profile_of(folder)), **change}))
    with pytest.raises(FileFormatError, match=message):
        load_profile(file)


def test_simulated_ranks_answer_what_the_schedule_says(group: RankGroup) -> None:
    split = Partition((250, 150, 104))
    with group:
        for method, machine in (("kvr", MACHINE), ("kvr-fanout", profile_of(Path(group.model)).machine("fanout"))):
            sample = group.sample(Candidate(method, split))
            timeline = simulate(split, machine)
            assert sample.ttft_s == pytest.approx(timeline.ttft_s)
            assert [one.wait_s for one in sample.ranks] == pytest.approx([one.wait_s for one in timeline.ranks])
        even = Partition.even(504, 3)
        for method in ("tsp", "tsp-causal", "zigzag"):
            found = group.sample(Candidate(method, even)).ttft_s
            assert found == pytest.approx(gathering_ttft(method, 504, 3, MACHINE))  # type: ignore[arg-type]
        limits = bounds(504, 3, MACHINE, split)
        assert group.sample(Candidate.single(504)).ttft_s == pytest.approx(limits.single_s)
        assert group.sample(Candidate("bound", split)).ttft_s == pytest.approx(limits.practical_s)
        assert group.provenance.backend == "simulate"
        assert group.provenance.link.startswith("simulated")
        group.hold_links(1e7)
        assert group.sample(Candidate("kvr", split)).ttft_s > simulate(split, MACHINE).ttft_s
        with pytest.raises(UnsupportedError, match="no schedule of tensor parallelism"):
            group.check(Candidate.even("tp", 504, 3))
        with pytest.raises(UnsupportedError, match="hold no model"):
            group.verify(Candidate("kvr", split))


def test_profiling_a_simulated_machine_finds_its_costs_again(group: RankGroup, tmp_path: Path) -> None:
    with MeasurementLog(tmp_path / "log.jsonl") as log, group:
        group.log = log
        found = measured_machine(group, 4096, log)
        lines = len(log.chunks), len(log.links)
        assert measured_machine(group, 4096, log) == found
        assert (len(log.chunks), len(log.links)) == lines
        assert machine_of_log(log, group.provenance) == found
        # What a log tells later hangs on every sample in it, so no point may be given more than was fitted to.
        samples = Counter((line.chunk, line.prefix) for line in log.chunks if not (line.warmup or line.alone))
        assert len(set(samples.values())) == 1
    # Costs are fitted to the mean of all ranks: only cost and speed together can be told.
    for rank, speed in enumerate(MACHINE.speeds):
        for name in ("fixed_s", "per_token_s", "per_own_pair_s", "per_prefix_pair_s"):
            told = getattr(found.cost, name) / found.speeds[rank]
            assert told == pytest.approx(getattr(COST, name) / speed, rel=0.01), name
    assert math.prod(found.speeds) == pytest.approx(1)
    assert found.solo_speedup == pytest.approx(MACHINE.solo_speedup)
    assert found.cost.kv_share == pytest.approx(COST.kv_share, rel=0.01)
    assert isinstance(found.link, tuple)
    for link, right in zip(found.link, LINKS, strict=True):
        assert link.latency_s == pytest.approx(right.latency_s, rel=0.01)
        assert link.seconds_per_byte == pytest.approx(right.seconds_per_byte, rel=0.01)
    assert (found.layers, found.overlap) == (3, True)
    assert best_split(2048, 3, found).sizes == pytest.approx(best_split(2048, 3, MACHINE).sizes, abs=8) or (
        simulate(best_split(2048, 3, found), MACHINE).ttft_s
        <= simulate(best_split(2048, 3, MACHINE), MACHINE).ttft_s * 1.001
    )


def test_costs_are_guessed_even_where_one_rank_cannot_read_the_prompt(group: RankGroup) -> None:
    def measure(candidate: Candidate, fits: frozenset[str]) -> Measurement:
        if candidate.method in fits:
            return group.measure_many([candidate])[0]
        failure = Failure("out-of-memory", f"no room for {candidate.method}")
        return Measurement(candidate.method, candidate.partition.sizes, (), "failed", failure=failure)

    with group:
        alone = guessed_machine(group, 504, lambda one: measure(one, frozenset({"single", "kvr"})))
        together = guessed_machine(group, 504, lambda one: measure(one, frozenset({"kvr"})))
        with pytest.raises(RankError, match=r"no room for single.*no room for kvr"):
            guessed_machine(group, 504, lambda one: measure(one, frozenset()))
    # Each of three ranks pays what does not depend on its chunk.
    assert together.cost.per_token_s == pytest.approx(alone.cost.per_token_s, rel=0.4)
    assert together.cost.kv_share == alone.cost.kv_share


@pytest.mark.parametrize("method", ["single", "kvr"])
def test_a_log_tells_the_guess_that_was_made_from_it(group: RankGroup, tmp_path: Path, method: str) -> None:
    def measure(candidate: Candidate) -> Measurement:
        if candidate.method == method:
            return group.measure_many([candidate], purpose="guess")[0]
        failure = Failure("out-of-memory", f"no room for {candidate.method}")
        return Measurement(candidate.method, candidate.partition.sizes, (), "failed", failure=failure)

    with MeasurementLog(tmp_path / "log.jsonl") as log, group:
        group.log = log
        with pytest.raises(FitError, match="to guess costs from"):
            guessed_machine_of_log(log, group.provenance, group.operations)
        guess = guessed_machine(group, 504, measure)
        origin = group.provenance
        assert guessed_machine_of_log(log, origin, group.operations) == guess
    with MeasurementLog(tmp_path / "log.jsonl") as again:
        assert machine_of_log(again, origin) == guess


def test_a_profile_answers_only_for_what_it_measured(folder: Path, tmp_path: Path) -> None:
    profile = profile_of(folder)
    other = write_folder(tmp_path / "other", "mistral-window")
    for arguments, message in (
        ({"ranks": 2, "profile": profile}, "of ranks 3, not 2"),
        ({"ranks": 3, "profile": profile, "dtype": "float16"}, "of dtype float32, not float16"),
        ({"ranks": 3, "profile": profile, "model": other}, "of model llama, not other"),
        ({"ranks": 3}, "with a profile"),
        ({"ranks": 3, "profile": profile, "backend": "cpu"}, "goes with backend 'simulate'"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            RankGroup(**{"model": folder, "backend": "simulate", **arguments})  # type: ignore[arg-type]


def test_links_and_kv_share_need_what_tells_them() -> None:
    with pytest.raises(FitError, match="two sizes at least 4x apart"):
        LinkCost.fit([(1000, 1.0), (2000, 2.0)])
    with pytest.raises(FitError, match="equally long"):
        LinkCost.fit([(1000, 1.0), (100_000, 1.0), (1_000_000, 0.5)])
    points = [(c, s) for c in (256, 512, 1024) for s in (0, 1500, 3072)]
    without = ChunkCost.fit([TimedChunk(c, s, COST.seconds(c, s)) for c, s in points])
    assert without.kv_share == 0.0
