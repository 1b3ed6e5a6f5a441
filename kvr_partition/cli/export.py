"""A partition table for other programs and for people.

Example:
  kvr-partition export kvr-runs/quickstart-llama-2xcpu-float32/table.json --format csv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvr_partition.cli.options import add_verbosity
from kvr_partition.export import FORMATS, export
from kvr_partition.jsonfile import write_atomic
from kvr_partition.table import load


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``export``."""
    parser.add_argument("table", metavar="TABLE", help="a table.json written by search")
    parser.add_argument("--format", choices=FORMATS, default="json", help="default json")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to stdout")
    add_verbosity(parser.add_argument_group("output"))


def run(options: argparse.Namespace) -> None:
    """Print or write the table."""
    text = export(load(options.table), options.format)
    if options.output is None:
        sys.stdout.write(text)
    else:
        write_atomic(Path(options.output), text.encode())
