"""search(): an Optuna study that measures partitions, survives being killed and repeats nothing."""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence, Set

import msgspec
import optuna
from optuna.trial import TrialState

from kvr_partition.errors import RankError, StorageError
from kvr_partition.machine.machine import Machine
from kvr_partition.measurement import Measurement
from kvr_partition.partition import Partition
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.decision import FINALISTS, decided
from kvr_partition.search.informed import PartitionSampler
from kvr_partition.search.leases import ASKING_S, age_s, is_alive, this_process
from kvr_partition.search.result import SearchResult, Trial
from kvr_partition.search.samplers import WITHOUT_MACHINE, Start, check_sampler, make_sampler
from kvr_partition.search.space import Seed, Space, default_quantum, distinct
from kvr_partition.search.storage import open_storage
from kvr_partition.search.storage_errors import storage_errors

Measure = Callable[[Partition], Measurement]

MAX_REPEATS = 25
"""Suggestions in a row that only repeat measured partitions before the neighbourhood counts as exhausted."""

POLL_S = 0.2
"""Seconds between looks at what others are measuring."""


EXPLORE_AFTER = 5
"""Such suggestions in a row before the next ones are drawn at random."""

WIDE = math.log(10)
"""Log ratio of chunk sizes that samplers of whole partitions may reach from the seeds."""

MAX_FAILURES_AT_FIRST, MAX_FAILURES = 3, 8
"""Failures in a row, before and after anything was timed, when more is wrong than the partition."""


def search(
    measure: Measure,
    context: int,
    ranks: int,
    budget: int,
    *,
    seeds: Callable[[], Sequence[Seed]] | None = None,
    sampler: str | None = None,
    machine: Machine | None = None,
    quantum: int | None = None,
    past: int = 0,
    storage: str | optuna.storages.BaseStorage | None = None,
    shared: bool = False,
    study_name: str | None = None,
    conditions: Mapping[str, object] | None = None,
    seed: int = 0,
    confirm: Callable[[Sequence[Partition]], Sequence[Measurement]] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    enough: Callable[[Sequence[Measurement]], bool] | None = None,
) -> SearchResult:
    """Find the partition of a context with the shortest time to first token.

    The study first measures the seeds, then what the sampler proposes around them. A study with the same
    name in the same storage goes on where it stopped, however it stopped: seeds and search space are the
    ones it began with, finished trials are kept, and a trial that was under way is measured again, or not
    even that if ``measure`` still knows its result.

    Args:
        measure: times one partition.
        context: tokens of the prompt.
        ranks: chunks of every partition, at least 2.
        budget: how many different partitions to measure, seeds included.
        seeds: called for a new study only: the first partitions to measure, best informed last. The even
            split is among them, unless the sampler corrects a machine and so begins at what that solves to.
        sampler: one of `SAMPLERS`; ``"informed"`` if there is a machine, else ``"gp"``, when None.
        machine: what a prefill costs, as far as it is known; for the informed sampler.
        quantum: boundaries are multiples of this many tokens; a 128th of the average chunk when None.
        past: tokens that every rank has in its cache before the prompt.
        storage: Optuna storage, or its URL as in `open_storage`; in memory when None.
        shared: whether others may be working on the study. Then nobody measures what another is measuring,
            and what a dead process was measuring goes back into the queue.
        study_name: name of the study in the storage.
        conditions: what measurements depend on; a study that began under others is refused.
        seed: of the sampler.
        confirm: times several partitions side by side. Called at the end with the three best ones and the
            even split, since medians of separate runs on a drifting machine do not compare; see `decided`.
        on_trial: told of each trial as it finishes.
        enough: asked before each trial whether what was measured forbids going on.

    Raises:
        RankError: measuring failed several times in a row.
        StorageError: the storage is damaged, full or of another search.
        UnsupportedError: an unknown sampler, or one that needs a machine without one.
    """
    sampler = sampler or (WITHOUT_MACHINE if machine is None else "informed")
    if isinstance(storage, str):
        with storage_errors():
            storage = open_storage(storage)
    name = study_name or f"{ranks}-ranks-{context}" + (f"-past-{past}" if past else "")
    machine = None if machine is None else machine.behind(past)
    with storage_errors():
        study = _Study(
            storage,
            name,
            context,
            ranks,
            past,
            quantum or default_quantum(context, ranks),
            seeds,
            sampler,
            machine,
            seed,
            shared,
            conditions,
        )
        stopped = study.run(measure, budget, on_trial, enough)
        beliefs = study.beliefs()
        return _conclude(study.trials(), study.ranked(beliefs), beliefs, study.space, confirm, stopped)


