"""Time KV-Runahead and what people would use instead side by side, interleaved in one run.

Methods: stock (transformers as it is, on one rank); single (one rank of this runtime); TSP, the baseline of
the paper; TSP with causal kernels; zigzag context parallelism; transformers' tensor parallelism; KVR-E (even
split); KVR-S, what the table found for this very context; KVR-P, what a predictor says, or the table would
say had that context never been searched; the best of these over a fan-out; and TTFT(p), that split with all
waits and transfers removed. Each is first verified to equal one rank. What cannot run here is left out, with
a word why.

Example:
  kvr-partition compare --context 1024 --table kvr-runs/quickstart-llama-2xcpu-float32/table.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvr_partition.cli.options import (
    add_output,
    add_past,
    add_ranks,
    make_group,
    need_at_least,
    parse_bytes,
    parse_contexts,
)
from kvr_partition.errors import KVRError, OutOfRangeError, PartitionError, RankError, UnsupportedError
from kvr_partition.loading import load_predictor, load_table
from kvr_partition.machine.cost import FitError
from kvr_partition.machine.findings import Finding, findings, worst
from kvr_partition.methods import BASELINES, METHODS, method_of
from kvr_partition.partition import Partition
from kvr_partition.predictor import PartitionPredictor
from kvr_partition.provenance import weights_line
from kvr_partition.table import Lookup, PartitionTable

if TYPE_CHECKING:
    from kvr_partition.cli.comparison import Comparison
    from kvr_partition.cli.show import Progress
    from kvr_partition.measurement import Measurement
    from profiler.measure import Candidate, SamplingPlan
    from profiler.ranks import RankGroup

NAMES = {
    **{name: METHODS[name].title for name in ("stock", "single", *BASELINES)},
    "kvr-e": "KVR-E",
    "kvr-s": "KVR-S",
    "kvr-p": "KVR-P",
    "given": "given",
    "other": "the other topology",
    "bound": METHODS["bound"].title,
}
"""Rows of the table. What runs a split is KV-Runahead; the row says whose split."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``compare``."""
    group = parser.add_argument_group("compare")
    group.add_argument("--context", required=True, help="prompt lengths: 4096,8192 or start:stop:step")
    group.add_argument("--table", metavar="FILE", help="a table.json written by search, for KVR-S and KVR-P")
    group.add_argument("--predictor", metavar="FILE", help="a predictor written by train, for KVR-P")
    group.add_argument("--partition", metavar="SIZES", help="also time this split, like 9728/6656")
    add_past(group)
    group.add_argument("--methods", help=f"only these, comma-separated: {', '.join(NAMES)}")
    group.add_argument(
        "--noise", metavar="BYTES", help="time all again under background traffic, like 16MB a layer"
    )
    group.add_argument("--no-verify", action="store_true", help="do not verify the methods first")
    group.add_argument(
        "--samples", type=int, help="most samples per method (default 8 on CPU; on GPU 40, or as many as take 3 s)"
    )
    group.add_argument("--log", metavar="FILE", help="append every sample to this measurement log")
    add_ranks(parser)
    add_output(parser)


@dataclass(frozen=True)
class _Asked:
    """What the options ask for."""

    contexts: list[int]
    past: int
    table: PartitionTable
    predictor: PartitionPredictor | None
    given: Partition | None
    wanted: list[str]
    noise: int
    verify: bool

    @classmethod
    def by(cls, options: argparse.Namespace) -> _Asked:
        """Read and check the options."""
        need_at_least("ranks", options.ranks, 2)
        if options.samples is not None:
            need_at_least("samples", options.samples, 1)
        contexts = parse_contexts(options.context)
        table = load_table(options.table) if options.table else PartitionTable([])
        predictor = load_predictor(options.predictor) if options.predictor else None
        given: Partition | None = None
        if options.partition is not None:
            if len(contexts) != 1:
                raise PartitionError("--partition goes with a single --context")
            given = Partition(Partition.parse(options.partition, contexts[0]).sizes, options.past)
        wanted = list(NAMES) if options.methods is None else [word.strip() for word in options.methods.split(",")]
        for word in wanted:
            if word not in NAMES:
                raise UnsupportedError(f"unknown method {word!r} in --methods; there are {', '.join(NAMES)}")
        noise = 0 if options.noise is None else int(parse_bytes(options.noise, "--noise"))
        for context in contexts:
            Partition.even(context, options.ranks, past=options.past)
        return cls(contexts, options.past, table, predictor, given, wanted, noise, not options.no_verify)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    asked = _Asked.by(options)
    group = make_group(options)
    for context in asked.contexts:
        group.check_context(context, asked.past)

    from kvr_partition.cli.show import Progress
    from profiler.measure import SamplingPlan
    from profiler.store import MeasurementLog

    plan = SamplingPlan.at_most(options.samples, group.backend)
    work = sum(asked.contexts) * len(asked.wanted) * (2.0 if asked.noise else 1.0) * plan.turns
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(work, options.quiet))
        if options.log:
            group.log = stack.enter_context(MeasurementLog(Path(options.log)))
        stack.enter_context(group)
        progress.doing(f"starting {group.ranks} {group.backend} ranks of {group.geometry.name}")
        group.start()
        for option, source in (("--table", asked.table), ("--predictor", asked.predictor)):
            origin = None if source is None else source.provenance
            unlike = None if origin is None else group.provenance.costs_differ(origin)
            if unlike is not None:
                progress.say(f"{option} is from other measurements: {unlike}; its splits may not be the best here")
        results = [_compared(context, asked, group, plan, progress) for context in asked.contexts]
    _show(options.format, group, results)


