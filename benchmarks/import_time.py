"""What serving code pays: a fresh process that loads a table or predictor, and every answer after that.

    python benchmarks/import_time.py --out data/epyc-2-cores/serving.json

Fresh processes run in an environment made for it with nothing but this package, as a router has, and in the one
that runs this file: msgspec imports typing_extensions where it is there, as it is beside torch. Whole processes
take turns; printed are medians in milliseconds and the difference to bare Python. Warm answers are timed in one
process, the median of 11 rounds of 20,000, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import timeit
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvr_partition import Partition, PartitionPredictor, PartitionTable
from kvr_partition.machine.cost import ChunkCost
from kvr_partition.measurement import median
from kvr_partition.predictor import Grid, Training
from kvr_partition.table import Entry

CONTEXTS = tuple(round(2048 * 2 ** (step / 8)) for step in range(41))
SHARES = tuple(step / 10 for step in range(9))


def predictor() -> PartitionPredictor:
    """As large as one that knows contexts of 2k to 64k, past tokens and 2 to 8 ranks."""
    grids = []
    for ranks in range(2, 9):
        cuts = tuple((at + 1) / ranks for at in range(ranks - 1))
        grids.append(Grid(ranks, CONTEXTS, SHARES, ((cuts,) * len(CONTEXTS),) * len(SHARES), CONTEXTS[::8]))
    return PartitionPredictor(
        grids, Training("corrected", 100, 100, "", ()), ChunkCost(0.0, 1e-5, 1e-9, 1e-9, 0.2)
    )


def table(quantum: int = 1) -> PartitionTable:
    """Six contexts on 2 to 8 ranks."""
    return PartitionTable(
        Entry(context, Partition.even(context, ranks).sizes, quantum=quantum)
        for context in CONTEXTS[::8]
        for ranks in range(2, 9)
    )


def alone(folder: Path) -> Path:
    """The interpreter of an environment with this package and what that needs."""
    root = Path(__file__).resolve().parents[1]
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", root / "constraints.txt", root],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return python


def fresh(folder: Path, pythons: dict[str, Path], runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds of whole processes, by environment."""
    cases = {
        "bare Python": "pass",
        "import kvr_partition": "import kvr_partition",
        "load a table, lookup": "from kvr_partition import load; "
        f"load({str(folder / 'table.json')!r}).lookup(9999, 8)",
        "load a predictor, predict": "from kvr_partition import load; "
        f"load({str(folder / 'predictor.json')!r}).predict(9999, 8, 1000)",
    }
    # As after any installation: compiled before, whatever this machine's settings say.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    times: dict[str, dict[str, list[float]]] = {place: {name: [] for name in cases} for place in pythons}
    for turn in range(runs + 1):
        for place, python in pythons.items():
            for name, code in cases.items():
                began = time.perf_counter()
                subprocess.run([python, "-c", code], check=True, cwd=folder, env=environment)
                if turn:
                    times[place][name].append((time.perf_counter() - began) * 1e3)
    return {place: {name: median(each) for name, each in by_name.items()} for place, by_name in times.items()}


def warm() -> dict[str, float]:
    """Microseconds of an answer on eight ranks."""
    known, tiled, trained = table(), table(128), predictor()
    cases: dict[str, Callable[[], Any]] = {
        "lookup, searched": lambda: known.lookup(8192, 8),
        "lookup, interpolated": lambda: known.lookup(9999, 8),
        "lookup, multiples of 128": lambda: tiled.lookup(9999, 8),
        "predict": lambda: trained.predict(9999, 8),
        "predict behind cached tokens": lambda: trained.predict(9999, 8, 1000),
        "predict, multiples of 128": lambda: trained.predict(9999, 8, quantum=128),
    }
    return {
        name: median([seconds / 20_000 * 1e6 for seconds in timeit.repeat(case, number=20_000, repeat=11)])
        for name, case in cases.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=41)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table().save(folder / "table.json")
        predictor().save(folder / "predictor.json")
        size = (folder / "predictor.json").stat().st_size
        pythons = {"alone": alone(folder / "venv"), "beside torch": Path(sys.executable)}
        processes = fresh(folder, pythons, options.runs)
    answers = warm()
    for place, by_name in processes.items():
        print(place)
        for what, milliseconds in by_name.items():
            print(f"  {what:<30} {milliseconds:7.1f} ms   {milliseconds - by_name['bare Python']:+7.1f} ms")
    for what, microseconds in answers.items():
        print(f"{what:<30} {microseconds:7.2f} µs")
    if options.out:
        document = {
            "command": " ".join(["python benchmarks/import_time.py", *sys.argv[1:]]),
            "python": platform.python_version(),
            "predictor_bytes": size,
            "fresh_process_ms": processes,
            "warm_us": answers,
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
