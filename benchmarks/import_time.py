"""How much longer Python takes with ``import kvr_partition``, and to look up a partition from a table.

Run:  python benchmarks/import_time.py
Interleaved whole processes; prints medians in milliseconds and the difference to bare Python.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvr_partition import PartitionTable
from kvr_partition.table import Entry


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=41)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        PartitionTable([Entry(512, (300, 212)), Entry(2048, (1200, 848))]).save(table)
        cases = {
            "bare Python": "pass",
            "import kvr_partition": "import kvr_partition",
            "import, load, lookup": f"import kvr_partition; kvr_partition.load({str(table)!r}).lookup(1536)",
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(runs + 1):
            for name, code in cases.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, "-c", code], check=True)
                if turn:
                    times[name].append(time.perf_counter() - began)
    bare = statistics.median(times["bare Python"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:<24} {median * 1e3:7.1f} ms   {(median - bare) * 1e3:+7.1f} ms")


if __name__ == "__main__":
    main()
