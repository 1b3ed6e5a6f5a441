"""Find the best partition of each context by measuring, and write them as a table.

With no options it measures the bundled quick start model on two ranks of this machine. The same command
goes on where an earlier one stopped, however it stopped.

Examples:
  kvr-partition search
  kvr-partition search --model my-llama --ranks 4 --contexts 4096:16384:4096 --budget 20
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvr_partition.cli.options import (
    add_output,
    add_past,
    add_ranks,
    make_group,
    need_at_least,
    parse_contexts,
)
from kvr_partition.errors import OutOfRangeError, RankError
from kvr_partition.findings import Finding, contradict, findings, worst
from kvr_partition.methods import METHODS
from kvr_partition.partition import Partition
from kvr_partition.provenance import weights_line

if TYPE_CHECKING:
    from kvr_partition.cli.outdir import OutDir
    from kvr_partition.cli.show import Progress
    from kvr_partition.machine.machine import Machine
    from kvr_partition.measurement import Measurement, Sample
    from kvr_partition.search import Seed, Trial
    from profiler.measure import Candidate, SamplingPlan
    from profiler.ranks import RankGroup

QUICKSTART_CONTEXTS = "512,1024,2048"
QUICKSTART_HELD_OUT = "1536"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``search``."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--contexts",
        help=f"prompt lengths: 4096,8192 or start:stop:step (default {QUICKSTART_CONTEXTS}, and "
        f"{QUICKSTART_HELD_OUT} held out to try KVR-P on)",
    )
    group.add_argument("--held-out", help="prompt lengths to predict and time, not to search")
    group.add_argument("--budget", type=int, default=8, help="partitions to measure per context (default 8)")
    group.add_argument(
        "--sampler",
        default="informed",
        help="informed (corrects a cost model), hierarchical (the paper's grid), gp, tpe or cmaes "
        "(default informed)",
    )
    add_past(group)
    group.add_argument(
        "--quantum",
        type=int,
        help="cut only at multiples of so many tokens (default: fine steps on CPUs, tiles of 128 on GPUs)",
    )
    group.add_argument("--samples", type=int, help="most samples per candidate (default 8 on CPU, 40 on GPU)")
    group.add_argument("--out", metavar="FOLDER", help="results (default kvr-runs/MODEL-RANKSxBACKEND-DTYPE)")
    group.add_argument(
        "--storage",
        metavar="URL",
        help="study in sqlite:///FILE, postgresql://..., journal:FILE or grpc://HOST:PORT, shared by several "
        "runs, each with an --out of its own (default: study.db in --out)",
    )
    again = group.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what is in --out (the default)")
    again.add_argument("--fresh", action="store_true", help="set aside what is in --out and begin anew")
    add_ranks(parser)
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """The main job."""
    need_at_least("ranks", options.ranks, 2)
    need_at_least("budget", options.budget, 1)
    if options.samples is not None:
        need_at_least("samples", options.samples, 1)
    if options.quantum is not None:
        need_at_least("quantum", options.quantum, 1)
    contexts = parse_contexts(options.contexts or QUICKSTART_CONTEXTS)
    held_out_default = QUICKSTART_HELD_OUT if options.contexts is None else None
    held_out_text = options.held_out or held_out_default
    held_out = parse_contexts(held_out_text) if held_out_text else []
    for context in [*contexts, *held_out]:
        Partition.even(context, options.ranks, quantum=options.quantum or 1, past=options.past)

    from kvr_partition.search.samplers import check_sampler

    check_sampler(options.sampler)
    group = make_group(options)
    for context in [*contexts, *held_out]:
        group.check_context(context, options.past)

    import optuna

    from kvr_partition.cli.outdir import OutDir
    from kvr_partition.cli.show import Progress

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = Path(options.out) if options.out else default_out(group)
    with OutDir(path, fresh=options.fresh) as out:
        out.check_request(group)
        group.log = out.log
        plan = sampling_plan(options.samples, group.backend)
        total = _work(contexts, held_out, options.budget, plan)
        with Progress(total, options.quiet) as progress, group:
            if out.moved_to is not None:
                progress.say(f"set aside what was in {path} as {out.moved_to}")
            if out.log.repaired:
                progress.say(f"{out.log_path}: a torn last line was set aside in {out.log_path.name}.torn")
            progress.doing(f"starting {group.ranks} {group.backend} ranks of {group.geometry.name}")
            out.check_conditions(group.provenance)
            for context in (*contexts, *held_out):
                group.check_memory(context, options.past)
            session = _Session(group, out, options, plan, contexts, progress)
            results = [session.search(context) for context in _ends_first(contexts)]
            results += [session.predict(context) for context in held_out]
    results.sort(key=lambda result: (result.held_out, result.context))
    _report(options, out, group, results, session.costs_known)


@dataclass(frozen=True)
class ContextResult:
    """What was found for one context: its methods side by side."""

    context: int
    held_out: bool
    named: list[tuple[str, Measurement]]
    measured: int
    stopped: str = ""
    findings: Sequence[Finding] = ()


class _Session:
    """One run of the command over several contexts."""

    def __init__(
        self,
        group: RankGroup,
        out: OutDir,
        options: argparse.Namespace,
        plan: SamplingPlan,
        contexts: Sequence[int],
        progress: Progress,
    ) -> None:
        self._group = group
        self._out = out
        self._options = options
        self._plan = plan
        self._contexts = contexts
        self._progress = progress
        self._past: int = options.past
        self._machine: Machine | None = None
        self._setting_known = False
        self._reference: Machine | None = None
        self._chunks_timed = False
        self._said: set[object] = set()
        self.costs_known = False
        """Whether the log tells what chunks cost, which a predictor is trained from."""
        self._planned = 0.0

    def search(self, context: int) -> ContextResult:
        """Search one context, compare the best with the baselines, and put it into the table."""
        from kvr_partition.search import search
        from kvr_partition.table import Entry, PartitionTable
        from profiler.measure import Candidate

        self._progress.doing(f"context {context}: searching")
        finals: list[tuple[Candidate, Measurement]] = []

        def measure(partition: Partition) -> Measurement:
            return self._measure([Candidate("kvr", partition)], f"search/{self._label(context)}")[0]

        def confirm(partitions: Sequence[Partition]) -> list[Measurement]:
            self._progress.doing(f"context {context}: the best ones side by side with the baselines")
            candidates = self._baselines(context) + [Candidate("kvr", one) for one in partitions]
            measurements = self._measure(candidates, f"compare/{self._label(context)}")
            finals.extend(zip(candidates, measurements, strict=True))
            return measurements[-len(partitions) :]

        def told(trial: Trial) -> None:
            time = "failed" if trial.ttft_s is None else f"{trial.ttft_s * 1e3:.1f} ms"
            self._progress.say(f"  {context:>7} tokens  {trial.partition!s:<24} {time:>12}  {trial.source}")

        def enough(measured: Sequence[Measurement]) -> bool:
            why = contradict([self._findings(one) for one in measured])
            if why is not None:
                self._progress.say(
                    f"  context {context}: no more partitions are measured, since what was measured contradicts "
                    f"its costs: {why} (see doctor; --fresh searches anew once it is mended)"
                )
            return why is not None

        machine = None if self._options.sampler == "hierarchical" else self._measured_machine()
        # Without a cost to correct there is nothing to be informed by.
        lost = machine is None and self._options.sampler == "informed"
        found = search(
            measure,
            context,
            self._group.ranks,
            self._options.budget,
            seeds=lambda: self._seeds(context),
            sampler="gp" if lost else self._options.sampler,
            machine=machine,
            quantum=self._quantum(context),
            past=self._past,
            storage=self._options.storage or self._out.study_url,
            shared=self._options.storage is not None,
            conditions=self._conditions(),
            study_name=f"{self._group.geometry.name}/{self._group.ranks}/{self._label(context)}",
            seed=self._options.seed,
            confirm=confirm,
            on_trial=told,
            enough=enough,
        )
        entry = Entry(
            context,
            found.best.sizes,
            past=self._past,
            ttft_s=found.measurement.ttft_s,
            interval_s=found.measurement.interval_s,
            measured=len(found.trials),
            quantum=found.quantum,
        )
        self._out.table = PartitionTable(
            self._out.table.with_entry(entry).entries, self._out.table.provenance or self._group.provenance
        )
        self._out.table.save(self._out.table_path)
        self._finish_phase(context, searched=True)
        even = self._even(context)
        named = [(METHODS[one.method].title, result) for one, result in finals if one.method != "kvr"]
        named += [("KVR-E", result) for one, result in finals if one == Candidate("kvr", even)]
        named.append(("KVR-S", found.measurement))
        every = [*(trial.measurement for trial in found.trials), *(result for _, result in finals)]
        noticed = worst(one for result in every for one in self._findings(result))
        return ContextResult(context, False, named, len(found.trials), found.stopped, noticed)

    def predict(self, context: int) -> ContextResult:
        """Time the table's answer for a context that was not searched, beside the baselines."""
        from profiler.measure import Candidate

        self._progress.doing(f"context {context}: trying KVR-P, this context was not searched")
        predicted: Partition | None
        try:
            ranks, past = self._group.ranks, self._past
            found = self._out.table.without(context, ranks, past).lookup(context, ranks=ranks, past=past)
            predicted = found.partition
        except OutOfRangeError as error:
            self._progress.say(f"  no KVR-P for {context}: {error}")
            predicted = None
        candidates = [*self._baselines(context), Candidate("kvr", self._even(context))]
        names = [*(METHODS[one.method].title for one in self._baselines(context)), "KVR-E"]
        if predicted is not None:
            candidates.append(Candidate("kvr", predicted))
            names.append("KVR-P")
        measurements = self._measure(candidates, f"predict/{self._label(context)}")
        self._finish_phase(context, searched=False)
        noticed = worst(one for result in measurements for one in self._findings(result))
        return ContextResult(context, True, list(zip(names, measurements, strict=True)), 0, findings=noticed)

    def _findings(self, measurement: Measurement) -> list[Finding]:
        """What a measurement shows that its schedule does not; said the first time."""
        if self._reference is None:
            return []
        seed = self._group.noise_seed
        found = findings(measurement, self._reference, chunks_timed=self._chunks_timed, noise_seed=seed)
        for one in found:
            if one.about not in self._said:
                self._said.add(one.about)
                self._progress.say(f"  {measurement.partition}: {one.text}")
        return found

    def _conditions(self) -> dict[str, object]:
        """What a shared study must agree on; the model by its digest, which is short."""
        conditions = self._group.provenance.conditions()
        if conditions["layers"] == "stock":
            # So studies that know of no others say it.
            del conditions["layers"]
        return {**conditions, "model": self._group.geometry.config_digest}

    def _baselines(self, context: int) -> list[Candidate]:
        from profiler.measure import Candidate

        alone = Candidate.single(context, self._past)
        # Methods that gather KV know no past.
        return [alone] if self._past else [alone, Candidate.tsp(context, self._group.ranks)]

    def _even(self, context: int) -> Partition:
        return Partition.even(context, self._group.ranks, past=self._past)

    def _label(self, context: int) -> str:
        """What a context is called in the log and the study."""
        return f"{context}+{self._past}" if self._past else str(context)

    def _measure(self, candidates: Sequence[Candidate], purpose: str) -> list[Measurement]:
        return self._group.measure_many(candidates, plan=self._plan, purpose=purpose, on_sample=self._sampled)

    def _sampled(self, candidate: Candidate, sample: Sample, warmup: bool) -> None:
        self._progress.advance(candidate.partition.context)

    def _quantum(self, context: int) -> int:
        from kvr_partition.search.space import default_quantum

        given: int | None = self._options.quantum
        return given or default_quantum(context, self._group.ranks, self._group.tile_rows)

    def _seeds(self, context: int) -> list[Seed]:
        """For samplers that know nothing: what the table interpolates, and what a fitted machine solves to."""
        from kvr_partition.machine.solve import best_split
        from kvr_partition.search import Seed

        sampler = self._options.sampler
        if sampler == "hierarchical" or (sampler == "informed" and self._measured_machine() is not None):
            return []
        seeds = []
        ranks, quantum = self._group.ranks, self._quantum(context)
        # Until something is searched on both sides of it, there is nothing to interpolate.
        with contextlib.suppress(OutOfRangeError):
            found = self._out.table.lookup(context, ranks=ranks, past=self._past)
            seeds.append(Seed("interpolated", found.partition))
        machine = self._measured_machine()
        if machine is not None:
            told = machine.behind(self._past)
            seeds.append(Seed("solved", best_split(context, ranks, told, quantum=quantum)))
        return seeds

    def _measured_machine(self) -> Machine | None:
        """What chunks and links cost here, found out once for all contexts; None if nothing tells."""
        from kvr_partition.machine.cost import FitError
        from profiler.calibrate import guessed_machine, measured_machine, time_links

        if self._setting_known:
            return self._machine
        self._setting_known = True
        self._progress.doing("timing a few chunks and the links")
        longest = max(self._contexts)
        try:
            self._machine = measured_machine(self._group, longest + self._past, self._out.log)
            self.costs_known = self._chunks_timed = True
            self._reference = self._machine
        except FitError as error:
            # Measurements correct a guess as well as a fit; it only takes a few more of them.
            self._progress.say(f"  going on from a guess of what chunks cost: {error}")
            with contextlib.suppress(RankError):
                self._machine = guessed_machine(
                    self._group, longest, lambda candidate: self._measure([candidate], "guess")[0]
                )
                self.costs_known = True
                with contextlib.suppress(FitError):
                    self._reference = msgspec.structs.replace(
                        self._machine, link=time_links(self._group, self._out.log)
                    )
        if self._machine is not None:
            self._machine = self._with_steps(self._machine)
        self._progress.doing("measuring the first partitions")
        return self._machine

    def _with_steps(self, machine: Machine) -> Machine:
        """What single chunk sizes take, where kernels like some better than others."""
        from profiler.sizes import tell_sizes

        self._progress.doing("timing chunk sizes")
        quanta = {context: self._quantum(context) for context in self._contexts}
        try:
            return tell_sizes(self._group, machine, quanta, self._out.log)
        except RankError as error:
            self._progress.say(f"  going on without knowing what single chunk sizes take: {error}")
            return machine

    def _finish_phase(self, context: int, *, searched: bool) -> None:
        budget = self._options.budget if searched else 0
        self._planned += _context_work(context, budget, self._plan, searched)
        self._progress.reach(self._planned)


