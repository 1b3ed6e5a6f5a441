"""A partition table or predictor for other programs and for people.

`vllm` prints one line for vLLM's --additional-config: with --context the static weights of that context, without
it those of the longest context and, beside them, those of all. `router` is a table in plain JSON, described by
docs/schema/router.schema.json.

Examples:
  kvr-partition export kvr-runs/quickstart-llama-2xcpu-float32/table.json --format csv
  vllm serve ... --additional-config "$(kvr-partition export table.json --format vllm --context 16384)"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvr_partition.cli.options import add_verbosity
from kvr_partition.errors import UnsupportedError
from kvr_partition.export import FORMATS, export
from kvr_partition.jsonfile import write_atomic
from kvr_partition.loading import load


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``export``."""
    parser.add_argument("table", metavar="FILE", help="a table.json written by search, or a predictor")
    parser.add_argument("--format", choices=FORMATS, default="json", help="default json")
    parser.add_argument("--context", type=int, help="of vllm: whose weights; all if not given")
    parser.add_argument("--ranks", type=int, help="of vllm: number of ranks, if there are several")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to stdout")
    add_verbosity(parser.add_argument_group("output"))


def run(options: argparse.Namespace) -> None:
    """Print or write it."""
    if options.format != "vllm" and (options.context is not None or options.ranks is not None):
        raise UnsupportedError("--context and --ranks go with --format vllm")
    text = export(load(options.table), options.format, ranks=options.ranks, context=options.context)
    if options.output is None:
        sys.stdout.write(text)
    else:
        write_atomic(Path(options.output), text.encode())
