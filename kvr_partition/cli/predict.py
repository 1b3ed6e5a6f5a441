"""The partition for a context: as searched, or interpolated between searched contexts (KVR-P).

Example:
  kvr-partition predict --table kvr-runs/quickstart-llama-2xcpu-float32/table.json --context 1536
"""

from __future__ import annotations

import argparse

from kvr_partition.cli.options import add_output
from kvr_partition.table import load


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``predict``."""
    parser.add_argument("--table", required=True, metavar="FILE", help="a table.json written by search")
    parser.add_argument("--context", required=True, type=int, help="tokens of the prompt")
    parser.add_argument("--ranks", type=int, help="number of ranks, if the table has several")
    parser.add_argument("--past", type=int, default=0, help="tokens already in the cache (default 0)")
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Print the partition."""
    found = load(options.table).lookup(options.context, ranks=options.ranks, past=options.past)
    partition = found.partition
    if options.format == "json":
        from kvr_partition.cli.show import print_json

        print_json(
            {
                "context": partition.context,
                "ranks": partition.ranks,
                "past": partition.past,
                "sizes": partition.sizes,
                "boundaries": partition.boundaries,
                "fractions": partition.fractions,
                "source": found.source,
            }
        )
    else:
        print("/".join(str(size) for size in partition.sizes) + f"  ({found.source})")
