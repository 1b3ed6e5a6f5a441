"""Studies that several processes share, and the storages they are in."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from kvr_partition.errors import StorageError, UnsupportedError
from kvr_partition.measurement import Measurement
from kvr_partition.partition import Partition
from kvr_partition.search import SearchResult, search
from kvr_partition.search.space import Seed, Space
from kvr_partition.search.storage import open_storage
from tests.landscapes import FITTED
from tests.studies import CONTEXT, RANKS, Recorder, seeds
from tests.unit.servers import optuna_proxy, postgresql

WORKER = """
import sys, time
from tests.unit.servers import optuna_proxy, postgresql
from tests.landscapes import FITTED
from kvr_partition.search import search
from tests.studies import CONTEXT, RANKS, Recorder
recorder = Recorder()
def measure(partition):
    print(partition, flush=True)
    time.sleep(float(sys.argv[2]))
    return recorder(partition)
found = search(measure, CONTEXT, RANKS, int(sys.argv[3]), sampler=sys.argv[5], machine=FITTED,
               storage=sys.argv[1], shared=sys.argv[5] == "tpe", seed=int(sys.argv[4]))
print("found", len(found.trials), found.best, flush=True)
"""


def worker(url: str, seconds: float, budget: int, seed: int, sampler: str = "tpe") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, url, str(seconds), str(budget), str(seed), sampler]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> tuple[list[str], list[str]]:
    """What a worker measured, and its last line."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    *measured, last = out.splitlines()
    return measured, last.split()


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A storage of each kind that several processes can share."""
    match request.param:
        case "postgresql":
            with postgresql() as server:
                yield server
        case "grpc":
            pytest.importorskip("grpc")
            with optuna_proxy(f"sqlite:///{tmp_path / 'behind.db'}") as server:
                yield server
        case kind:
            yield f"{kind}{tmp_path / 'study'}"


@pytest.mark.parametrize("url", ["sqlite:///", "journal:", "postgresql", "grpc"], indirect=True)
def test_two_processes_on_one_study_lose_nothing_and_repeat_nothing(url: str) -> None:
    # The tables of a database that is just being made are nobody's to use.
    open_storage(url)
    both = [worker(url, 0.1, 16, seed) for seed in (1, 2)]
    (first, end), (second, other_end) = (outcome(one) for one in both)
    assert len(first) + len(second) == len({*first, *second}) == 16
    assert first
    assert second
    # Whoever ends last has seen everything.
    assert "16" in (end[1], other_end[1])


class _Slow(optuna.storages.InMemoryStorage):
    """Two searches begin at the very same moment, and the first trial is slow to say what it measures.

    As with SQLite, each of two that take a trial from Optuna's queue at once is told that it has it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.both = threading.Barrier(2)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.both.wait(10)
            self.both.abort()
        return super().create_new_trial(study_id, template_trial)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        found = super().get_all_trials(study_id, deepcopy, states)
        if states == (TrialState.WAITING,):
            time.sleep(0.3)  # so that both have seen the same queue
        return found

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        return super().set_trial_state_values(trial_id, state, values) or state == TrialState.RUNNING

    def set_trial_user_attr(self, trial_id: int, key: str, value: object) -> None:
        if key == "sizes" and self.get_trial(trial_id).number == 0:
            time.sleep(0.3)
        super().set_trial_user_attr(trial_id, key, value)


def test_what_an_earlier_trial_has_not_yet_said_is_waited_for() -> None:
    storage = _Slow()
    optuna.create_study(storage=storage, study_name="s")
    measured: list[tuple[int, ...]] = []

    def measure(partition: Partition) -> Measurement:
        measured.append(partition.sizes)
        time.sleep(0.6)
        return Recorder()(partition)

    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(
                search, measure, CONTEXT, RANKS, 3, sampler="tpe", machine=FITTED, storage=storage, shared=True,
                study_name="s", seed=seed,
            )
            for seed in (1, 2)
        ]  # fmt: skip
        for one in both:
            one.result(60)
    # Both began with the even split; one of them measured it.
    assert sum(trial.user_attrs.get("source") == "even" for trial in storage.get_all_trials(0)) == 2
    assert len(measured) == len(set(measured)) == 3


