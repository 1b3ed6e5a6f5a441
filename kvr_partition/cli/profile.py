"""Time what chunks, ranks and links cost on this machine, and write it to a profile.

A few chunks behind a few prefixes on all ranks at once, and messages from each rank to the next; a cost is
fitted to them and refused if they do not determine it. `--backend simulate --profile FILE` then answers for
the machine without it.

Example:
  kvr-partition profile --model my-llama --ranks 4 --context 16384 --out profile.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvr_partition.cli.options import add_output, add_ranks, make_group, need_at_least
from kvr_partition.provenance import weights_line

if TYPE_CHECKING:
    from kvr_partition.machine.profile import Profile
    from profiler.ranks import RankGroup

SHORTER = 4
"""Contexts down to so small a part of the longest are asked for, as far as single chunk sizes matter."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``profile``."""
    group = parser.add_argument_group("profile")
    group.add_argument("--context", type=int, default=1536, help="longest context it is for (default 1536)")
    group.add_argument("--out", metavar="FILE", default="profile.json", help="(default profile.json)")
    group.add_argument("--log", metavar="FILE", help="append every sample to this measurement log")
    add_ranks(parser)
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, fit, write and print."""
    need_at_least("ranks", options.ranks, 2)
    group = make_group(options)
    group.check_context(options.context)

    import tempfile
    from contextlib import ExitStack

    from kvr_partition.cli.show import Progress, print_json
    from kvr_partition.machine.profile import ChunkSample, LinkSample, Profile
    from kvr_partition.search.space import default_quantum
    from profiler.calibrate import LEAST_SAMPLES, chunk_design, measured_machine
    from profiler.sizes import profile_chunk_sizes
    from profiler.store import MeasurementLog

    work = LEAST_SAMPLES * len(chunk_design(options.context, group.ranks))
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        log = stack.enter_context(MeasurementLog(Path(options.log or f"{scratch}/profile.jsonl")))
        progress = stack.enter_context(Progress(float(work), options.quiet))
        group.log = log
        progress.doing(f"starting {group.ranks} {group.backend} ranks of {group.geometry.name}")
        stack.enter_context(group)
        progress.doing("timing chunks and links")
        machine = measured_machine(group, options.context, log, lambda chunk, prefix: progress.advance(1.0))
        progress.doing("timing chunk sizes")
        contexts = (max(options.context // SHORTER, group.ranks), options.context)
        quanta = {context: default_quantum(context, group.ranks, group.tile_rows) for context in contexts}
        machine = profile_chunk_sizes(group, machine, quanta, log)
        timed = log.of_run(group.run)
        profile = Profile.of(
            machine,
            options.context,
            group.provenance,
            tuple(
                ChunkSample(line.chunk, line.prefix, line.seconds, line.first_kv_s, line.alone, line.layers)
                for line in timed.chunks
                if not line.warmup
            ),
            tuple(LinkSample(line.nbytes, line.seconds) for line in timed.links if not line.warmup),
        )
    profile.save(options.out)
    if options.format == "json":
        print_json({"out": options.out, "profile": profile})
        return
    _show(options, group, profile)


def _show(options: argparse.Namespace, group: RankGroup, profile: Profile) -> None:
    from kvr_partition.cli.show import print_table

    cost = profile.cost
    print(f"\n{group.geometry.name} on {group.ranks} {group.backend} ranks, up to {options.context} tokens")
    print(f"{weights_line(group.weights)}\n")
    print_table(
        ["per chunk", "per token", "per own pair", "per prefix pair", "before KV"],
        [
            [
                f"{cost.fixed_s * 1e3:.3g} ms",
                f"{cost.per_token_s * 1e6:.3g} µs",
                f"{cost.per_own_pair_s * 1e9:.3g} ns",
                f"{cost.per_prefix_pair_s * 1e9:.3g} ns",
                f"{cost.kv_share:.0%}",
            ]
        ],
    )
    print()
    rows = []
    for rank, speed in enumerate(profile.speeds):
        link = profile.links[rank] if rank < len(profile.links) else None
        carries = "" if link is None or not link.seconds_per_byte else f"{1e-9 / link.seconds_per_byte:.3g} GB/s"
        rows.append([str(rank), f"{speed:.3f}", "" if link is None else f"{link.latency_s * 1e6:.3g} µs", carries])
    print_table(["rank", "speed", "latency to the next", "bandwidth"], rows)
    if cost.size_effects:
        low, high = (f"{size} tokens {factor - 1:+.1%}" for size, factor in _extremes(cost.size_effects))
        print(f"\nAgainst a smooth cost, chunk sizes take {low} to {high} ({len(cost.size_effects)} timed)")
    print(f"\nWritten to {options.out}. Next:")
    print(f"  kvr-partition compare --context {options.context} --ranks {group.ranks} "
          f"--dtype {group.dtype} --backend simulate --profile {options.out}")  # fmt: skip


def _extremes(steps: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], tuple[int, float]]:
    """The sizes that are liked the most and the least."""
    ordered = sorted(steps, key=lambda step: step[1])
    return ordered[0], ordered[-1]
