from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvr_partition.errors import FileFormatError, RankError, StorageError
from kvr_partition.measurement import RankTimes, Sample
from kvr_partition.partition import Partition
from profiler.measure import Candidate, SamplingPlan, measure_interleaved
from profiler.store import ChunkLine, MeasurementLog, SampleLine


def sample(ttft_s: float) -> Sample:
    return Sample(ttft_s, (RankTimes(ttft_s, 0.0, 0.0),), 0)


A, B = Candidate("kvr", Partition((3, 2))), Candidate("tsp", Partition((3, 2)))


def measured(log: MeasurementLog, purpose: str, times: list[float]) -> None:
    series = iter(times)
    measure_interleaved([A], lambda _: sample(next(series)), SamplingPlan(1, 6, 6), log=log, purpose=purpose)


def test_what_was_measured_is_there_again(tmp_path: Path) -> None:
    with MeasurementLog(tmp_path / "log") as log:
        measured(log, "search", [9.0, 1, 2, 3, 4, 5, 6])
        log.append(ChunkLine("", 8, 0, False, (0.5, 0.25)))
    with MeasurementLog(tmp_path / "log") as log:
        found = log.finished("search", "kvr", Partition((3, 2)))
        assert found is not None
        assert [one.ttft_s for one in found.samples] == [1, 2, 3, 4, 5, 6]
        assert log.finished("compare", "kvr", Partition((3, 2))) is None
        assert [line.seconds for line in log.chunks] == [(0.5, 0.25)]


def test_candidates_take_turns_and_all_samples_are_kept(tmp_path: Path) -> None:
    order: list[str] = []

    def take(candidate: Candidate) -> Sample:
        order.append(candidate.method)
        return sample(1.0)

    with MeasurementLog(tmp_path / "log") as log:
        measure_interleaved([A, B], take, SamplingPlan(warmup=1, least=6, most=9), log=log)
    # Back and forth: drift within a turn favours neither.
    assert order == ["kvr", "tsp", "tsp", "kvr"] * 3 + ["kvr", "tsp"]
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum('"type":"sample"' in line for line in lines) == 14
    assert sum('"warmup":true' in line for line in lines) == 2


def test_a_candidate_given_twice_is_timed_once() -> None:
    times = iter(range(1, 100))
    plan = SamplingPlan(warmup=0, least=6, most=6)
    first, other, again = measure_interleaved([A, B, A], lambda _: sample(float(next(times))), plan)
    assert first == again != other
    assert next(times) == 13


def test_sampling_ends_when_sure_and_otherwise_at_the_cap() -> None:
    plan = SamplingPlan(warmup=0, least=6, most=12, tolerance=0.05)
    steady = measure_interleaved([A], lambda _: sample(1.0), plan)[0]
    assert (len(steady.samples), steady.stopped) == (6, "precise")
    wild = iter(range(1, 100))
    capped = measure_interleaved([A], lambda _: sample(float(next(wild))), plan)[0]
    assert (len(capped.samples), capped.stopped) == (12, "cap")
    # One candidate still unsure: the sure one goes on too, so that both see the same drift.
    wild = iter(range(1, 100))
    both = measure_interleaved([A, B], lambda one: sample(1.0 if one == A else float(next(wild))), plan)
    assert [len(one.samples) for one in both] == [12, 12]


def test_a_failed_candidate_is_a_result_and_the_others_go_on(tmp_path: Path) -> None:
    def take(candidate: Candidate) -> Sample:
        if candidate == A:
            raise RankError("rank 1 ran out of memory", rank=1, kind="out-of-memory", traceback="where")
        return sample(1.0)

    with MeasurementLog(tmp_path / "log") as log:
        failed, fine = measure_interleaved([A, B], take, SamplingPlan(), log=log)
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.traceback, failed.stopped) == ("out-of-memory", "where", "failed")
    assert fine.ok
    with MeasurementLog(tmp_path / "log") as log:
        again = log.finished("measure", "kvr", Partition((3, 2)))
    assert again is not None
    assert again.failure == failed.failure


def test_a_torn_last_line_is_set_aside_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with MeasurementLog(path) as log:
        measured(log, "search", [1.0] * 7)
        log.append(SampleLine("", "search", "kvr", (4, 1), False, sample(3.0)))
    content = path.read_bytes()
    for cut in (1, 5, 60):
        path.write_bytes(content[:-cut])
        with MeasurementLog(path) as log:
            assert log.repaired
            assert log.finished("search", "kvr", Partition((3, 2))) is not None
            log.append(SampleLine("", "search", "kvr", (4, 1), False, sample(3.0)))
        with MeasurementLog(path) as log:
            assert not log.repaired
    assert (tmp_path / "log.torn").read_bytes().count(b"\n") == 3


def test_other_damage_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with MeasurementLog(path) as log:
        measured(log, "search", [1.0] * 7)
    lines = path.read_text().splitlines(keepends=True)
    for damage in ("{}\n", "nonsense\n", lines[2][: len(lines[2]) // 2] + "\n", '{"type":"sample","x":1}\n'):
        path.write_text("".join([*lines[:2], damage, *lines[3:]]))
        with pytest.raises(FileFormatError, match="line 3 is not a measurement"):
            MeasurementLog(path)
    path.write_text('{"type":"run","schema":"kvr-partition/measurements/7","run":"x"}\n')
    with pytest.raises(FileFormatError):
        MeasurementLog(path)


FULL_DISK = """
import resource, signal, sys
from profiler.store import MeasurementLog, SampleLine
from kvr_partition.measurement import RankTimes, Sample
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MeasurementLog(sys.argv[1])
size = log.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, size + 50))
log.append(SampleLine("", "search", "kvr", (4, 1), False, Sample(1.0, (RankTimes(1.0, 0.0, 0.0),), 0)))
"""


def test_a_write_that_does_not_fit_leaves_no_part_behind(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with MeasurementLog(path) as log:
        measured(log, "search", [1.0] * 7)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False
    )
    assert "StorageError" in done.stderr
    assert "run the same command again" in done.stderr
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    log = MeasurementLog(tmp_path / "log")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log.fileno())
    os.close(full)
    with pytest.raises(StorageError, match="No space left on device"):
        log.append(ChunkLine("", 8, 0, False, (0.5,)))