def test_searches_that_begin_at_once_agree_on_seeds_and_space(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    open_storage(url)
    both = threading.Barrier(2)

    def begin(first: int) -> SearchResult:
        def seeds() -> list[Seed]:
            both.wait(30)
            return [Seed("own", Partition((first, 2500 - first, CONTEXT - 2500)))]

        return search(
            Recorder(), CONTEXT, RANKS, 6, seeds=seeds, sampler="gp", storage=url, shared=True, study_name="s"
        )

    with ThreadPoolExecutor(2) as pool:
        for one in [pool.submit(begin, first) for first in (1000, 1800)]:
            one.result(60)
    trials = optuna.load_study(study_name="s", storage=url).trials
    own = {tuple(one.user_attrs["sizes"]) for one in trials if one.user_attrs.get("source") == "own"}
    assert len(own) == 1
    assert len({json.dumps(one.distributions, default=repr) for one in trials}) == 1


def test_a_study_whose_creator_was_killed_is_begun_by_the_next() -> None:
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="s")
    found = search(Recorder(), CONTEXT, RANKS, 2, seeds=seeds, storage=storage, study_name="s")
    assert [one.source for one in found.trials] == ["even", "interpolated"]


def test_what_is_measured_after_others_gave_it_up_is_kept() -> None:
    storage = optuna.storages.InMemoryStorage()
    recorder = Recorder()

    def measure(partition: Partition) -> Measurement:
        # As another process does that sees no sign of this one.
        study = optuna.load_study(study_name="s", storage=storage)
        (running,) = study.get_trials(states=(TrialState.RUNNING,))
        study.tell(running.number, state=TrialState.FAIL)
        return recorder(partition)

    found = search(measure, CONTEXT, RANKS, 3, sampler="tpe", storage=storage, shared=True, study_name="s")
    assert [one.partition.sizes for one in found.trials] == recorder.asked
    assert len(set(recorder.asked)) == 3
    assert found.trials[0].source == "even"


def test_one_killed_after_measuring_is_no_failure() -> None:
    storage = optuna.storages.InMemoryStorage()

    def go_on(budget: int) -> None:
        search(Recorder(), CONTEXT, RANKS, budget, sampler="tpe", storage=storage, study_name="s")

    go_on(1)
    study = optuna.load_study(study_name="s", storage=storage)
    killed = study.ask()
    partition = Partition([2048, 1024, 1024])
    measured = Recorder()(partition)
    killed.set_user_attr("sizes", partition.sizes)
    killed.set_user_attr("measurement", msgspec.json.encode(measured).decode())
    go_on(2)
    assert len(study.trials) == 2
    assert study.trials[1].value == measured.ttft_s


def test_partitions_outside_the_box_are_told_to_samplers_as_its_edge() -> None:
    space = Space(CONTEXT, 1, ((-0.5, 0.5), (-0.5, 0.5)))
    assert space.params(Partition((3000, 96, 1000))) == {"log_ratio_0": 0.5, "log_ratio_1": -0.5}


def test_what_somebody_queued_is_measured() -> None:
    storage = optuna.storages.InMemoryStorage()
    wanted = Partition([2048, 1024, 1024])

    def go_on(budget: int) -> list[Partition]:
        found = search(Recorder(), CONTEXT, RANKS, budget, machine=FITTED, storage=storage, study_name="s")
        return [one.partition for one in found.trials]

    go_on(1)
    optuna.load_study(study_name="s", storage=storage).enqueue_trial(
        {"log_ratio_0": math.log(2), "log_ratio_1": 0.0}
    )
    assert go_on(2)[1] == wanted


