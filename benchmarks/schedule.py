"""How many partitions a second the schedule simulates on one core, and how long the best split takes.

OMP_NUM_THREADS=1 python benchmarks/schedule.py --out data/epyc-2-cores/schedule.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate, ttft
from kvr_partition.machine.solve import balanced, best_split
from kvr_partition.measurement import median
from kvr_partition.partition import Partition

# Of the order of a 7B model on one fast GPU; speed does not depend on the values.
MACHINE = Machine(ChunkCost(2e-3, 2.8e-5, 2e-9, 2e-9, kv_share=0.25), layers=32, entry_bytes=16384)
CONTEXT = 16384


def seconds(work: object, repeats: int) -> float:
    """Median seconds of a call."""
    assert callable(work)
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes = np.random.default_rng(0).dirichlet(np.ones(8) * 20, 20_000) * CONTEXT
    rates = {}
    for topology in ("chain", "fanout"):
        machine = replace(MACHINE, link=LinkCost.of(10e9, 1e-5), topology=topology)
        ttft(sizes[:2048], machine)
        rates[topology] = len(sizes) / seconds(lambda machine=machine: ttft(sizes, machine), 5)
        print(f"{topology}: {rates[topology]:,.0f} partitions a second")
    splits = []
    for ranks in (2, 4, 8):
        for bandwidth in (300e9, 10e9, 1e9):
            machine = replace(MACHINE, link=LinkCost.of(bandwidth, 1e-5))
            best = best_split(CONTEXT, ranks, machine)
            took = seconds(lambda machine=machine, ranks=ranks: best_split(CONTEXT, ranks, machine), 3)
            times = {
                name: simulate(one, machine).ttft_s
                for name, one in (
                    ("best", best),
                    ("balanced", balanced(machine.cost, CONTEXT, ranks)),
                    ("even", Partition.even(CONTEXT, ranks)),
                )
            }
            splits.append(
                {"ranks": ranks, "bandwidth": bandwidth, "seconds": took, "sizes": best.sizes, "ttft_s": times}
            )
            print(f"{ranks} ranks, {bandwidth / 1e9:g} GB/s: {took * 1e3:.0f} ms -> {best}")
    if options.out:
        document = {
            "command": "OMP_NUM_THREADS=1 python benchmarks/schedule.py",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "partitions_per_s": rates,
            "best_split": splits,
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