class _Study:
    """The Optuna study and what we keep in it."""

    def __init__(
        self,
        storage: optuna.storages.BaseStorage | None,
        name: str,
        context: int,
        ranks: int,
        past: int,
        quantum: int,
        seeds: Callable[[], Sequence[Seed]] | None,
        sampler: str,
        machine: Machine | None,
        seed: int,
        shared: bool,
        conditions: Mapping[str, object] | None,
    ) -> None:
        self._shared = shared
        self._sampler = sampler
        self._machine = machine
        self._seed = seed
        storage = optuna.storages.get_storage(storage)
        begun = None
        with contextlib.suppress(KeyError):
            self._study = optuna.load_study(study_name=name, storage=storage)
            begun = self._study.user_attrs.get("begun")
        if begun is None:
            even = Seed("even", Partition.even(context, ranks, past=past))
            given = [*(() if machine is not None and check_sampler(sampler).corrects else (even,))]
            given += seeds() if seeds is not None else ()
            begun = self._begin(storage, name, distinct(given), [even, *given], quantum, conditions)
        found = json.loads(begun)
        begun_past = found.get("past", 0)
        if (found["context"], found["ranks"], begun_past) != (context, ranks, past):
            raise StorageError(
                f"study {name!r} in this storage is for context {found['context']} with past {begun_past} on "
                f"{found['ranks']} ranks; use another storage or study name"
            )
        _check_conditions(name, conditions, found.get("conditions"))
        self.seeds = [Seed(one["name"], Partition(one["sizes"], past)) for one in found["seeds"]]
        ranges = tuple((low, high) for low, high in found["ranges"])
        self.space = Space(context, found["quantum"], ranges, past)

    def _begin(
        self,
        storage: optuna.storages.BaseStorage,
        name: str,
        seeds: Sequence[Seed],
        around: Sequence[Seed],
        quantum: int,
        conditions: Mapping[str, object] | None,
    ) -> str:
        """Write down what everybody on this study agrees on, unless another was first; returns what holds.

        In one step, so that a kill leaves all or nothing. Of several that begin at once, each with seeds of
        its own, the one that creates the study decides.
        """
        try:
            self._study = optuna.create_study(storage=storage, study_name=name)
        except optuna.exceptions.DuplicatedStudyError:
            self._study = optuna.load_study(study_name=name, storage=storage)
            # Whoever created it writes the next moment, or was killed before.
            until = time.monotonic() + (ASKING_S if self._shared else 0.0)
            while (begun := self._study.user_attrs.get("begun")) is None and time.monotonic() < until:
                time.sleep(POLL_S)
            if begun is not None:
                return str(begun)
        # Samplers of whole partitions go where they like; for others a wide space is a slow one.
        reach = WIDE if check_sampler(self._sampler).whole else 0.0
        space = Space.around(around, quantum, reach)
        begun = json.dumps(
            {
                "conditions": conditions,
                "context": space.context,
                "ranks": len(space.ranges) + 1,
                "past": space.past,
                "quantum": space.quantum,
                "ranges": space.ranges,
                "seeds": [{"name": seed.name, "sizes": seed.partition.sizes} for seed in seeds],
            }
        )
        self._study.set_user_attr("begun", begun)
        return begun

    def run(
        self,
        measure: Measure,
        budget: int,
        on_trial: Callable[[Trial], None] | None,
        enough: Callable[[Sequence[Measurement]], bool] | None = None,
    ) -> str:
        """Measure until the budget is spent; returns what ended it."""
        repeats = failures = 0
        while True:
            self._end_interrupted()
            known, running = self._look()
            if len(known) >= budget:
                return "budget"
            if enough is not None and enough([one.measurement for one in known.values()]):
                return "enough"
            if len(known) + len(running) >= budget:
                # Others are measuring the last ones; if they fail, there is a place again.
                time.sleep(POLL_S)
                continue
            given = self._given({*known, *(sizes for _, sizes in running)})
            trial, partition = self._ask(given, explore=repeats >= EXPLORE_AFTER)
            if partition is None:
                self._end(trial)
                if self._look()[1]:
                    time.sleep(POLL_S)  # what others are measuring may yet show something
                    continue
                return "converged" if check_sampler(self._sampler).corrects else "exhausted"
            before = known.get(partition.sizes)
            if before is not None:
                # Nothing to measure: the sampler learns the known time, and the budget is not touched.
                repeats += 1
                self._tell(trial, before.measurement)
                if repeats >= MAX_REPEATS:
                    return "exhausted"
                continue
            trial.set_user_attr("owner", this_process())
            trial.set_user_attr("sizes", partition.sizes)
            while self._undecided_before(trial.number):
                time.sleep(POLL_S / 10)
            known, running = self._look()
            earlier = [sizes for number, sizes in running if number < trial.number]
            if partition.sizes in {*known, *earlier} or len(known) + len(earlier) >= budget:
                # Several asked at the same moment; the earlier trials measure.
                trial.set_user_attr("given_up", True)
                self._end(trial)
                time.sleep(POLL_S)
                continue
            repeats = 0
            measurement = measure(partition)
            self._keep(trial, measurement)
            if on_trial is not None:
                on_trial(Trial(trial.user_attrs.get("source") or self._sampler, measurement))
            failures = 0 if measurement.ok else failures + 1
            self._check_failures(failures, measurement)

    def _check_failures(self, failures: int, last: Measurement) -> None:
        """Give up after so many failures in a row.

        Raises:
            RankError: more is wrong than the partition.
        """
        timed = any(trial.measurement.ok for trial in self._look()[0].values())
        if failures >= (MAX_FAILURES if timed else MAX_FAILURES_AT_FIRST):
            assert last.failure is not None
            raise RankError(
                f"measuring failed {failures} times in a row, last: {last.failure.message}",
                kind=last.failure.kind,
                traceback=last.failure.traceback,
            )

    def trials(self) -> list[Trial]:
        """All measured partitions, in order."""
        return list(self._look()[0].values())

    def beliefs(self) -> Beliefs | None:
        """What all measurements say, where a cost model says what to make of them."""
        if not check_sampler(self._sampler).corrects or self._machine is None:
            return None
        return Beliefs.after(self._machine, self.space.context, self._timed())

    def ranked(self, beliefs: Beliefs | None) -> list[Measurement]:
        """What was timed, the most promising first."""
        return beliefs.ranked() if beliefs is not None else sorted(self._timed(), key=lambda one: one.ttft_s)

    def _timed(self) -> list[Measurement]:
        return [trial.measurement for trial in self.trials() if trial.measurement.ok]

    def _end_interrupted(self) -> None:
        """End trials that a kill left running; those of others that still run are theirs."""
        for left in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._shared and is_alive(left):
                continue
            kept = left.user_attrs.get("measurement")
            if kept is None:
                self._end(left.number)
            else:
                self._tell(left.number, msgspec.json.decode(kept, type=Measurement))

    def _given(self, taken: Set[tuple[int, ...]]) -> Seed | None:
        """What is to be measured before the sampler is asked: seeds, then what was never finished.

        Read from the finished trials rather than put into Optuna's queue. Two processes can take the same
        trial out of that queue where the database is SQLite, which has no lock for a row; two trials for
        one partition are told apart by their numbers.
        """
        finished = self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        left = [
            Seed(attrs.get("source", self._sampler), Partition(attrs["sizes"], self.space.past))
            for attrs in (trial.user_attrs for trial in finished)
            if "sizes" in attrs and not {"measurement", "given_up"} & attrs.keys()
        ]
        return next((seed for seed in (*self.seeds, *left) if seed.partition.sizes not in taken), None)

    def _ask(self, given: Seed | None, explore: bool) -> tuple[optuna.Trial, Partition | None]:
        """The next trial, and its partition if there is one worth measuring."""
        count = len(self._study.get_trials(deepcopy=False))
        # A resumed search must not draw the same numbers again, so the count is part of the seed.
        seed = self._seed + 7919 * count
        # One that goes by all measurements draws by their count, so that a killed search ends as any other.
        own = self._seed if check_sampler(self._sampler).corrects and not self._shared else seed
        # A model of few points in a small space can ask for the same known one again and again.
        sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if explore or given is not None
            else make_sampler(self._sampler, Start(own, len(self.seeds), self.space, self._machine))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = (
                sampler
                if given is None
                else optuna.samplers.PartialFixedSampler(self.space.params(given.partition), sampler)
            )
            trial = self._study.ask()
            ranges = zip(self.space.names(), self.space.ranges, strict=True)
            params = {name: trial.suggest_float(name, low, high) for name, (low, high) in ranges}
        if "fixed_params" in self._study.get_trials(deepcopy=False)[trial.number].system_attrs:
            # Queued by somebody with Optuna's own means.
            return trial, self.space.partition(params)
        if given is not None:
            # Measured as it is, not as its rounded image.
            trial.set_user_attr("source", given.name)
            return trial, given.partition
        if isinstance(sampler, PartitionSampler):
            return trial, sampler.proposals.get(trial.number)
        return trial, self.space.partition(params)

    def _keep(self, trial: optuna.Trial, measurement: Measurement) -> None:
        """Keep a measurement with its trial: the study alone then tells everything about its partitions."""
        kept = msgspec.json.encode(measurement).decode()
        try:
            trial.set_user_attr("measurement", kept)
        except optuna.exceptions.UpdateFinishedTrialError:
            # Another took this process for dead, as after an hour on another host. What it then measured
            # itself comes first; else this is kept, in a trial of its own.
            if measurement.sizes not in self._look()[0]:
                self._study.add_trial(
                    optuna.trial.create_trial(
                        state=TrialState.COMPLETE if measurement.ok else TrialState.FAIL,
                        value=measurement.ttft_s if measurement.ok else None,
                        params=trial.params,
                        distributions=trial.distributions,
                        user_attrs={**trial.user_attrs, "measurement": kept},
                    )
                )
        else:
            self._tell(trial, measurement)

    def _tell(self, trial: optuna.Trial | int, measurement: Measurement) -> None:
        if measurement.ok:
            self._end(trial, TrialState.COMPLETE, measurement.ttft_s)
        else:
            self._end(trial)

    def _end(
        self, trial: optuna.Trial | int, state: TrialState = TrialState.FAIL, value: float | None = None
    ) -> None:
        # Whoever takes a process for dead ends its trial, and two may do so at once.
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._study.tell(trial, value, state, skip_if_finished=True)

    def _undecided_before(self, number: int) -> bool:
        """Whether an earlier trial is asked for that has not said yet what it measures: it may be the same."""
        return self._shared and any(
            trial.number < number and "sizes" not in trial.user_attrs and age_s(trial) < ASKING_S
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        )

    def _look(self) -> tuple[dict[tuple[int, ...], Trial], list[tuple[int, tuple[int, ...]]]]:
        """What is measured, by sizes, and number and sizes of each trial that is being measured; at one moment."""
        known: dict[tuple[int, ...], Trial] = {}
        running = []
        for trial in self._study.get_trials(deepcopy=False):
            # A measurement is there from just before the trial ends: also for one killed in between.
            if "measurement" in trial.user_attrs:
                measurement = msgspec.json.decode(trial.user_attrs["measurement"], type=Measurement)
                source = trial.user_attrs.get("source") or self._sampler
                known.setdefault(measurement.sizes, Trial(source, measurement))
            elif trial.state == TrialState.RUNNING and "sizes" in trial.user_attrs:
                running.append((trial.number, tuple(trial.user_attrs["sizes"])))
        return known, running


