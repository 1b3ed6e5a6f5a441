"""The main job as a library call: what a machine costs, a search for each context, the best ones side by side.

Profile, chunk sizes, search, a run beside the baselines, a table: what ``kvr-partition search`` does, without
its folder and its words on a terminal. Whatever was measured is in the log before anything else happens with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvr_partition.errors import OutOfRangeError, UnsupportedError
from kvr_partition.link_kinds import bandwidth_of
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
from profiler.calibrate import machine_of_log
from profiler.listener import Listener, Silent
from profiler.measure import Candidate, SamplingPlan
from profiler.prior import Prior
from profiler.ranks import RankGroup
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
        contexts: to search, in tokens; in ascending order from then on, each once.
        past: tokens that every rank has in its cache before the prompt.
        budget: partitions to measure for each context; `BUDGET` when None, and fewer where one takes seconds.
        sampler: as in `kvr_partition.search.search`.
        quantum: what boundaries are multiples of; by context and device when None.
        plan: when a median is known well enough; by backend when None. While searching, partitions get
            `TRIAL_PATIENCE` of its time each: what they teach adds up, and the best ones are timed again.
        storage: an Optuna storage for the studies; in memory when None.
        shared: whether other processes search in that storage at the same time; none measures what another does.
        seed: of the samplers.
        profile: what chunks and links of these ranks cost, measured before; measured now when None.
        table: partitions found before, on such ranks; grows with each context.
        on_table: told of the table after each context.
        listener: told how it gets on.

    Attributes:
        results: of each context, as soon as it is done; those of `run` that ended with an error, too.

    Raises:
        UnsupportedError: fewer than two ranks, an unknown sampler, a budget or quantum below 1.

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
    results: list[ContextResult] = field(init=False, default_factory=list)

    _prior: Prior = field(init=False)
    _said: set[object] = field(init=False, default_factory=set)
    _reached: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        check_sampler(self.sampler)
        for what, value, least in (
            ("ranks", self.group.ranks, 2),
            ("budget", self.budget, 1),
            ("quantum", self.quantum, 1),
        ):
            if value is not None and value < least:
                raise UnsupportedError(f"a search needs {what} of {least} or more; got {value}")
        self.contexts = sorted(set(self.contexts))
        self.plan = self.plan or SamplingPlan.for_backend(self.group.backend)
        self.group.log = self.log
        self._prior = Prior(self.group, self.log, self.profile)

    # ---------------------------------------------------------------------------------------------- all of it

    def run(self, held_out: Sequence[int] = ()) -> list[ContextResult]:
        """Search every context, then predict and time those held out.

        Returns:
            One result for each, in ascending order, searched ones first.

        Raises:
            PartitionError: a context shorter than there are ranks, or beyond the model's positions.
            UnsupportedError: GPUs have no room for a context; or a profile or a table of other ranks, or a profile
                of shorter contexts.
            RankError: nothing of a context could be measured; `results` has those before it.
        """
        held_out = list(dict.fromkeys(held_out))
        if not self.contexts and not held_out:
            raise UnsupportedError("there is nothing to search; name a context")
        self._check_origins()
        for context in (*self.contexts, *held_out):
            self.group.check_context(context, self.past)
            self.group.check_memory(context, self.past)
        before = len(self.results)
        # The shortest and the longest first: every other one then has something to interpolate between.
        for context in dict.fromkeys([*self.contexts[:1], *self.contexts[-1:], *self.contexts]):
            self.search(context)
        for context in held_out:
            self.predict(context)
        return sorted(self.results[before:], key=lambda result: (result.held_out, result.context))

    def work(self, held_out: Sequence[int] = ()) -> float:
        """The most work that `run` reports to its listener, in tokens."""
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

    def search(self, context: int, first: Sequence[Seed] = ()) -> ContextResult:
        """Search one context, compare the best with the baselines, and put it into the table.

        Args:
            first: partitions that a search which begins now measures before any other.

        Raises:
            PartitionError, UnsupportedError, RankError: as `run`.
        """
        self.contexts = sorted({*self.contexts, context})
        self._check_origins()
        self.listener.doing(f"context {context}: searching")
        finals: list[tuple[Candidate, Measurement]] = []

        def confirm(partitions: Sequence[Partition]) -> list[Measurement]:
            self.listener.doing(f"context {context}: the best ones side by side with the baselines")
            candidates = self._baselines(context) + [Candidate("kvr", partition) for partition in partitions]
            measurements = self._measure(candidates, purpose_of("compare", context, self.past))
            finals.extend(zip(candidates, measurements, strict=True))
            return measurements[-len(partitions) :]

        found = self._searched(context, confirm, first)
        self._keep(context, found)
        self._finish(context, self.budget or BUDGET)
        even = Candidate("kvr", Partition.even(context, self.group.ranks, past=self.past))
        named = [(METHODS[one.method].title, result) for one, result in finals if one.method != "kvr"]
        named += [("KVR-E", result) for one, result in finals if one == even]
        named.append(("KVR-S", found.measurement))
        every = [*(trial.measurement for trial in found.trials), *(result for _, result in finals)]
        noticed = worst(finding for measurement in every for finding in self._findings(measurement))
        self.results.append(ContextResult(context, found, named, noticed))
        return self.results[-1]

    def _searched(
        self,
        context: int,
        confirm: Callable[[Sequence[Partition]], list[Measurement]],
        first: Sequence[Seed],
    ) -> SearchResult:
        kind, purpose = check_sampler(self.sampler), purpose_of("search", context, self.past)
        machine = self.machine() if kind.seeded else None
        # Without a cost to correct there is nothing to be informed by.
        lost = machine is None and kind.corrects
        if lost:
            self.listener.say(f"  sampler {WITHOUT_MACHINE}, since nothing tells what chunks cost")
        return search(
            lambda one: self._measure([Candidate("kvr", one)], purpose, TRIAL_PATIENCE)[0],
            context,
            self.group.ranks,
            self._budget_of(context, machine),
            seeds=lambda: [*first, *self._seeds(context)],
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
        """Time the table's answer for a context that was not searched, beside the baselines.

        Raises:
            PartitionError, UnsupportedError: as `run`.
        """
        self._check_origins()
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
        named = list(zip(names, measurements, strict=True))
        self.results.append(ContextResult(context, None, named, noticed))
        return self.results[-1]

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
        """What chunks and links cost here, measured once for all contexts; None if nothing tells.

        From the profile, where there is one, else from timed chunks, else from a guess; with what single chunk
        sizes take, where kernels like some better than others.

        Raises:
            RankError: the ranks failed; the next call tries again.
            UnsupportedError: a profile of other ranks, or of shorter contexts.
        """
        if not self._prior.asked:
            self._check_origins()
            quanta = {context: self.quantum_of(context) for context in self.contexts}
            self._prior.find_out(quanta, self.past, lambda one: self._measure([one], GUESS)[0], self.listener)
            self.listener.doing("measuring the first partitions")
        return self._prior.machine

    @property
    def costs_known(self) -> bool:
        """Whether the log tells what chunks cost, which a predictor is trained from."""
        return self._prior.costs_known

    def _check_origins(self) -> None:
        """Refuse a table or a profile that is of other ranks than these."""
        before = self.table.provenance
        if before is not None and (differing := self.group.provenance.difference(before)) is not None:
            raise UnsupportedError(f"the table is of other ranks: {differing} (now, then); begin a new one")
        self._prior.check_profile(max(self.contexts, default=0) + self.past)

    # ------------------------------------------------------------------------------------- what is worth saying

    def _tell(self, context: int, trial: Trial) -> None:
        time = "failed" if trial.ttft_s is None else f"{trial.ttft_s * 1e3:.1f} ms"
        failure = trial.measurement.failure
        why = "" if failure is None else f": {failure.message.splitlines()[0]}"
        self.listener.say(f"  {context:>7} tokens  {trial.partition!s:<24} {time:>12}  {trial.source}{why}")

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
        prior, seed = self._prior, self.group.noise_seed
        if prior.reference is None:
            return []
        found = findings(measurement, prior.reference, chunks_timed=prior.chunks_timed, noise_seed=seed)
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
    prior, records = machine_of_log(log, origin), log.under(origin)
    rows = []
    for entry in table.entries:
        searched = records.measurements(purpose_of("search", entry.context, entry.past))
        trials = [trial for trial in searched if trial.ok]
        if trials:
            rows.append(measured_row(origin, prior, trials, entry.sizes, bandwidth_of(origin.link)))
    return rows