def test_what_a_killed_process_was_measuring_is_measured_by_another(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    victim = worker(url, 60.0, 6, 1)
    assert victim.stdout is not None
    interrupted = victim.stdout.readline().strip()
    survivor = worker(url, 0.05, 6, 2)
    time.sleep(1.0)
    victim.kill()
    victim.communicate()
    measured, end = outcome(survivor)
    assert interrupted in measured
    assert len(set(measured)) == len(measured) == 6
    assert end[1] == "6"


@pytest.mark.parametrize(("age_s", "state"), [(60, TrialState.RUNNING), (7200, TrialState.FAIL)])
def test_another_hosts_measurement_is_given_up_after_an_hour(age_s: float, state: TrialState) -> None:
    storage = optuna.storages.InMemoryStorage()

    def go_on(budget: int = 2) -> list[tuple[int, ...]]:
        found = search(
            Recorder(), CONTEXT, RANKS, budget, sampler="tpe", storage=storage, shared=True, study_name="s"
        )
        return [one.partition.sizes for one in found.trials]

    go_on()
    study = optuna.load_study(study_name="s", storage=storage)
    trial = study.ask()
    trial.set_user_attr("sizes", [2000, 1048, 1048])
    trial.set_user_attr("owner", f"elsewhere/1/1/{time.time() - age_s:.0f}")
    go_on()
    assert study.get_trials()[trial.number].state == state
    if state == TrialState.FAIL:
        # What nobody measures any more comes next.
        assert go_on(3)[-1] == (2000, 1048, 1048)


def test_a_study_of_other_conditions_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    search(Recorder(), CONTEXT, RANKS, 2, storage=url, conditions={"device": "one", "ranks": 3})
    search(Recorder(), CONTEXT, RANKS, 2, storage=url, conditions={"device": "one", "ranks": 3})
    with pytest.raises(StorageError, match="another device: one, not two"):
        search(Recorder(), CONTEXT, RANKS, 3, storage=url, conditions={"device": "two", "ranks": 3})


def test_a_journal_with_a_torn_tail_is_repaired_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    search(Recorder(), CONTEXT, RANKS, 4, seeds=seeds, storage=f"journal:{file}", sampler="tpe")
    lines = file.read_bytes()
    file.write_bytes(lines + b'{"op_code": 5, "worker')
    found = search(Recorder(), CONTEXT, RANKS, 6, storage=f"journal:{file}", sampler="tpe")
    assert len(found.trials) == 6
    assert (tmp_path / "study.journal.torn").read_bytes() == b'{"op_code": 5, "worker\n'
    for line in file.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "is no storage; write sqlite"),
        ("journal:", "a journal is written journal:FILE"),
        ("grpc://nowhere", "written grpc://host:port"),
        ("oracledb9://x/y", "needs a database driver"),
    ],
)
def test_a_bad_url_is_told(url: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_storage(url)


def test_a_database_that_another_locks_for_long_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    open_storage(f"sqlite:///{file}")
    other = sqlite3.connect(file, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(6.0, other.rollback)
    release.start()
    found = search(Recorder(), CONTEXT, RANKS, 2, storage=f"sqlite:///{file}")
    assert len(found.trials) == 2
    release.join()
    other.close()


def test_an_unwritable_journal_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be used"):
        search(Recorder(), CONTEXT, RANKS, 2, storage=f"journal:{tmp_path / 'missing' / 'study'}")


def test_killed_at_random_moments_nothing_is_lost_and_the_end_is_the_same(tmp_path: Path) -> None:
    undisturbed = search(Recorder(), CONTEXT, RANKS, 8, machine=FITTED, seed=3)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    finished: set[str] = set()
    for kill in range(10):
        process = worker(url, 0.05, 8, 3, "informed")
        assert process.stdout is not None
        # Each time a little later, from before the first measurement to far into the search.
        for _ in range(kill // 3):
            process.stdout.readline()
        time.sleep(0.01 * (kill * 7 % 5))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        study_url = open_storage(url)
        studies = optuna.get_all_study_names(study_url)
        if studies:
            trials = optuna.load_study(study_name=studies[0], storage=study_url).get_trials(deepcopy=False)
            now = {
                str(tuple(one.user_attrs["sizes"]))
                for one in trials
                if one.state == optuna.trial.TrialState.COMPLETE and "sizes" in one.user_attrs
            }
            assert finished <= now
            finished = now
    _, end = outcome(worker(url, 0.0, 8, 3, "informed"))
    assert end[1:] == [str(len(undisturbed.trials)), str(undisturbed.best)]