def sampling_plan(samples: int | None, backend: str) -> SamplingPlan:
    """The plan of the backend, with at most ``samples`` samples if that is given."""
    from dataclasses import replace

    from profiler.measure import SamplingPlan

    plan = SamplingPlan.for_backend(backend)
    most = samples or (8 if backend == "cpu" else plan.most)
    return replace(plan, most=most, least=min(plan.least, most))


def default_out(group: RankGroup) -> Path:
    """Where results go unless said otherwise."""
    name = f"{group.geometry.name}-{group.ranks}x{group.backend}-{group.dtype}"
    usual = ("auto",) if group.backend == "cuda" else ("auto", "chain")
    if group.wanted_topology not in usual:
        name += f"-{group.wanted_topology}"
    if group.links != "auto":
        name += f"-{group.links}"
    if group.layers != "auto":
        name += f"-{group.layers}"
    if group.bandwidth is not None:
        name += f"-{group.bandwidth / 1e9:g}GBs"
    return Path("kvr-runs") / name


def _ends_first(contexts: Sequence[int]) -> list[int]:
    """The shortest and the longest first: every other one then has something to interpolate between."""
    return [*dict.fromkeys([contexts[0], contexts[-1], *contexts[1:-1]])]


def _context_work(context: int, budget: int, plan: SamplingPlan, searched: bool) -> float:
    samples = plan.warmup + plan.most
    return context * samples * (budget + (6 if searched else 4))


