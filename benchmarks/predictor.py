"""What each way to predict loses on contexts, pasts, models, bandwidths and hardware it has not seen; simulated.

    python benchmarks/predictor.py --out data/simulated/predictor.json

Every landscape is searched at every context and past share, with 2% noise a measurement, on a truth that differs
from what is told (see kvr_partition/training/simulated.py). Parameters are tuned with Optuna on a third of the
landscapes, then every group is left out in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import msgspec
import optuna

from kvr_partition.cli.show import print_table
from kvr_partition.training import REGRESSORS, Dataset, evaluate, load_dataset, scores
from kvr_partition.training.dataset import digest
from kvr_partition.training.evaluation import GROUPS, tune
from kvr_partition.training.regressors import Regression, Way, boosting
from kvr_partition.training.simulated import landscapes, simulated_rows


def splines(knots: int = 4, alpha: float = 1.0) -> Any:
    """Ridge regression on splines of all features."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, SplineTransformer, StandardScaler

    return make_pipeline(
        FunctionTransformer(_with_products),
        StandardScaler(),
        SplineTransformer(knots, degree=3, extrapolation="constant"),
        Ridge(alpha),
    )


def _with_products(known: Any) -> Any:
    """What moves a boundary moves the middle ones most: every feature also times the room of its place."""
    import numpy as np

    return np.concatenate([known, known[:, 2:] * known[:, 1:2]], axis=1)


WAYS = REGRESSORS | {
    "splines": Way(
        lambda **given: Regression(lambda: splines(**given)),
        {"knots": (3, 8, False), "alpha": (1e-3, 100.0, True)},
    ),
    "boosting-on-cost-model": Way(
        lambda **given: Regression(lambda: boosting(**given), on_cost_model=True),
        {"rate": (0.02, 0.3, True), "depth": (2, 5, False), "rounds": (20, 300, False)},
    ),
}
"""The product's, and those that lost to them by an order of magnitude."""


def main() -> None:
    """Search, tune, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=1, help="rank counts of each model, hardware and bandwidth")
    parser.add_argument("--shares", default="0,0.25,0.5", help="past shares")
    parser.add_argument("--held-out", default=",".join(GROUPS))
    parser.add_argument("--trials", type=int, default=12, help="of tuning")
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--dataset", type=Path, help="keep the rows here, or use those that are there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    began = time.monotonic()
    if options.dataset is not None and options.dataset.exists():
        rows = list(load_dataset(options.dataset).rows)
    else:
        shares = [float(word) for word in options.shares.split(",")]
        rows = simulated_rows(landscapes(each=options.each), past_shares=shares, jobs=options.jobs)
        if options.dataset is not None:
            Dataset(tuple(rows)).save(options.dataset)
    machines = list(dict.fromkeys(row.machine for row in rows))
    print(f"{len(rows)} searches on {len(machines)} machines [{time.monotonic() - began:.0f} s]", flush=True)
    some = [row for row in rows if row.machine in machines[::3] and row.past == 0]
    tuned = {
        name: tune(some, name, trials=options.trials, jobs=options.jobs, ways=WAYS)
        for name, way in WAYS.items()
        if way.space
    }
    print(f"tuned: {tuned} [{time.monotonic() - began:.0f} s]", flush=True)
    outcomes = []
    for name in options.held_out.split(","):
        outcomes += evaluate(rows, tuple(WAYS), [name], tuned, options.jobs, ways=WAYS)
        print(f"{name} [{time.monotonic() - began:.0f} s]", flush=True)
    found = scores(outcomes)
    print_table(
        ["held out", "method", "cases", "mean", "p95", "max"],
        [
            [one.held_out, one.method, str(one.regret.cases), *(f"{value:.2%}" for value in
             (one.regret.mean, one.regret.p95, one.regret.max))]
            for one in found if one.ranks is None
        ],
        left=2,
    )  # fmt: skip
    if options.out:
        document = {
            "command": " ".join(["python benchmarks/predictor.py", *sys.argv[1:]]),
            "rows": len(rows),
            "machines": len(machines),
            "digest": digest(rows),
            "tuned": tuned,
            "scores": msgspec.to_builtins(found),
            "cases": [
                [
                    outcome.held_out,
                    outcome.method,
                    *outcome.row.machine,
                    outcome.row.context,
                    outcome.row.past,
                    round(outcome.regret, 6),
                ]
                for outcome in outcomes
            ],
        }
        options.out.write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
