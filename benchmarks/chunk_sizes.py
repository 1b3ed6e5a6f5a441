"""Which chunk sizes kernels like: some layers of chunks of every size, on all ranks at once.

    python benchmarks/chunk_sizes.py --model llama-7b --ranks 8 --sizes 256:2688:128 \\
        --out data/h100-sxm/llama-7b/chunk-sizes-sm-8.json

Prints what a token of each size takes in a layer, behind each prefix.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import msgspec

from kvr_partition.cli.options import model_folder, parse_contexts
from kvr_partition.cli.show import print_table
from kvr_partition.measurement import median
from profiler import RankGroup


def main() -> None:
    """Time, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--backend", default="sm")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--sizes", default="256:2688:128")
    parser.add_argument("--prefixes", default="0,8192")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="sizes that take turns")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sizes = parse_contexts(options.sizes)
    prefixes = [int(one) for one in options.prefixes.split(",")]
    timed: dict[int, dict[int, list[list[float]]]] = {}
    took: dict[int, float] = {}
    with RankGroup(
        model_folder(options.model), options.ranks, backend=options.backend, dtype=options.dtype, timeout_s=300
    ) as group:
        # The longest first: rows are set aside once.
        for prefix in sorted(prefixes, reverse=True):
            of_prefix = timed.setdefault(prefix, {})
            began = time.monotonic()
            for some in _batches(sorted(sizes, reverse=True), options.batch):
                for turn in range(1 + options.rounds):
                    for size in some:
                        seconds = [one for one, _ in group.time_chunk(size, prefix, layers=options.layers)]
                        if turn:
                            of_prefix.setdefault(size, []).append(seconds)
            took[prefix] = time.monotonic() - began
            print(f"behind {prefix}: {took[prefix]:.1f} s", flush=True)
        origin = group.provenance
    document = {
        "command": " ".join(["python benchmarks/chunk_sizes.py", *sys.argv[1:]]),
        "provenance": msgspec.to_builtins(origin),
        "layers": options.layers,
        "took_s": took,
        "seconds": {prefix: dict(sorted(of_prefix.items())) for prefix, of_prefix in timed.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document) + "\n")
    print_table(
        ["tokens", *(f"behind {prefix}" for prefix in prefixes)],
        [
            [
                str(size),
                *(f"{1e6 * _seconds(timed[prefix][size]) / size / options.layers:.3f} us" for prefix in prefixes),
            ]
            for size in sizes
        ],
    )


def _batches(sizes: list[int], count: int) -> list[list[int]]:
    return [sizes[at : at + count] for at in range(0, len(sizes), count)]


def _seconds(rounds: list[list[float]]) -> float:
    return median([sum(one) / len(one) for one in rounds])


if __name__ == "__main__":
    main()
