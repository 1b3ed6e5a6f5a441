"""How much of what ranks take their chunk sizes explain, and how much of that a few layers of each size tell.

    python benchmarks/size_steps.py --out data/h100-sxm/size-steps.json

For each log of benchmarks/predict_real.py below: a smooth cost is fitted to what every rank of every measurement
computed, with a speed of each rank and a drift of each measurement; what is left is a standard deviation. Then the
steps are added that a few layers of each size told, those of the log itself or of benchmarks/chunk_sizes.py run
in another process, with one weight for all; then a free step of each size instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from kvr_partition.machine.cost import ChunkCost, size_effects_of
from kvr_partition.measurement import median
from profiler import MeasurementLog
from profiler.sizes import with_size_effects

DATA = Path(__file__).resolve().parents[1] / "data" / "h100-sxm"

CASES = (
    ("llama-7b/profiled-sm-8.jsonl", None),
    ("llama-3.1-8b/profiled-sm-4.jsonl", None),
    ("falcon-7b/profiled-sm-4.jsonl", None),
    ("llama-7b/predict-sm-8.jsonl", "llama-7b/chunk-sizes-sm-8.json"),
    ("llama-7b/predict-sm-8-three-contexts.jsonl", "llama-7b/chunk-sizes-sm-8.json"),
    ("llama-7b/predict-sm-4.jsonl", "llama-7b/chunk-sizes-sm-4.json"),
    ("llama-3.1-8b/predict-sm-4.jsonl", "llama-3.1-8b/chunk-sizes-sm-4.json"),
    ("falcon-7b/predict-sm-4.jsonl", "falcon-7b/chunk-sizes-sm-4.json"),
)
"""A log, and where sizes were timed if not in it."""


def explained(log_file: str, sizes_file: str | None) -> dict[str, Any]:
    """Standard deviations of what is left, as shares."""
    with MeasurementLog(DATA / log_file) as log:
        found = [
            measurement for measurement in log.measurements() if measurement.ok and measurement.method == "kvr"
        ]
        told = dict(with_size_effects(ChunkCost(0.0, 1.0, 0.0, 0.0), log).size_effects)
    if sizes_file is not None:
        document = json.loads((DATA / sizes_file).read_text())
        seconds = document["seconds"]["0"].items()
        told = dict(size_effects_of([(int(size), min(sum(one) for one in rounds)) for size, rounds in seconds]))
    times = [
        (at, rank, size, start, median([sample.ranks[rank].compute_s for sample in one.samples]))
        for at, one in enumerate(found)
        for rank, (size, start) in enumerate(zip(one.sizes, one.partition.starts, strict=True))
        if size in told
    ]
    at, rank, size, start, took = (np.array(column) for column in zip(*times, strict=True))
    terms = np.stack([np.ones(len(took)), size, size * size / 2, size * start], axis=1)
    prices, _ = nnls(terms / took[:, None], np.ones(len(took)))
    smooth = terms * prices
    left = np.log(took) - np.log(smooth.sum(axis=1))
    shares = smooth / smooth.sum(axis=1, keepdims=True)
    basis = [shares, np.eye(at.max() + 1)[at], np.eye(rank.max() + 1)[rank]]
    met = np.unique(size)
    told_steps = np.log([told[int(one)] for one in size])[:, None]

    def residual(*more: Any) -> tuple[float, float]:
        columns = np.concatenate([*basis, *more], axis=1)
        solution, _, known, _ = np.linalg.lstsq(columns, left, rcond=None)
        off = left - columns @ solution
        return float(np.sqrt((off**2).sum() / (len(left) - known))), float(solution[-1])

    with_told, weight = residual(told_steps)
    return {
        "log": log_file,
        "sizes": sizes_file or log_file,
        "times": len(took),
        "sizes_met": len(met),
        "smooth": residual()[0],
        "told": with_told,
        "weight": weight,
        "free": residual((size[:, None] == met[None, :]).astype(float))[0],
    }


def main() -> None:
    """Fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = [explained(*case) for case in CASES]
    for result in results:
        print(
            f"{result['log']}, sizes of {result['sizes']}: smooth {result['smooth']:.2%}, "
            f"told {result['told']:.2%} (weight {result['weight']:.2f}), free {result['free']:.2%}"
        )
    if options.out:
        document = {"command": " ".join(["python benchmarks/size_steps.py", *sys.argv[1:]]), "cases": results}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
