"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import re
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
        help="folder with a checkpoint, or with config.json alone: random weights, which leave TTFT as it is "
        "unless they route tokens to experts; default: the bundled quick start Llama",
    )
    group.add_argument("--ranks", type=int, default=2, help="number of ranks (default 2)")
    group.add_argument(
        "--backend",
        default="auto",
        help="auto, cpu (gloo), cuda (NCCL, a GPU a rank), sm (one GPU cut into ranks) or simulate "
        "(--profile answers); default auto",
    )
    group.add_argument(
        "--profile",
        metavar="FILE",
        help="a profile.json for --backend simulate; search on other ranks takes their costs from it",
    )
    group.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default float32)")
    group.add_argument("--depth", default="auto", help="auto, attention or cache (default auto)")
    group.add_argument(
        "--layers",
        default="auto",
        help="fused: fewer kernels a layer, where probing shows that they are as exact; stock: the model's own; "
        "auto: fused on a GPU (default auto)",
    )
    group.add_argument("--threads", type=int, default=1, help="compute threads of each CPU rank (default 1)")
    group.add_argument(
        "--topology",
        default="auto",
        help="how KV travels: chain, fanout or auto (default auto: what suits the links)",
    )
    group.add_argument(
        "--links", default="auto", help="between GPUs: peer, nccl or auto (default auto: the best there is)"
    )
    group.add_argument("--bandwidth", metavar="RATE", help="hold every link to this rate, like 10GB/s")
    group.add_argument("--batch", type=int, default=1, help="equal prompts per prefill (default 1)")
    group.add_argument("--seed", type=int, default=0, help="seed of random weights (default 0)")
    group.add_argument(
        "--timeout", type=float, default=600.0, help="seconds any one prefill may take (default 600)"
    )


def add_past(group: Any) -> None:
    """``--past``."""
    group.add_argument(
        "--past",
        type=int,
        default=0,
        metavar="TOKENS",
        help="tokens that every rank has in its cache before the prompt (default 0)",
    )


def make_group(options: argparse.Namespace) -> RankGroup:
    """The group that the options describe; nothing is started yet, unless to follow a ``torchrun`` leader."""
    from kvr_partition.machine.profile import load_profile
    from profiler.ranks import RankGroup
    from profiler.transport import is_follower

    profile = None if options.profile is None else load_profile(options.profile)

    group = RankGroup(
        model_folder(options.model),
        options.ranks,
        backend=options.backend,
        dtype=options.dtype,
        depth=options.depth,
        layers=options.layers,
        threads=options.threads,
        batch=options.batch,
        topology=options.topology,
        links=options.links,
        bandwidth=None if options.bandwidth is None else parse_rate(options.bandwidth),
        profile=profile,
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


def parse_range(text: str) -> tuple[int, int] | None:
    """The shortest and the longest context of ``4096..65536``; None for what is no range.

    Raises:
        PartitionError: ends that are no contexts, or in the wrong order.
    """
    if ".." not in text:
        return None
    low, _, high = text.partition("..")
    if re.fullmatch(r"\s*[0-9]{1,12}\s*\.\.\s*[0-9]{1,12}\s*", text) is None or not 1 <= int(low) < int(high):
        raise PartitionError(f"a range of contexts is written as 4096..65536, the shorter one first; got {text!r}")
    return int(low), int(high)


def parse_share(text: str, what: str) -> float:
    """A share written in percent, like ``0.5%``.

    Raises:
        UnsupportedError: anything else, or no share between 0 and 100%.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*%\s*", text)
    if match is None or not 0 < float(match[1]) < 100:
        raise UnsupportedError(f"{what} is a share in percent, like 0.5%; got {text!r}")
    return float(match[1]) / 100


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str, what: str) -> float:
    """A number of bytes like ``64MB`` or ``1.5GiB``.

    Raises:
        UnsupportedError: anything else, or less than nothing.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise UnsupportedError(f"{what} is written like 64MB or 1.5GiB; got {text!r}")
    return float(match[1]) * _UNITS[match[2].upper()]


def parse_rate(text: str) -> float:
    """Bytes per second from ``10GB/s``.

    Raises:
        UnsupportedError: anything else, or nothing at all.
    """
    rate = parse_bytes(text.removesuffix("/s"), "a bandwidth, in bytes per second,")
    if rate <= 0:
        raise UnsupportedError(f"a bandwidth must be more than 0; got {text!r}")
    return rate


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
