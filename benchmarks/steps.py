"""What a search gains where kernels like some chunk sizes better than their neighbours.

    python benchmarks/steps.py --out data/simulated/search-steps.json

The truth has each cost term up to 15% off and every multiple of 128 tokens a step of its own, 3.5% of spread, as
ranks on an H100 have been seen to have; three samples a measurement with 0.3% of noise. The informed sampler, told
all steps by a profile that is 1% off, learning those that it meets, and not believing in steps, against the best
split of the truth without its steps, which balancing can reach.

Then predictors: contexts of SEARCHED are searched and trained on, and those of HELD_OUT predicted with the steps
of the chunk sizes that were met, by boundaries in whole quanta alone, and by linear interpolation. Regret is
against the best split that exchanging tokens finds on the truth, from each of these and the best without steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from joblib import Parallel, delayed
from msgspec.structs import replace

from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate, ttft
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Measurement, RankTimes, Sample, median
from kvr_partition.partition import Partition
from kvr_partition.search import compute_times, search
from kvr_partition.search.local_search import descent
from kvr_partition.training import Row
from kvr_partition.training.evaluation import decoded
from kvr_partition.training.features import Query
from kvr_partition.training.regressors import Corrected, Interpolation

CONTEXT, QUANTUM = 16384, 128
SEARCHED, HELD_OUT = (4096, 8192, 12288, 16384), (6144, 10240, 14336)
NOISE, STEPS, PROFILE_NOISE = 0.003, 0.035, 0.01
KINDS = ("profiled", "met", "smooth")
STEP_SPREADS = compute_times.STEP_SPREADS


class Rugged:
    """What is told, and a truth with steps, measured with noise."""

    def __init__(self, ranks: int, seed: int, profiled: bool = False) -> None:
        draw = random.Random(f"{ranks} {seed}")
        self._noise = random.Random(f"noise {ranks} {seed}")
        # The order of a 7B model on one GPU that all ranks share.
        cost = ChunkCost(1e-3, 2.8e-5 * ranks, 1.9e-9 * ranks, 2.2e-9 * ranks, 0.3)
        self.prior = Machine(cost, 32, 16384, link=LinkCost.of(2e12, 1e-5))
        true = ChunkCost.of_terms(term * (1 + draw.uniform(-0.15, 0.15)) for term in cost.terms)
        self.smooth = replace(self.prior, cost=true)
        sizes = range(QUANTUM, CONTEXT + 1, QUANTUM)
        steps = tuple((size, math.exp(draw.gauss(0.0, STEPS))) for size in sizes)
        self.truth = replace(self.prior, cost=replace(true, size_effects=steps))
        if profiled:
            timed = tuple((size, step * math.exp(draw.gauss(0.0, PROFILE_NOISE))) for size, step in steps)
            self.prior = replace(self.prior, cost=replace(cost, size_effects=timed))
        self.measured = 0

    def measure(self, partition: Partition) -> Measurement:
        """Three samples."""
        self.measured += 1
        timeline = simulate(partition, self.truth)

        def noisy(seconds: float) -> float:
            return seconds * self._noise.gauss(1.0, NOISE)

        samples = [
            Sample(
                noisy(timeline.ttft_s),
                tuple(
                    RankTimes(noisy(rank.compute_s), noisy(rank.wait_s), noisy(rank.transfer_s))
                    for rank in timeline.ranks
                ),
                0,
            )
            for _ in range(3)
        ]
        return Measurement("kvr", partition.sizes, tuple(samples), "cap")

    def ttft_s(self, partition: Partition) -> float:
        """True TTFT in seconds."""
        return simulate(partition, self.truth).ttft_s


def race(ranks: int, seed: int, kind: str, budget: int) -> dict[str, Any]:
    """One search: TTFT over that of the best split of the smooth truth."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    compute_times.STEP_SPREADS = (0.0,) if kind == "smooth" else STEP_SPREADS
    land = Rugged(ranks, seed, kind == "profiled")
    found = search(
        land.measure,
        CONTEXT,
        ranks,
        budget,
        machine=land.prior,
        quantum=QUANTUM,
        confirm=lambda splits: [land.measure(split) for split in splits],
    )
    balanced_s = land.ttft_s(best_split(CONTEXT, ranks, land.smooth, QUANTUM))
    return {
        "ranks": ranks,
        "seed": seed,
        "kind": kind,
        "measured": len(found.trials),
        "over_balanced": land.ttft_s(found.best) / balanced_s - 1,
        "even_over_balanced": land.ttft_s(Partition.even(CONTEXT, ranks)) / balanced_s - 1,
    }


