"""Find the best partition of each context by measuring, and write them as a table.

With no options it measures the bundled quick start model on two ranks of this machine. The same command
goes on where an earlier one stopped, however it stopped.

Examples:
  kvr-partition search
  kvr-partition search --model my-llama --ranks 4 --contexts 4096:16384:4096 --budget 20
  kvr-partition search --model my-llama --ranks 4 --contexts 4096..65536 --until 0.5%
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvr_partition.cli.options import (
    add_output,
    add_past,
    add_ranks,
    make_group,
    need_at_least,
    parse_contexts,
    parse_range,
    parse_share,
)
from kvr_partition.errors import UnsupportedError
from kvr_partition.partition import Partition
from kvr_partition.provenance import weights_line

if TYPE_CHECKING:
    from kvr_partition.cli.comparison import Comparison
    from kvr_partition.cli.outdir import OutDir
    from kvr_partition.machine.profile import Profile
    from profiler.covering import Covered
    from profiler.ranks import RankGroup
    from profiler.session import ContextResult, Session

QUICKSTART_CONTEXTS = "512,1024,2048"
QUICKSTART_HELD_OUT = "1536"

UNTIL = "1%"
"""Regret that a range of contexts is searched down to."""

USUALLY_SEARCHED = 5
"""Contexts of a range, as far as a progress bar can know."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``search``."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--contexts",
        help=f"prompt lengths: 4096,8192 or start:stop:step (default {QUICKSTART_CONTEXTS}, and "
        f"{QUICKSTART_HELD_OUT} held out to try KVR-P on); or 4096..65536: as many in between as --until takes",
    )
    group.add_argument(
        "--until",
        metavar="PERCENT",
        help=f"of a range: search contexts until each, left out, would lose no more than this (default {UNTIL}%)",
    )
    group.add_argument(
        "--most-contexts", type=int, help="of a range: search no more than so many contexts (default 12)"
    )
    group.add_argument("--held-out", help="prompt lengths to predict and time, not to search")
    group.add_argument(
        "--budget",
        type=int,
        help="partitions to measure per context (default 8; fewer, at least 4, where they take long)",
    )
    group.add_argument(
        "--sampler",
        default="informed",
        help="informed (corrects a cost model; the default), hierarchical (the paper's grid), or one of Optuna's; "
        "a word that is none lists all",
    )
    add_past(group)
    group.add_argument(
        "--quantum",
        type=int,
        help="cut only at multiples of so many tokens (default: fine steps on CPUs, tiles of 128 on GPUs)",
    )
    group.add_argument(
        "--samples",
        type=int,
        help="most samples per candidate (default 8 on CPU; on GPU 40, or as many as take 3 s)",
    )
    group.add_argument("--out", metavar="FOLDER", help="results (default kvr-runs/MODEL-RANKSxBACKEND-DTYPE)")
    group.add_argument(
        "--storage",
        metavar="URL",
        help="study in sqlite:///FILE, postgresql://..., journal:FILE or grpc://HOST:PORT, shared by several "
        "runs, each with an --out of its own (default: study.db in --out)",
    )
    again = group.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with what is in --out (the default)")
    again.add_argument("--fresh", action="store_true", help="set aside what is in --out and begin anew")
    add_ranks(parser)
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """The main job."""
    contexts, held_out, until = _contexts(options)

    from kvr_partition.machine.profile import load_profile
    from kvr_partition.search.samplers import check_sampler

    check_sampler(options.sampler)
    costs: Profile | None = None
    if options.profile is not None and options.backend != "simulate":
        costs, options.profile = load_profile(options.profile), None
    group = make_group(options)
    for context in [*contexts, *held_out]:
        group.check_context(context, options.past)

    import optuna

    from kvr_partition.cli.outdir import OutDir
    from kvr_partition.cli.show import Progress
    from profiler.covering import MOST_CONTEXTS, cover

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = Path(options.out) if options.out else default_out(group)
    with OutDir(path, fresh=options.fresh) as out:
        out.check_request(group)
        session = _session(options, group, out, contexts, costs)
        work = session.work(held_out) * (1 if until is None else USUALLY_SEARCHED / len(contexts))
        covered = None
        with Progress(work, options.quiet) as progress, group:
            session.listener = progress
            if out.moved_to is not None:
                progress.say(f"set aside what was in {path} as {out.moved_to}")
            if out.log.repaired:
                progress.say(f"{out.log_path}: a torn last line was set aside in {out.log_path.name}.torn")
            progress.doing(f"starting {group.ranks} {group.backend} ranks of {group.geometry.name}")
            out.check_conditions(group.provenance)
            if until is not None:
                most = options.most_contexts or MOST_CONTEXTS
                covered = cover(session, contexts[0], contexts[-1], until, most)
                session.contexts = ()
            if until is None or held_out:
                session.run(held_out)
            results = sorted(session.results, key=lambda result: (result.held_out, result.context))
    _report(options, out, group, results, session.costs_known, covered)


def _session(
    options: argparse.Namespace,
    group: RankGroup,
    out: OutDir,
    contexts: Sequence[int],
    costs: Profile | None,
) -> Session:
    from profiler.measure import SamplingPlan
    from profiler.session import Session

    return Session(
        group,
        out.log,
        contexts,
        past=options.past,
        budget=options.budget,
        sampler=options.sampler,
        quantum=options.quantum,
        plan=SamplingPlan.at_most(options.samples, group.backend),
        storage=options.storage or out.study_url,
        shared=options.storage is not None,
        seed=options.seed,
        profile=costs,
        table=out.table,
        on_table=out.save,
    )