def _work(contexts: Sequence[int], held_out: Sequence[int], budget: int, plan: SamplingPlan) -> float:
    return sum(_context_work(one, budget, plan, True) for one in contexts) + sum(
        _context_work(one, 0, plan, False) for one in held_out
    )


def _report(
    options: argparse.Namespace,
    out: OutDir,
    group: RankGroup,
    results: Sequence[ContextResult],
    costs_known: bool,
) -> None:
    from kvr_partition.cli.comparison import Comparison, together
    from kvr_partition.cli.show import print_findings, print_json, print_table

    compared = {
        result.context: Comparison(
            result.named,
            ranks=group.ranks,
            shared=group.backend == "sm",
            windows=group.windows,
            depth=group.resolved_depth,
        )
        for result in results
    }
    files = {"table": out.table_path, "measurements": out.log_path, "study": out.path / "study.db"}
    if options.format == "json":
        print_json(
            {
                "out": str(out.path),
                "weights": group.weights,
                "files": {name: str(path) for name, path in files.items()},
                "contexts": [
                    {
                        "context": result.context,
                        "held_out": result.held_out,
                        "partitions_measured": result.measured,
                        "stopped": result.stopped,
                        "findings": result.findings,
                        "methods": compared[result.context].facts(),
                    }
                    for result in results
                ],
            }
        )
        return
    print(f"\n{group.geometry.name} on {group.ranks} {group.backend} ranks, {group.dtype}")
    print(f"{weights_line(group.weights)}\n")
    labelled = [
        (f"{result.context}{' (held out)' if result.held_out else ''}", compared[result.context])
        for result in results
    ]
    print_table(*together(labelled), left=2)
    print_findings([(result.context, result.findings) for result in results])
    for result in results:
        if result.stopped == "enough":
            print(
                f"\nContext {result.context} was searched no further than {result.measured} partitions: "
                "measurements contradict its costs. Once that is mended, search it anew with --fresh."
            )
    print(f"\nFiles in {out.path}:")
    print("  table.json          the partitions found; serving code loads this")
    print("  measurements.jsonl  every sample")
    print("  study.db            the Optuna study; the same command goes on from it")
    example = results[-1].context
    program = "kvr-partition" if sys.argv[0].endswith("kvr-partition") else "python -m kvr_partition"
    print("\nNext:")
    print(f"  {program} predict --table {files['table']} --context {example}")
    print(f"  {program} export {files['table']} --format markdown")
    print(f"  {program} generate{_same_group(options)} --table {files['table']} --context {example}")
    if costs_known:
        print(f"  {program} train {out.path} --out my.predictor.json")
    print(f"  in Python: from kvr_partition import load; load({str(files['table'])!r}).lookup({example})")
    if options.model is None:
        print("Your own model:  kvr-partition search --model FOLDER --ranks N --contexts 4096,8192")


def _same_group(options: argparse.Namespace) -> str:
    """Arguments with which another command runs the same ranks."""
    usual = {"model": None, "ranks": 2, "backend": "auto", "profile": None, "dtype": "float32", "threads": 1}
    return "".join(
        f" --{name} {getattr(options, name)}" for name, value in usual.items() if getattr(options, name) != value
    )
