"""How many measurements each sampler needs on simulated landscapes whose truth differs from the fitted model.

    python benchmarks/search.py --out data/simulated/search.json

The truth of a landscape has each cost term up to 15% off, a slow rank and a slow link, and every time is
measured with 2% noise, one sample a measurement. Regret is that of the partition a search would name after
each measurement, against the best that any search or the solver of the truth found.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from joblib import Parallel, delayed
from msgspec.structs import replace

from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Measurement, RankTimes, Sample, median
from kvr_partition.partition import Partition
from kvr_partition.search import SAMPLERS, Seed, search
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.space import default_quantum

LAYERS = 32
NOISE = 0.02


@dataclass(frozen=True)
class Landscape:
    """What a search is told, and what is true."""

    name: str
    context: int
    ranks: int
    fitted: Machine
    truth: Machine


def landscapes(repeats: int) -> list[Landscape]:
    """Ranks × bandwidths × kinds of attention, contexts in turn."""
    found = []
    contexts = (4096, 8192, 16384, 32768)
    for repeat in range(repeats):
        for ranks in (2, 3, 4, 6, 8):
            for bandwidth in (300e9, 10e9, 1e9):
                for kind, entry_bytes in (("mha", 16384), ("gqa", 4096)):
                    context = contexts[(len(found) + repeat) % 4]
                    name = f"{ranks} ranks, {bandwidth / 1e9:g} GB/s, {kind}, {context}, {repeat}"
                    found.append(_landscape(name, context, ranks, bandwidth, entry_bytes))
    return found


def _landscape(name: str, context: int, ranks: int, bandwidth: float, entry_bytes: int) -> Landscape:
    # The order of a 7B model on one large GPU.
    cost = ChunkCost(1e-3, 2.2e-5, 2e-9, 1.9e-9, 0.25)
    fitted = Machine(cost, LAYERS, entry_bytes, link=LinkCost.of(bandwidth, 2e-5))
    draw = random.Random(name)

    def off(share: float = 0.15) -> float:
        return 1 + draw.uniform(-share, share)

    truth = ChunkCost.of_terms(term * off() for term in cost.terms)
    speeds = [off(0.03) for _ in range(ranks)]
    speeds[draw.randrange(ranks)] *= 0.85
    rates = [bandwidth * off() for _ in range(ranks - 1)]
    rates[draw.randrange(ranks - 1)] *= 0.7
    links = tuple(LinkCost.of(rate, 2e-5 * off()) for rate in rates)
    return Landscape(name, context, ranks, fitted, replace(fitted, cost=truth, speeds=tuple(speeds), link=links))


class Measured:
    """The truth, measured with noise."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        self._truth = landscape.truth
        self._random = random.Random(f"{landscape.name} {seed}")
        self.asked: list[Measurement] = []

    def __call__(self, partition: Partition) -> Measurement:
        timeline = simulate(partition, self._truth)

        def noisy(seconds: float) -> float:
            return seconds * max(0.5, self._random.gauss(1.0, NOISE))

        ranks = tuple(
            RankTimes(noisy(rank.compute_s), noisy(rank.wait_s), noisy(rank.transfer_s)) for rank in timeline.ranks
        )
        sample = Sample(noisy(timeline.ttft_s), ranks, 0)
        self.asked.append(Measurement("kvr", partition.sizes, (sample,), "cap"))
        return self.asked[-1]


def named_after(landscape: Landscape, sampler: str, asked: Sequence[Measurement]) -> Partition:
    """What a search of this sampler would name as the best after these measurements."""
    if sampler == "informed":
        return Beliefs.after(landscape.fitted, landscape.context, asked).ranked()[0].partition
    return min(asked, key=lambda one: one.ttft_s).partition


def race(landscape: Landscape, sampler: str, budget: int, seed: int) -> dict[str, Any]:
    """One search: the true TTFT of what it would name after each measurement."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    measure = Measured(landscape, seed)
    quantum = default_quantum(landscape.context, landscape.ranks)
    solved = best_split(landscape.context, landscape.ranks, landscape.fitted, quantum=quantum)
    found = search(
        measure,
        landscape.context,
        landscape.ranks,
        budget,
        # All begin with the fitted model's best split, so that what is compared is the sampler.
        seeds=lambda: [] if sampler == "hierarchical" else [Seed("solved", solved)],
        sampler=sampler,
        machine=landscape.fitted,
        quantum=quantum,
        seed=seed,
    )
    named = [named_after(landscape, sampler, measure.asked[: n + 1]) for n in range(len(measure.asked))]
    return {
        "landscape": landscape.name,
        "sampler": sampler,
        "seed": seed,
        "stopped": found.stopped,
        "ttft_s": [simulate(one, landscape.truth).ttft_s for one in named],
    }


def main() -> None:
    """Run all races."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=40, help="measurements of the other samplers")
    parser.add_argument("--informed-budget", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="truths for each kind of landscape")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lands = landscapes(options.repeats)
    samplers = options.samplers.split(",")
    races = Parallel(n_jobs=options.jobs)(
        delayed(race)(land, name, options.informed_budget if name == "informed" else options.budget, seed)
        for land in lands
        for name in samplers
        for seed in range(options.seeds)
    )
    best = {}
    for land in lands:
        quantum = default_quantum(land.context, land.ranks)
        solved = simulate(best_split(land.context, land.ranks, land.truth, quantum=quantum), land.truth).ttft_s
        best[land.name] = min(
            [solved, *(one for run in races if run["landscape"] == land.name for one in run["ttft_s"])]
        )
    summary = {}
    for name in samplers:
        runs = [run for run in races if run["sampler"] == name]
        for run in runs:
            run["regret"] = [round(one / best[run["landscape"]] - 1, 5) for one in run.pop("ttft_s")]
            # Reached for good: a search names what it holds best, and may be wrong again later.
            beyond = [at for at, regret in enumerate(run["regret"]) if regret > 0.01]
            run["within_1_percent_after"] = (
                None if beyond and beyond[-1] + 1 == len(run["regret"]) else (beyond[-1] + 2 if beyond else 1)
            )
        needed = [run["within_1_percent_after"] or float("inf") for run in runs]
        last = [run["regret"][-1] for run in runs]
        summary[name] = {
            "searches": len(runs),
            "reached": sum(one != float("inf") for one in needed),
            "measurements_median": _finite(median(needed)),
            "measurements_worst": _finite(max(needed)),
            "measured_median": median([len(run["regret"]) for run in runs]),
            "regret_mean": sum(last) / len(last),
            "regret_max": max(last),
        }
        one = summary[name]
        print(
            f"{name:>13}: within 1% in {one['reached']} of {one['searches']}, measurements median "
            f"{one['measurements_median']} worst {one['measurements_worst']}, measured {one['measured_median']}, "
            f"regret at the end mean {one['regret_mean']:.2%} max {one['regret_max']:.2%}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "command": " ".join(["python benchmarks/search.py", *sys.argv[1:]]),
            "landscapes": len(lands),
            "noise": NOISE,
            "samplers": summary,
            "searches": sorted(races, key=lambda run: (run["sampler"], run["landscape"], run["seed"])),
        }
        options.out.write_text(json.dumps(document, indent=None, separators=(",", ":")) + "\n")


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value


if __name__ == "__main__":
    main()