def _contexts(options: argparse.Namespace) -> tuple[list[int], list[int], float | None]:
    """Contexts to search and to hold out, once all numbers make sense; of a range its ends, and what to reach.

    Raises:
        UnsupportedError: what is asked of a range without one, or numbers that make no sense.
    """
    need_at_least("ranks", options.ranks, 2)
    for name, least in (("budget", 1), ("samples", 1), ("quantum", 1), ("most_contexts", 3)):
        if getattr(options, name) is not None:
            need_at_least(name.replace("_", "-"), getattr(options, name), least)
    ends = parse_range(options.contexts or "")
    if ends is None and (options.until is not None or options.most_contexts is not None):
        raise UnsupportedError("--until and --most-contexts are for a range, like --contexts 4096..65536")
    until = None if ends is None else parse_share(UNTIL if options.until is None else options.until, "--until")
    contexts = list(ends) if ends is not None else parse_contexts(options.contexts or QUICKSTART_CONTEXTS)
    held_out = options.held_out or (QUICKSTART_HELD_OUT if options.contexts is None else None)
    others = parse_contexts(held_out) if held_out else []
    for context in [*contexts, *others]:
        Partition.even(context, options.ranks, quantum=options.quantum or 1, past=options.past)
    return contexts, others, until


def default_out(group: RankGroup) -> Path:
    """Where results go unless said otherwise."""
    name = f"{group.geometry.name}-{group.ranks}x{group.backend}-{group.dtype}"
    usual = ("auto",) if group.backend == "cuda" else ("auto", "chain")
    if group.wanted_topology not in usual:
        name += f"-{group.wanted_topology}"
    if group.links != "auto":
        name += f"-{group.links}"
    if group.layers != "auto":
        name += f"-{group.layers}"
    if group.bandwidth is not None:
        name += f"-{group.bandwidth / 1e9:g}GBs"
    return Path("kvr-runs") / name


def _report(
    options: argparse.Namespace,
    out: OutDir,
    group: RankGroup,
    results: Sequence[ContextResult],
    costs_known: bool,
    covered: Covered | None,
) -> None:
    from kvr_partition.cli.comparison import Comparison, together
    from kvr_partition.cli.show import print_findings, print_json, print_table

    # One context may be searched and held out both.
    compared = [
        Comparison(
            result.named,
            ranks=group.ranks,
            shared=group.backend == "sm",
            windows=group.windows,
            depth=group.resolved_depth,
        )
        for result in results
    ]
    if options.format == "json":
        print_json(
            {
                "out": str(out.path),
                "weights": group.weights,
                "files": {
                    "table": str(out.table_path),
                    "measurements": str(out.log_path),
                    "study": str(out.path / "study.db"),
                },
                "covered": covered,
                "contexts": list(map(_facts, results, compared)),
            }
        )
        return
    print(f"\n{group.geometry.name} on {group.ranks} {group.backend} ranks, {group.dtype}")
    print(f"{weights_line(group.weights)}\n")
    labelled = [
        (f"{result.context}{' (held out)' if result.held_out else ''}", comparison)
        for result, comparison in zip(results, compared, strict=True)
    ]
    print_table(*together(labelled), left=2)
    print_findings([(result.context, result.findings) for result in results])
    for result in results:
        if result.stopped == "enough":
            print(
                f"\nContext {result.context} was searched no further than {result.measured} partitions: "
                "measurements contradict its costs. Once that is mended, search it anew with --fresh."
            )
    if covered is not None:
        _say_how_sure(covered)
    _say_what_next(options, out, results[-1].context, costs_known)


def _facts(result: ContextResult, comparison: Comparison) -> dict[str, Any]:
    return {
        "context": result.context,
        "held_out": result.held_out,
        "partitions_measured": result.measured,
        "stopped": result.stopped,
        "findings": result.findings,
        "methods": comparison.facts(),
    }


def _say_how_sure(covered: Covered) -> None:
    """What searching a range came to, and what it cost."""
    count, lost = len(covered.contexts), covered.regret
    print(f"\n{covered.low} to {covered.high} tokens: searched {', '.join(map(str, covered.contexts))} "
          f"({count} contexts, {covered.measured} partitions, {covered.seconds:.0f} s).")  # fmt: skip
    if lost is not None:
        print(f"Left out, each would lose {lost.mean:.2%} on average, {lost.max:.2%} at most ({covered.method}); "
              f"asked for: {covered.until:.2%}.")  # fmt: skip
    if not covered.reached:
        print(f"It ended there since {covered.why}.")


def _say_what_next(options: argparse.Namespace, out: OutDir, example: int, costs_known: bool) -> None:
    """Which files there are, and the commands that go on from them."""
    print(f"\nFiles in {out.path}:")
    print("  table.json          the partitions found; serving code loads this")
    print("  measurements.jsonl  every sample")
    print("  study.db            the Optuna study; the same command goes on from it")
    program = "kvr-partition" if sys.argv[0].endswith("kvr-partition") else "python -m kvr_partition"
    print("\nNext:")
    print(f"  {program} predict --table {out.table_path} --context {example}")
    print(f"  {program} export {out.table_path} --format markdown")
    print(f"  {program} generate{_same_group(options)} --table {out.table_path} --context {example}")
    if costs_known:
        print(f"  {program} train {out.path} --out my.predictor.json")
    print(f"  in Python: from kvr_partition import load; load({str(out.table_path)!r}).lookup({example})")
    if options.model is None:
        print("Your own model:  kvr-partition search --model FOLDER --ranks N --contexts 4096,8192")


def _same_group(options: argparse.Namespace) -> str:
    """Arguments with which another command runs the same ranks."""
    parser = argparse.ArgumentParser()
    add_ranks(parser)
    usual = vars(parser.parse_args([]))
    return "".join(
        f" --{name} {shlex.quote(str(getattr(options, name)))}"
        for name, value in usual.items()
        if getattr(options, name) != value
    )
