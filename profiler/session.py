"""The main job as a library call: what a machine costs, a search for each context, the best ones side by side.

Profile, chunk sizes, search, a run beside the baselines, a table: what ``kvr-partition search`` does, without
its folder and its words on a terminal. Whatever was measured is in the log before anything else happens with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from kvr_partition.errors import OutOfRangeError, RankError, UnsupportedError
from kvr_partition.link_kinds import bandwidth_of
from kvr_partition.machine.cost import FitError
from kvr_partition.machine.findings import Finding, contradict, findings, worst
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.profile import Profile
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Measurement, Sample
from kvr_partition.methods import METHODS
from kvr_partition.partition import Partition
from kvr_partition.search import SearchResult, Seed, Trial, search
from kvr_partition.search.samplers import WITHOUT_MACHINE, check_sampler
from kvr_partition.search.space import default_quantum
from kvr_partition.table import Entry, PartitionTable
from kvr_partition.training import Row, measured_row
from profiler.calibrate import guessed_machine, keep_samples, machine_of_log, measured_machine, time_links
from profiler.listener import Listener, Silent
from profiler.measure import Candidate, SamplingPlan
from profiler.ranks import RankGroup
from profiler.sizes import profile_chunk_sizes
from profiler.store import GUESS, MeasurementLog, purpose_of

BUDGET, LEAST_BUDGET, BUDGET_S = 8, 4, 30.0
"""Partitions that a search measures where nobody says how many: so many, but of those that take long no more than
fit into so many seconds, and at least a few."""

TRIAL_PATIENCE = 0.3
"""Of the time that is spent on a candidate side by side, for one that the search tries."""


@dataclass(frozen=True)
class ContextResult:
    """What was found for one context.

    Attributes:
        context: tokens of the prompt.
        found: by the search; None of a context that was held out.
        named: its methods side by side, by the names they are shown under.
        findings: what measurements show that their schedules do not.
    """

    context: int
    found: SearchResult | None
    named: list[tuple[str, Measurement]]
    findings: Sequence[Finding] = ()

    @property
    def held_out(self) -> bool:
        """Whether it was predicted and not searched."""
        return self.found is None

    @property
    def measured(self) -> int:
        """Partitions that were measured to find the best."""
        return 0 if self.found is None else len(self.found.trials)

    @property
    def stopped(self) -> str:
        """As in `SearchResult`."""
        return "" if self.found is None else self.found.stopped


@dataclass
class Session:
    """Searches of several contexts on the ranks of a group.

    Args:
        group: the ranks; its log is set to ``log``.
        log: where every sample goes at once, and where what it has already is taken from.
        contexts: to search, in tokens, in ascending order.
        past: tokens that every rank has in its cache before the prompt.
        budget: partitions to measure for each context; `BUDGET` when None, and fewer where one takes seconds.
        sampler: as in `kvr_partition.search.search`.
        quantum: what boundaries are multiples of; by context and device when None.
        plan: when a median is known well enough; by backend when None. While searching, partitions get
            `TRIAL_PATIENCE` of its time each: what they teach adds up, and the best ones are timed again.
        storage: an Optuna storage for the studies; in memory when None.
        shared: whether others search in that storage, too.
        seed: of the samplers.
        profile: what chunks and links of these ranks cost, measured before; measured now when None.
        table: partitions found before; grows with each context.
        on_table: told of the table after each context.
        listener: told how it gets on.

    Raises:
        UnsupportedError: a profile of other ranks, or of shorter contexts.

    Example:
        >>> with MeasurementLog("out/log.jsonl") as log, RankGroup("llama", 4) as group:  # doctest: +SKIP
        ...     session = Session(group, log, [4096, 16384])
        ...     session.run(held_out=[8192])
        ...     session.table.save("out/table.json")
    """

    group: RankGroup
    log: MeasurementLog
    contexts: Sequence[int]
    past: int = 0
    budget: int | None = None
    sampler: str = "informed"
    quantum: int | None = None
    plan: SamplingPlan | None = None
    storage: str | None = None
    shared: bool = False
    seed: int = 0
    profile: Profile | None = None
    table: PartitionTable = field(default_factory=lambda: PartitionTable([]))
    on_table: Callable[[PartitionTable], None] = lambda _: None
    listener: Listener = field(default_factory=Silent)
    costs_known: bool = field(init=False, default=False)
    """Whether the log tells what chunks cost, which a predictor is trained from."""

    _machine: Machine | None = field(init=False, default=None)
    _machine_asked: bool = field(init=False, default=False)
    _reference: Machine | None = field(init=False, default=None)
    """What waits are held against: a machine whose links were timed."""
    _chunks_timed: bool = field(init=False, default=False)
    _said: set[object] = field(init=False, default_factory=set)
    _reached: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.plan = self.plan or SamplingPlan.for_backend(self.group.backend)
        self.group.log = self.log

    # ---------------------------------------------------------------------------------------------- all of it

    def run(self, held_out: Sequence[int] = ()) -> list[ContextResult]:
        """Search every context, then predict and time those held out.

        Returns:
            One result for each, in ascending order, searched ones first.

        Raises:
            PartitionError: a context shorter than there are ranks, or beyond the model's positions.
            UnsupportedError: GPUs have no room for a context.
            RankError: nothing of a context could be measured.
        """
        self._check_profile()
        for context in (*self.contexts, *held_out):
            self.group.check_context(context, self.past)
            self.group.check_memory(context, self.past)
        results = [self.search(context) for context in _ends_first(self.contexts)]
        results += [self.predict(context) for context in held_out]
        return sorted(results, key=lambda result: (result.held_out, result.context))

    def work(self, held_out: Sequence[int] = ()) -> float:
        """What `run` will tell its listener of in all, at most."""
        searched = sum(self._work_of(context, self.budget or BUDGET) for context in self.contexts)
        return searched + sum(self._work_of(context, 0) for context in held_out)

    def _work_of(self, context: int, budget: int) -> float:
        assert self.plan is not None
        side_by_side = 6 if budget else 4
        return context * self.plan.turns * (budget + side_by_side)

    def _finish(self, context: int, budget: int) -> None:
        self._reached += self._work_of(context, budget)
        self.listener.reach(self._reached)

    # -------------------------------------------------------------------------------------------- one context

    def search(self, context: int) -> ContextResult:
        """Search one context, compare the best with the baselines, and put it into the table."""
        self.listener.doing(f"context {context}: searching")
        finals: list[tuple[Candidate, Measurement]] = []

        def confirm(partitions: Sequence[Partition]) -> list[Measurement]:
            self.listener.doing(f"context {context}: the best ones side by side with the baselines")
            candidates = self._baselines(context) + [Candidate("kvr", partition) for partition in partitions]
            measurements = self._measure(candidates, purpose_of("compare", context, self.past))
            finals.extend(zip(candidates, measurements, strict=True))
            return measurements[-len(partitions) :]

        found = self._searched(context, confirm)
        self._keep(context, found)
        self._finish(context, self.budget or BUDGET)
        even = Candidate("kvr", Partition.even(context, self.group.ranks, past=self.past))
        named = [(METHODS[one.method].title, result) for one, result in finals if one.method != "kvr"]
        named += [("KVR-E", result) for one, result in finals if one == even]
        named.append(("KVR-S", found.measurement))
        every = [*(trial.measurement for trial in found.trials), *(result for _, result in finals)]
        return ContextResult(
            context,
            found,
            named,
            worst(finding for measurement in every for finding in self._findings(measurement)),
        )

    def _searched(self, context: int, confirm: Callable[[Sequence[Partition]], list[Measurement]]) -> SearchResult:
        kind, purpose = check_sampler(self.sampler), purpose_of("search", context, self.past)
        machine = self.machine() if kind.seeded else None
        # Without a cost to correct there is nothing to be informed by.
        lost = machine is None and kind.corrects
        return search(
            lambda one: self._measure([Candidate("kvr", one)], purpose, TRIAL_PATIENCE)[0],
            context,
            self.group.ranks,
            self._budget_of(context, machine),
            seeds=lambda: self._seeds(context),
            sampler=WITHOUT_MACHINE if lost else self.sampler,
            machine=machine,
            quantum=self.quantum_of(context),
            past=self.past,
            storage=self.storage,
            shared=self.shared,
            conditions=self._conditions(),
            study_name=f"{self.group.geometry.name}/{self.group.ranks}/{self._label(context)}",
            seed=self.seed,
            confirm=confirm,
            on_trial=lambda trial: self._tell(context, trial),
            enough=lambda measured: self._contradicted(context, measured),
        )

    def _budget_of(self, context: int, machine: Machine | None) -> int:
        if self.budget is not None or machine is None:
            return self.budget or BUDGET
        assert self.plan is not None
        split = best_split(context, self.group.ranks, machine.behind(self.past), self.quantum_of(context))
        each_s = (self.plan.warmup + 1) * simulate(split, machine.behind(self.past)).ttft_s
        return max(LEAST_BUDGET, min(BUDGET, int(BUDGET_S / each_s)))

    def _keep(self, context: int, found: SearchResult) -> None:
        entry = Entry(
            context,
            found.best.sizes,
            past=self.past,
            ttft_s=found.measurement.ttft_s,
            interval_s=found.measurement.interval_s,
            measured=len(found.trials),
            quantum=found.quantum,
        )
        self.table = PartitionTable(
            self.table.with_entry(entry).entries, self.table.provenance or self.group.provenance
        )
        self.on_table(self.table)

    def predict(self, context: int) -> ContextResult:
        """Time the table's answer for a context that was not searched, beside the baselines."""
        self.listener.doing(f"context {context}: trying KVR-P, this context was not searched")
        ranks = self.group.ranks
        candidates = [
            *self._baselines(context),
            Candidate("kvr", Partition.even(context, ranks, past=self.past)),
        ]
        names = [*(METHODS[baseline.method].title for baseline in self._baselines(context)), "KVR-E"]
        try:
            without = self.table.without(context, ranks, self.past)
            candidates.append(Candidate("kvr", without.lookup(context, ranks=ranks, past=self.past).partition))
            names.append("KVR-P")
        except OutOfRangeError as error:
            self.listener.say(f"  no KVR-P for {context}: {error}")
        measurements = self._measure(candidates, purpose_of("predict", context, self.past))
        self._finish(context, 0)
        noticed = worst(finding for result in measurements for finding in self._findings(result))
        return ContextResult(context, None, list(zip(names, measurements, strict=True)), noticed)

    def quantum_of(self, context: int) -> int:
        """What boundaries of a context's chunks are multiples of."""
        return self.quantum or default_quantum(context, self.group.ranks, self.group.tile_rows)

    def _baselines(self, context: int) -> list[Candidate]:
        alone = Candidate.single(context, self.past)
        # Methods that gather KV know no past.
        return [alone] if self.past else [alone, Candidate.tsp(context, self.group.ranks)]

    def _seeds(self, context: int) -> list[Seed]:
        """For samplers that know nothing: what the table interpolates, and what a fitted machine solves to."""
        kind = check_sampler(self.sampler)
        if not kind.seeded or (kind.corrects and self.machine() is not None):
            return []
        seeds, ranks = [], self.group.ranks
        # Until something is searched on both sides of it, there is nothing to interpolate.
        with contextlib.suppress(OutOfRangeError):
            seeds.append(Seed("interpolated", self.table.lookup(context, ranks=ranks, past=self.past).partition))
        machine = self.machine()
        if machine is not None:
            behind = machine.behind(self.past)
            seeds.append(Seed("solved", best_split(context, ranks, behind, quantum=self.quantum_of(context))))
        return seeds

    def _measure(self, candidates: Sequence[Candidate], purpose: str, share: float = 1.0) -> list[Measurement]:
        assert self.plan is not None
        plan = dataclasses.replace(self.plan, patience_s=share * self.plan.patience_s)
        return self.group.measure_many(candidates, plan=plan, purpose=purpose, on_sample=self._sampled)

    def _sampled(self, candidate: Candidate, sample: Sample, warmup: bool) -> None:
        self.listener.advance(candidate.partition.context)

    def _label(self, context: int) -> str:
        """What a context is called in the study."""
        return f"{context}+{self.past}" if self.past else str(context)

    def _conditions(self) -> dict[str, object]:
        """What a shared study must agree on; the model by its digest, which is short."""
        conditions = self.group.provenance.conditions()
        if conditions["layers"] == "stock":
            # So studies that know of no others say it.
            del conditions["layers"]
        return {**conditions, "model": self.group.geometry.config_digest}

    # ------------------------------------------------------------------------------------- what the ranks cost

    def machine(self) -> Machine | None:
        """What chunks and links cost here, found out once for all contexts; None if nothing tells.

        From the profile, where there is one, else from timed chunks, else from a guess; with what single chunk
        sizes take, where kernels like some better than others.
        """
        if not self._machine_asked:
            self._machine_asked = True
            self._machine = self._profiled() if self.profile is not None else self._timed_or_guessed()
            if self._machine is not None:
                self._machine = self._with_sizes(self._machine)
            self.listener.doing("measuring the first partitions")
        return self._machine

    def _check_profile(self) -> None:
        if self.profile is None:
            return
        differing = self.group.provenance.difference(self.profile.provenance)
        if differing is not None:
            raise UnsupportedError(f"the profile is of other ranks: {differing} (now, then); measure one of these")
        longest = max(self.contexts) + self.past
        if longest > self.profile.context:
            raise UnsupportedError(
                f"the profile tells of contexts up to {self.profile.context} tokens, not of {longest}; "
                "measure one for those"
            )

    def _profiled(self) -> Machine:
        self._check_profile()
        assert self.profile is not None
        keep_samples(self.profile, self.log, self.group.run)
        self.costs_known = self._chunks_timed = True
        topology = "fanout" if self.group.topology == "fanout" else "chain"
        self._reference = self.profile.machine(topology)  # type: ignore[arg-type]
        return self._reference

    def _timed_or_guessed(self) -> Machine | None:
        self.listener.doing("timing a few chunks and the links")
        longest = max(self.contexts)
        try:
            machine = measured_machine(self.group, longest + self.past, self.log)
            self.costs_known = self._chunks_timed = True
            self._reference = machine
            return machine
        except FitError as error:
            # Measurements correct a guess as well as a fit; it only takes a few more of them.
            self.listener.say(f"  going on from a guess of what chunks cost: {error}")
        guess: Machine | None = None
        with contextlib.suppress(RankError):
            guess = guessed_machine(self.group, longest, lambda one: self._measure([one], GUESS)[0])
            self.costs_known = True
            with contextlib.suppress(FitError):
                self._reference = msgspec.structs.replace(guess, link=time_links(self.group, self.log))
        return guess

    def _with_sizes(self, machine: Machine) -> Machine:
        self.listener.doing("timing chunk sizes")
        quanta = {context: self.quantum_of(context) for context in self.contexts}
        try:
            return profile_chunk_sizes(self.group, machine, quanta, self.log)
        except RankError as error:
            self.listener.say(f"  going on without knowing what single chunk sizes take: {error}")
            return machine

    # ------------------------------------------------------------------------------------- what is worth saying

    def _tell(self, context: int, trial: Trial) -> None:
        time = "failed" if trial.ttft_s is None else f"{trial.ttft_s * 1e3:.1f} ms"
        self.listener.say(f"  {context:>7} tokens  {trial.partition!s:<24} {time:>12}  {trial.source}")

    def _contradicted(self, context: int, measured: Sequence[Measurement]) -> bool:
        why = contradict([self._findings(measurement) for measurement in measured])
        if why is not None:
            self.listener.say(
                f"  context {context}: no more partitions are measured, since what was measured contradicts "
                f"its costs: {why} (see doctor)"
            )
        return why is not None

    def _findings(self, measurement: Measurement) -> list[Finding]:
        """What a measurement shows that its schedule does not; said the first time."""
        if self._reference is None:
            return []
        seed = self.group.noise_seed
        found = findings(measurement, self._reference, chunks_timed=self._chunks_timed, noise_seed=seed)
        for finding in found:
            if finding.about not in self._said:
                self._said.add(finding.about)
                self.listener.say(f"  {measurement.partition}: {finding.text}")
        return found


def rows_of(table: PartitionTable, log: MeasurementLog) -> list[Row]:
    """What a predictor is trained from: each entry of a table with the measurements that led to it.

    Args:
        table: of a session, with its provenance.
        log: of the same session.

    Raises:
        FitError: the log does not tell what chunks cost.
    """
    origin = table.provenance
    assert origin is not None
    prior = machine_of_log(log, origin)
    rows = []
    for entry in table.entries:
        searched = log.measurements(purpose_of("search", entry.context, entry.past))
        trials = [trial for trial in searched if trial.ok]
        if trials:
            rows.append(measured_row(origin, prior, trials, entry.sizes, bandwidth_of(origin.link)))
    return rows


def _ends_first(contexts: Sequence[int]) -> list[int]:
    """The shortest and the longest first: every other one then has something to interpolate between."""
    return [*dict.fromkeys([contexts[0], contexts[-1], *contexts[1:-1]])]