def predicted(ranks: int, seed: int, budget: int, profiled: bool) -> list[dict[str, Any]]:
    """Regret of each way to predict, on each context held out."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A race may have changed it in this process.
    compute_times.STEP_SPREADS = STEP_SPREADS
    land = Rugged(ranks, seed, profiled)
    rows = []
    for context in SEARCHED:
        found = search(land.measure, context, ranks, budget, machine=land.prior, quantum=QUANTUM)
        trials = tuple(trial.measurement for trial in found.trials)
        told = land.prior.filed(ranks)
        rows.append(
            Row("simulated", "a GPU", "a model", None, "chain", ranks, context, 0, told, found.best.sizes, trials)
        )
    corrected, interpolation = Corrected().fit(rows), Interpolation().fit(rows)

    def seconds(sizes: Any) -> Any:
        return ttft(sizes, land.truth)

    results = []
    for context in HELD_OUT:
        query = dataclasses.replace(Query.of(rows[0]), context=context)
        splits = {"profiled" if profiled else "met": decoded(corrected, query, QUANTUM)}
        if not profiled:
            splits |= {
                "smooth": Partition.from_cuts(corrected.cuts(query), context, QUANTUM),
                "interpolated": Partition.from_cuts(interpolation.cuts(query), context, QUANTUM),
            }
        starts = [*splits.values(), best_split(context, ranks, land.smooth, QUANTUM)]
        best_s = min(float(seconds(descent(np.array(start.sizes), QUANTUM, seconds)[-1:])[0]) for start in starts)
        regret = {name: land.ttft_s(one) / best_s - 1 for name, one in splits.items()}
        results.append({"ranks": ranks, "seed": seed, "context": context, "regret": regret})
    return results


def main() -> None:
    """Run all races."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    races = Parallel(n_jobs=options.jobs)(
        delayed(race)(ranks, seed, kind, options.budget)
        for kind in KINDS
        for ranks in (2, 4, 8)
        for seed in range(options.seeds)
    )
    summary = []
    for kind in KINDS:
        for ranks in (2, 4, 8):
            runs = [run for run in races if (run["ranks"], run["kind"]) == (ranks, kind)]
            gains = [run["over_balanced"] for run in runs]
            summary.append(
                {
                    "ranks": ranks,
                    "kind": kind,
                    "over_balanced_mean": sum(gains) / len(gains),
                    "over_balanced_best": min(gains),
                    "over_balanced_worst": max(gains),
                    "measured_median": median([run["measured"] for run in runs]),
                }
            )
            print(
                f"{ranks} ranks, {kind}: {summary[-1]['over_balanced_mean']:+.2%} "
                f"({min(gains):+.2%} to {max(gains):+.2%}), measured {summary[-1]['measured_median']}"
            )
    predictions = [
        one
        for each in Parallel(n_jobs=options.jobs)(
            delayed(predicted)(ranks, seed, options.budget, profiled)
            for profiled in (True, False)
            for ranks in (2, 4, 8)
            for seed in range(options.seeds)
        )
        for one in each
    ]
    regrets = []
    for ranks in (2, 4, 8):
        for method in (*KINDS, "interpolated"):
            mine = [
                prediction
                for prediction in predictions
                if prediction["ranks"] == ranks and method in prediction["regret"]
            ]
            losses = [one["regret"][method] for one in mine]
            mean, most = sum(losses) / len(losses), max(losses)
            regrets.append({"ranks": ranks, "method": method, "mean": mean, "max": most})
            print(f"{ranks} ranks, predicted by {method}: regret {mean:.2%}, at most {most:.2%}")
    if options.out:
        document = {
            "command": " ".join(["python benchmarks/steps.py", *sys.argv[1:]]),
            "noise": NOISE,
            "steps": STEPS,
            "summary": summary,
            "searches": races,
            "predictors": regrets,
            "predictions": predictions,
        }
        options.out.write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
