"""What a predictor says it loses on contexts that nobody searched, and what it does lose; simulated.

    python -m benchmarks.stated_regret --out data/simulated/stated-regret.json

On each landscape (benchmarks/landscapes.py) some contexts are searched with noise, and a predictor is trained on
them as on hardware, without the truth. It then predicts contexts between the searched ones, and the searched ones
themselves, and the truth says what that loses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
from joblib import Parallel, delayed

from benchmarks.landscapes import KINDS, Landscape, Measured, landscapes
from kvr_partition.cli.show import print_table
from kvr_partition.measurement import median
from kvr_partition.search import search
from kvr_partition.training import Row, train

SHARES = (0.5, 0.71, 1.0, 1.41, 2.0)
"""Contexts that are searched, as multiples of a landscape's own."""

UNSEEN = (0.6, 0.85, 1.2, 1.7)
"""Contexts that are predicted."""

MEASURED = {"quiet": (0.005, 3), "noisy": (0.02, 1)}
"""Standard deviation of a sample as a share, and samples of each measurement."""

UNLIKE = ("valley",)
"""Kinds that are made for one context."""


def at(landscape: Landscape, share: float) -> Landscape:
    """The same machine with another context, a multiple of 64 tokens."""
    return dataclasses.replace(landscape, context=round(landscape.context * share / 64) * 64)


def searched(landscape: Landscape, seed: int, noise: float, samples: int, budget: int) -> Row:
    """The row that a search makes, told nothing of the truth."""
    measure = Measured(landscape, seed, noise, samples)
    found = search(
        measure, landscape.context, landscape.ranks, budget, machine=landscape.fitted, quantum=landscape.quantum
    )
    return Row(
        origin="measured",
        hardware=landscape.kind,
        model=landscape.name,
        bandwidth=None,
        topology="chain",
        ranks=landscape.ranks,
        context=landscape.context,
        past=0,
        prior=landscape.fitted.filed(landscape.ranks),
        sizes=found.best.sizes,
        trials=tuple(measure.asked),
    )


def judged(landscape: Landscape, measured: str, seed: int, budget: int) -> dict[str, Any]:
    """One predictor: what it states, and what it loses."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    began = time.monotonic()
    rows = [searched(at(landscape, share), seed, *MEASURED[measured], budget) for share in SHARES]
    searched_s, began = time.monotonic() - began, time.monotonic()
    predictor = train(rows)
    trained_s = time.monotonic() - began

    def lost(share: float) -> float:
        there = at(landscape, share)
        found = predictor.predict(there.context).partition
        taken = float(there.ttft_s([found.sizes])[0])
        return taken / min(taken, there.best_s()) - 1

    stated = predictor.explain(rows[2].context).regret
    assert stated is not None
    return {
        "kind": landscape.kind,
        "landscape": landscape.name,
        "measured": measured,
        "seed": seed,
        "method": predictor.training.method,
        "stated_mean": stated.mean,
        "stated_p95": stated.p95,
        "stated_max": stated.max,
        "cases": stated.cases,
        "unseen": [round(lost(share), 6) for share in UNSEEN],
        "searched": [round(lost(share), 6) for share in SHARES],
        "searched_s": searched_s,
        "trained_s": trained_s,
    }


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether what is stated holds, and how closely."""
    unseen = sorted(loss for run in runs for loss in run["unseen"])
    return {
        "predictors": len(runs),
        "unseen_mean": sum(unseen) / len(unseen),
        "unseen_p90": unseen[int(0.9 * len(unseen))],
        "unseen_max": unseen[-1],
        "searched_mean": sum(loss for run in runs for loss in run["searched"]) / len(runs) / len(SHARES),
        "stated_mean": sum(run["stated_mean"] for run in runs) / len(runs),
        "stated_max_median": median([run["stated_max"] for run in runs]),
        "above_stated_max": sum(loss > run["stated_max"] for run in runs for loss in run["unseen"]) / len(unseen),
    }


def main() -> None:
    """Search, train, predict and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(kind for kind in KINDS if kind not in UNLIKE))
    parser.add_argument("--measured", default=",".join(MEASURED))
    parser.add_argument("--every", type=int, default=1, help="take each so many-th landscape of a kind")
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kinds, measured = options.kinds.split(","), options.measured.split(",")
    runs = Parallel(n_jobs=options.jobs)(
        delayed(judged)(land, how, 0, options.budget)
        for kind in kinds
        for land in list(landscapes(kind))[:: options.every]
        for how in measured
    )
    summary = [
        {"kind": kind, "measured": how, **summed_up(some)}
        for kind in [*kinds, "all"]
        for how in measured
        if (some := [run for run in runs if kind in ("all", run["kind"]) and run["measured"] == how])
    ]
    print_table(
        ["kind", "measured", "lost", "p90", "max", "searched", "stated mean", "stated max", "above it"],
        [
            [one["kind"], one["measured"], *(f"{one[name]:.2%}" for name in (
                "unseen_mean", "unseen_p90", "unseen_max", "searched_mean", "stated_mean", "stated_max_median",
                "above_stated_max"))]
            for one in summary
        ],
        left=2,
    )  # fmt: skip
    for step in ("searched", "trained"):
        print(f"{step} in {sum(run[f'{step}_s'] for run in runs):.0f} s")
    if options.out:
        document = {
            "command": " ".join(["python -m benchmarks.stated_regret", *sys.argv[1:]]),
            "noise_and_samples": MEASURED,
            "summary": summary,
            "predictors": runs,
        }
        options.out.write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
