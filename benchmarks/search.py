"""What searches have found after so many measurements, on machines that differ from what they were told.

    python -m benchmarks.search --out data/simulated/search.json

Kinds of landscapes are those of benchmarks/landscapes.py, measured quietly (0.5% noise, three samples) and
noisily (2%, one sample). Every sampler begins at the best split of the machine that was profiled, but for the
paper's grid. Beside them runs what a simple loop would do: deal tokens by how fast ranks were. Regret is the true
TTFT of the partition that a search would name after each measurement, above the best that any search or a local
search on the truth has found. A search that stops keeps its last answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from joblib import Parallel, delayed

from benchmarks.landscapes import KINDS, Landscape, Measured, landscapes
from kvr_partition.measurement import Measurement, median
from kvr_partition.partition import Partition
from kvr_partition.search import SAMPLERS, Seed, search
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.measured import rebalanced

REBALANCING = "rebalancing"
"""The loop, among the names of samplers."""

MEASURED = {"quiet": (0.005, 3), "noisy": (0.02, 1)}
"""Standard deviation of a sample, and samples of a measurement."""

AFTER = (3, 4, 6, 12)
"""Measurements after which regret is summed up, and the last one."""


def named_after(landscape: Landscape, sampler: str, asked: Sequence[Measurement]) -> Partition:
    """What a search of this sampler would name as the best after these measurements."""
    if sampler == "informed":
        return Beliefs.after(landscape.fitted, landscape.context, asked).ranked()[0].partition
    return min(asked, key=lambda one: one.ttft_s).partition


def race(landscape: Landscape, sampler: str, measured: str, budget: int, seed: int) -> dict[str, Any]:
    """One search: the true TTFT of what it would name after each measurement."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    measure, stopped = Measured(landscape, seed, *MEASURED[measured]), "budget"
    if sampler == REBALANCING:
        partition = landscape.solved
        for _ in range(budget):
            partition = rebalanced(measure(partition), landscape.quantum) or partition
    else:
        stopped = search(
            measure,
            landscape.context,
            landscape.ranks,
            budget,
            # All begin with the best split of the profile, so that what is compared is the sampler.
            seeds=lambda: [] if sampler == "hierarchical" else [Seed("solved", landscape.solved)],
            sampler=sampler,
            machine=landscape.fitted,
            quantum=landscape.quantum,
            seed=seed,
        ).stopped
    asked = measure.asked
    named = [named_after(landscape, sampler, asked[: count + 1]) for count in range(len(asked))]
    return {
        "kind": landscape.kind,
        "landscape": landscape.name,
        "measured": measured,
        "sampler": sampler,
        "seed": seed,
        "stopped": stopped,
        "ttft_s": landscape.ttft_s([one.sizes for one in named]).tolist(),
    }


def summed_up(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several searches have lost."""
    after = {count: [run["regret"][min(count, len(run["regret"])) - 1] for run in runs] for count in AFTER}
    last = [run["regret"][-1] for run in runs]
    counts = sorted(len(run["regret"]) for run in runs)
    return {
        "searches": len(runs),
        "regret_mean_after": {str(count): sum(lost) / len(lost) for count, lost in after.items()},
        "regret_mean": sum(last) / len(last),
        "regret_max": max(last),
        "within_1_percent": sum(one <= 0.01 for one in last),
        "measured_median": median(counts),
        "measured_max": counts[-1],
    }


def main() -> None:
    """Run all races."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--measured", default=",".join(MEASURED))
    parser.add_argument("--samplers", default=f"informed,{REBALANCING}", help=f"also {', '.join(SAMPLERS)}")
    parser.add_argument("--budget", type=int, default=12, help="measurements of each search")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="truths for each kind of landscape")
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lands = [land for kind in options.kinds.split(",") for land in landscapes(kind, options.repeats)]
    samplers = options.samplers.split(",")
    with Parallel(n_jobs=options.jobs) as pool:
        local = pool(delayed(Landscape.best_s)(land) for land in lands)
        races = pool(
            delayed(race)(land, name, measured, options.budget, seed)
            for land in lands
            for name in samplers
            for measured in options.measured.split(",")
            for seed in range(options.seeds)
        )
    best = {land.name: one for land, one in zip(lands, local, strict=True)}
    for run in races:
        best[run["landscape"]] = min([best[run["landscape"]], *run["ttft_s"]])
    for run in races:
        run["regret"] = [round(one / best[run["landscape"]] - 1, 5) for one in run.pop("ttft_s")]
    summary = []
    for kind in [*options.kinds.split(","), "all"]:
        for measured in options.measured.split(","):
            for name in samplers:
                runs = [run for run in races if (run["measured"], run["sampler"]) == (measured, name)]
                runs = [run for run in runs if kind in ("all", run["kind"])]
                summary.append({"kind": kind, "measured": measured, "sampler": name, **summed_up(runs)})
                _show(summary[-1])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "command": " ".join(["python -m benchmarks.search", *sys.argv[1:]]),
            "landscapes": len(lands),
            "noise_and_samples": MEASURED,
            "summary": summary,
            "searches": sorted(races, key=_place),
        }
        options.out.write_text(json.dumps(document, indent=None, separators=(",", ":")) + "\n")


def _place(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("kind", "measured", "sampler", "landscape", "seed"))


def _show(one: dict[str, Any]) -> None:
    after = "  ".join(f"{lost:7.2%}" for lost in one["regret_mean_after"].values())
    print(
        f"{one['kind']:>13} {one['measured']:>6} {one['sampler']:>12}: mean regret after {AFTER} {after}, at "
        f"the end {one['regret_mean']:.2%}, max {one['regret_max']:.2%}, within 1% {one['within_1_percent']} of "
        f"{one['searches']}, measured {one['measured_median']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
