"""The partition for a context, from a table or from a trained predictor.

A table knows what was searched and interpolates in between, as published. A predictor (see train) was trained on
such tables and says what it lost on contexts it had not seen. Outside their range both refuse, unless told
what to fall back to.

Examples:
  kvr-partition predict --table kvr-runs/quickstart-llama-2xcpu-float32/table.json --context 1536
  kvr-partition predict --predictor my.predictor.json --context 10000 --past 2000 --explain
"""

from __future__ import annotations

import argparse
from typing import Any

from kvr_partition.cli.options import add_output, add_past
from kvr_partition.errors import UnsupportedError
from kvr_partition.loading import load, load_table
from kvr_partition.partition import Partition
from kvr_partition.predictor import Explanation, PartitionPredictor


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``predict``."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--table", metavar="FILE", help="a table.json written by search")
    where.add_argument("--predictor", metavar="FILE", help="a predictor written by train, or a table")
    parser.add_argument("--context", required=True, type=int, help="tokens of the prompt")
    parser.add_argument("--ranks", type=int, help="number of ranks, if there are several")
    add_past(parser)
    parser.add_argument(
        "--quantum", type=int, help="cut only at multiples of so many tokens (default: as trained)"
    )
    parser.add_argument(
        "--fallback",
        choices=("cost-model", "even"),
        help="what a predictor does outside its range instead of refusing",
    )
    parser.add_argument("--explain", action="store_true", help="say what to expect of a predictor's answer")
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Print the partition."""
    planner = load_table(options.table) if options.table else load(options.predictor)
    explanation: Explanation | None = None
    if isinstance(planner, PartitionPredictor):
        found = planner.predict(
            options.context,
            ranks=options.ranks,
            past=options.past,
            quantum=options.quantum,
            fallback=options.fallback,
        )
        if options.explain:
            explanation = planner.explain(options.context, ranks=options.ranks, past=options.past)
    elif options.fallback or options.explain or options.quantum is not None:
        raise UnsupportedError("--fallback, --explain and --quantum need a predictor; a table has none of them")
    else:
        found = planner.lookup(options.context, ranks=options.ranks, past=options.past)
    partition = found.partition
    if options.format == "json":
        from kvr_partition.cli.show import print_json

        document = {**_facts(partition), "source": found.source}
        print_json({**document, "explanation": explanation} if options.explain else document)
        return
    print("/".join(str(size) for size in partition.sizes) + f"  ({found.source})")
    if explanation is not None:
        lost = explanation.regret
        expected = (
            "what to expect was not measured"
            if lost is None
            else f"on unseen contexts {lost.mean:.2%} slower than the best known split on average, "
            f"{lost.max:.2%} at most ({lost.cases} case{'s' if lost.cases > 1 else ''})"
        )
        print(f"{explanation.method}; {explanation.reason}; {expected}")


def _facts(partition: Partition) -> dict[str, Any]:
    return {
        "context": partition.context,
        "ranks": partition.ranks,
        "past": partition.past,
        "sizes": partition.sizes,
        "boundaries": partition.boundaries,
        "fractions": partition.fractions,
    }
