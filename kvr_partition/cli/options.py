"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvr_partition.errors import PartitionError, UnsupportedError

if TYPE_CHECKING:
    from profiler.ranks import RankGroup

QUICKSTART_MODEL = "quickstart-llama"


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--format``, ``--quiet`` and ``--verbose``."""
    group = parser.add_argument_group("output")
    group.add_argument("--format", choices=("text", "json"), default="text", help="json: one document on stdout")
    add_verbosity(group)


def add_verbosity(group: Any) -> None:
    """``--quiet`` and ``--verbose``."""
    group.add_argument("--quiet", action="store_true", help="no progress, only the result")
    group.add_argument("--verbose", action="store_true", help="more detail, and a rank's traceback on failure")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """What `RankGroup` needs."""
    group = parser.add_argument_group("ranks and model")
    group.add_argument(
        "--model",
        metavar="FOLDER",
        help="folder with config.json (random weights) or a checkpoint; default: the bundled quick start Llama",
    )
    group.add_argument("--ranks", type=int, default=2, help="number of ranks (default 2)")
    group.add_argument("--backend", default="auto", help="auto, cpu or cuda (default auto)")
    group.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default float32)")
    group.add_argument("--depth", default="auto", help="auto, attention or cache (default auto)")
    group.add_argument("--threads", type=int, default=1, help="compute threads of each CPU rank (default 1)")
    group.add_argument("--batch", type=int, default=1, help="equal prompts per prefill (default 1)")
    group.add_argument("--seed", type=int, default=0, help="seed of random weights (default 0)")
    group.add_argument(
        "--timeout", type=float, default=600.0, help="seconds any one prefill may take (default 600)"
    )


def make_group(options: argparse.Namespace) -> RankGroup:
    """The group that the options describe; nothing is started yet, unless to follow a ``torchrun`` leader."""
    from profiler.ranks import RankGroup, is_follower

    group = RankGroup(
        model_folder(options.model),
        options.ranks,
        backend=options.backend,
        dtype=options.dtype,
        depth=options.depth,
        threads=options.threads,
        batch=options.batch,
        seed=options.seed,
        timeout_s=options.timeout,
    )
    if is_follower():
        group.start()  # serves the leader and leaves the program
    return group


def model_folder(given: str | None) -> Path:
    """The folder of a model given by path or by the name of a bundled one."""
    from kvr_partition.resources import models_folder

    name = given or QUICKSTART_MODEL
    bundled = models_folder() / name
    return bundled if not Path(name).exists() and bundled.is_dir() else Path(name)


def parse_contexts(text: str) -> list[int]:
    """Contexts from ``4096,8192`` or ``start:stop:step``, the stop included; ascending, without repeats.

    Raises:
        PartitionError: anything else, or none.
    """
    try:
        if ":" in text:
            start, stop, step = (int(part) for part in text.split(":"))
            contexts = set(range(start, stop + 1, step)) if step > 0 else set()
        else:
            contexts = {int(part) for part in text.split(",")}
    except ValueError:
        contexts = set()
    if not contexts or min(contexts) < 1:
        raise PartitionError(f"contexts are written as 4096,8192 or start:stop:step; got {text!r}")
    return sorted(contexts)


def need_at_least(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        UnsupportedError: it is.
    """
    if value < least:
        raise UnsupportedError(f"--{name} must be at least {least}; got {value}")


def on_terminal() -> bool:
    """Whether progress can be drawn in place."""
    return sys.stderr.isatty()
