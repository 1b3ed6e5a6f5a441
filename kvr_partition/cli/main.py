"""The ``kvr-partition`` program: reads the command line, runs one command, turns errors into one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from kvr_partition._version import __version__
from kvr_partition.errors import KVRError, PartitionError

# Standard library only up to here: `predict` and `export` must work where only msgspec is installed.
COMMANDS = {
    "search": "measure, search and write the best partitions (start here)",
    "profile": "time what chunks, ranks and links cost, for the simulator",
    "compare": "time KV-Runahead and what people would use instead, side by side",
    "verify": "certify that a split prefill equals one rank",
    "advise": "which method and how many ranks a context is worth",
    "train": "a predictor from what searches found",
    "predict": "the partition for a context, from a table or predictor",
    "export": "a table as JSON, CSV or Markdown",
    "generate": "run a prompt: KV-Runahead prefill, then decode",
    "doctor": "what this machine can run",
}

DONE, FAILED, WRONG_USAGE = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser; with ``only``, just that command has its options, so that no other one is imported."""
    parser = _Parser(
        prog="kvr-partition",
        description="Partition search and prediction for KV-Runahead prefill.",
        epilog="Start with:  kvr-partition search",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, summary in COMMANDS.items():
        if only in (None, name):
            module = import_module(f"kvr_partition.cli.{name}")
            sub = commands.add_parser(
                name,
                help=summary,
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_options(sub)
            sub.set_defaults(run=module.run)
        else:
            commands.add_parser(name, help=summary, add_help=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the console script; always ends by `SystemExit`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in given if not word.startswith("-")), None)
    options = build_parser(command if command in COMMANDS else "doctor").parse_args(given)
    try:
        options.run(options)
    except KVRError as error:
        _tell(options, error)
        # Numbers that make no partition were typed by someone: that is wrong usage. All else is a failure.
        sys.exit(WRONG_USAGE if isinstance(error, PartitionError) else FAILED)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA_OF:
            raise
        extra = _EXTRA_OF[error.name.split(".")[0]]
        _say(
            f"'{options.command}' needs {error.name}, which is not installed: pip install 'kvr-partition[{extra}]'"
        )
        sys.exit(FAILED)
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to go on where it stopped")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has seen enough.
        sys.stderr.close()
        sys.exit(FAILED)
    sys.exit(DONE)


_EXTRA_OF = {
    "torch": "run",
    "transformers": "run",
    "numpy": "run",
    "accelerate": "search",
    "optuna": "search",
    "rich": "search",
    "scipy": "search",
    "sklearn": "search",
    "joblib": "search",
    "sqlalchemy": "search",
}


def _tell(options: argparse.Namespace, error: KVRError) -> None:
    _say(str(error))
    for note in getattr(error, "__notes__", []):
        if getattr(options, "verbose", False):
            print(note, file=sys.stderr)


def _say(message: str) -> None:
    print(f"kvr-partition: error: {' '.join(message.split())}", file=sys.stderr)
