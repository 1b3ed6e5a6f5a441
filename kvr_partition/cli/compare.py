"""Time single, TSP, KVR-E, KVR-S and KVR-P side by side, interleaved.

KVR-S is what the table found for this very context; KVR-P is what the table would say had that context
never been searched. Each is left out, with a word why, where the table has no such answer.

Example:
  kvr-partition compare --context 1024 --table kvr-runs/quickstart-llama-2xcpu-float32/table.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvr_partition.cli.options import add_output, add_ranks, make_group, need_at_least, parse_contexts
from kvr_partition.errors import OutOfRangeError, PartitionError
from kvr_partition.partition import Partition
from kvr_partition.table import PartitionTable, load


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``compare``."""
    group = parser.add_argument_group("compare")
    group.add_argument("--context", required=True, help="prompt lengths: 4096,8192 or start:stop:step")
    group.add_argument("--table", metavar="FILE", help="a table.json written by search, for KVR-S and KVR-P")
    group.add_argument("--partition", metavar="SIZES", help="also time this split, like 9728/6656")
    group.add_argument("--samples", type=int, help="most samples per method (default 8 on CPU, 40 on GPU)")
    group.add_argument("--log", metavar="FILE", help="append every sample to this measurement log")
    add_ranks(parser)
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    need_at_least("ranks", options.ranks, 2)
    if options.samples is not None:
        need_at_least("samples", options.samples, 1)
    contexts = parse_contexts(options.context)
    table = load(options.table) if options.table else PartitionTable([])
    given: list[Partition] = []
    if options.partition is not None:
        if len(contexts) != 1:
            raise PartitionError("--partition goes with a single --context")
        given.append(Partition.parse(options.partition, contexts[0]))
    for context in contexts:
        Partition.even(context, options.ranks)
    group = make_group(options)
    for context in contexts:
        group.check_context(context)

    from kvr_partition.cli.search import sampling_plan
    from kvr_partition.cli.show import (
        COMPARISON_HEADER,
        Progress,
        comparison_json,
        comparison_rows,
        print_json,
        print_table,
    )
    from profiler.measure import Candidate
    from profiler.store import MeasurementLog

    plan = sampling_plan(options.samples, group.backend)
    results = []
    group.log = MeasurementLog(Path(options.log)) if options.log else None
    work = sum(contexts) * 5.0 * (plan.warmup + plan.most)
    with Progress(work, options.quiet) as progress, group:
        progress.doing(f"starting {group.ranks} {group.backend} ranks of {group.geometry.name}")
        group.start()
        for context in contexts:
            named = [
                ("single", Candidate.single(context)),
                ("TSP", Candidate.tsp(context, group.ranks)),
                ("KVR-E", Candidate("kvr", Partition.even(context, group.ranks))),
            ]
            for name, source in (("KVR-S", table), ("KVR-P", table.without(context, group.ranks))):
                try:
                    found = source.lookup(context, ranks=group.ranks)
                except OutOfRangeError as error:
                    progress.say(f"no {name} for {context}: {error}")
                    continue
                if name == "KVR-P" or found.source == "searched":
                    named.append((name, Candidate("kvr", found.partition)))
            named += [("given", Candidate("kvr", one)) for one in given]
            progress.doing(f"context {context}: {', '.join(name for name, _ in named)}")
            measurements = group.measure_many(
                [candidate for _, candidate in named],
                plan=plan,
                purpose=f"compare/{context}/{group.run}",
                on_sample=lambda candidate, sample, warmup: progress.advance(candidate.partition.context),
            )
            results.append((context, list(zip((name for name, _ in named), measurements, strict=True))))
    if options.format == "json":
        print_json([{"context": context, "methods": comparison_json(methods)} for context, methods in results])
        return
    rows = []
    for context, methods in results:
        for index, row in enumerate(comparison_rows(methods)):
            rows.append([str(context) if index == 0 else "", *row])
    print_table(["context", *COMPARISON_HEADER], rows, left=2)