def _compared(
    context: int, asked: _Asked, group: RankGroup, plan: SamplingPlan, progress: Progress
) -> tuple[int, Comparison, Sequence[Finding]]:
    """Everything that was asked for of one context, in one interleaved run."""
    from kvr_partition.cli.comparison import Comparison

    named = _candidates(context, asked, group, progress)
    # Simulated ranks have nothing to verify.
    if asked.verify and group.backend != "simulate":
        named = _verified(named, group, progress)
    progress.doing(f"context {context}: {', '.join(name for name, _ in named)}")
    timed = [candidate for _, candidate in named]
    disturbed = [(name, one) for name, one in named if asked.noise and method_of(one.method).limited]
    timed += [replace(one, noise=asked.noise) for _, one in disturbed]
    measurements = group.measure_many(
        timed,
        plan=plan,
        purpose=f"compare/{context}/{group.run}",
        on_sample=lambda candidate, sample, warmup: progress.advance(candidate.partition.context),
    )
    found = dict(zip(timed, measurements, strict=True))
    comparison = Comparison(
        [(name, found[one]) for name, one in named],
        [(name, found[replace(one, noise=asked.noise)]) for name, one in disturbed],
        ranks=group.ranks,
        shared=group.backend == "sm",
        windows=group.windows,
        depth=group.resolved_depth,
    )
    return context, comparison, _noticed(group, measurements, progress)


def _show(form: str, group: RankGroup, results: Sequence[tuple[int, Comparison, Sequence[Finding]]]) -> None:
    from kvr_partition.cli.comparison import together
    from kvr_partition.cli.show import print_findings, print_json, print_table

    if form == "json":
        print_json(
            [
                {
                    "context": context,
                    "backend": group.backend,
                    "weights": group.weights,
                    "findings": findings_of,
                    "methods": comparison.facts(),
                }
                for context, comparison, findings_of in results
            ]
        )
        return
    print(f"{group.geometry.name} on {group.ranks} {group.backend} ranks, {group.dtype}")
    print(f"{weights_line(group.weights)}\n")
    print_table(*together([(str(context), comparison) for context, comparison, _ in results]), left=2)
    print_findings([(context, findings_of) for context, _, findings_of in results])


def _noticed(group: RankGroup, measurements: Sequence[Measurement], progress: Progress) -> list[Finding]:
    """What measurements show that their schedules do not; nothing where there is nothing to hold them against."""
    from profiler.calibrate import rough_machine

    timed = [
        measurement
        for measurement in measurements
        if measurement.ok and (measurement.method == "single" or method_of(measurement.method).splits)
    ]
    if not any(method_of(measurement.method).splits for measurement in timed):
        return []
    base = next((measurement for measurement in timed if measurement.method == "single"), timed[0])
    try:
        machine = rough_machine(group, base)
    except (FitError, RankError) as error:
        progress.say(f"  waits are not held against the schedule: {error}")
        return []
    seed = group.noise_seed
    return worst(
        finding for found in timed for finding in findings(found, machine, chunks_timed=False, noise_seed=seed)
    )


def _candidates(context: int, asked: _Asked, group: RankGroup, progress: Progress) -> list[tuple[str, Candidate]]:
    """What there is to time for a context, under the name it is shown by."""
    from profiler.measure import Candidate

    past, table, predictor, wanted = asked.past, asked.table, asked.predictor, asked.wanted
    splits: list[tuple[str, Partition]] = [("kvr-e", Partition.even(context, group.ranks, past=past))]
    without = table.without(context, group.ranks, past)
    known: list[tuple[str, Callable[..., Lookup]]] = [
        ("kvr-s", table.lookup),
        ("kvr-p", without.lookup if predictor is None else predictor.predict),
    ]
    for name, ask in known:
        try:
            found = ask(context, ranks=group.ranks, past=past)
        except OutOfRangeError as error:
            if name in wanted:
                progress.say(f"no {NAMES[name]} for {context}: {error}")
            continue
        if name == "kvr-p" or found.source == "searched":
            splits.append((name, found.partition))
    if asked.given is not None:
        splits.append(("given", asked.given))
    # The split that the rows about a split's surroundings are about: a given one, else the best known.
    by_name = dict(splits)
    chosen = next(name for name in ("given", "kvr-s", "kvr-p", "kvr-e") if name in by_name)
    other = "fanout" if group.topology == "chain" else "chain"
    named = [("stock", Candidate.stock(context, past)), ("single", Candidate.single(context, past))]
    named += [(method, Candidate.even(method, context, group.ranks, past)) for method in BASELINES]
    named += [(name, Candidate("kvr", split)) for name, split in splits]
    named += [
        ("other", Candidate(f"kvr-{other}", by_name[chosen])),
        ("bound", Candidate("bound", by_name[chosen])),
    ]
    shown = {**NAMES, "other": f"{NAMES[chosen]} {other}", "bound": f"TTFT(p) of {NAMES[chosen]}"}
    kept = []
    for name, candidate in named:
        if name not in wanted:
            continue
        try:
            group.check(candidate)
        except (UnsupportedError, PartitionError) as error:
            progress.say(f"no {shown[name]}: {error}")
            continue
        kept.append((shown[name], candidate))
    return kept


def _verified(
    named: list[tuple[str, Candidate]], group: RankGroup, progress: Progress
) -> list[tuple[str, Candidate]]:
    """Those that equal one rank; the others are named."""
    kept = []
    for name, candidate in named:
        if not method_of(candidate.method).verifiable:
            kept.append((name, candidate))
            continue
        progress.doing(f"context {candidate.partition.context}: verifying {name}")
        try:
            certificate = group.verify(candidate)
        except KVRError as error:
            progress.say(f"no {name}: {error}")
            continue
        if certificate.holds:
            kept.append((name, candidate))
        else:
            progress.say(f"no {name}: it does not equal one rank (see kvr-partition verify)")
    return kept