def _check_conditions(name: str, now: Mapping[str, object] | None, then: Mapping[str, object] | None) -> None:
    if now is None or then is None:
        return
    present = json.loads(json.dumps(now))
    for field in dict.fromkeys([*present, *then]):
        if then.get(field) != present.get(field):
            raise StorageError(
                f"study {name!r} in this storage was begun with another {field}: {then.get(field)}, not "
                f"{present.get(field)}; use another storage or study name"
            )


def _conclude(
    trials: Sequence[Trial],
    ranked: Sequence[Measurement],
    beliefs: Beliefs | None,
    space: Space,
    confirm: Callable[[Sequence[Partition]], Sequence[Measurement]] | None,
    stopped: str,
) -> SearchResult:
    context, ranks = space.context, len(space.ranges) + 1
    if not ranked:
        raise RankError(f"no partition of context {context} on {ranks} ranks could be measured")
    if confirm is None:
        return SearchResult(ranked[0].partition, ranked[0], tuple(trials), (), stopped, space.quantum)
    finalists = [measurement.partition for measurement in ranked[:FINALISTS]]
    even = Partition.even(context, ranks, past=space.past)
    confirmed = tuple(confirm(finalists if even in finalists else [even, *finalists]))
    timed = [measurement for measurement in confirmed if measurement.ok]
    if not timed:
        raise RankError(f"none of the best partitions of context {context} could be measured again")
    best = decided(timed, beliefs)
    return SearchResult(best.partition, best, tuple(trials), confirmed, stopped, space.quantum)
