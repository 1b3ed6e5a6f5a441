"""Matrix products of a layer on groups of SMs, nothing else: what an SM-partition rank can reach at best.

    python benchmarks/sm_products.py --ranks 4,8 --out data/h100-sxm/llama-7b/sm-products.json

All groups multiply at once, each its own rows with the same weights: first equally many rows on every group, then
the uneven chunks of a balanced split. Kernels are chosen in three ways: by cuBLAS for the whole GPU, by cuBLAS
told how many SMs a group has, and by timing cuBLAS's candidates, as SM-partition ranks do. Meanwhile
nvidia-smi tells the clock of the SMs and the power.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvr_partition.measurement import median
from profiler.experiments.sm_products import GroupProducts, chosen_products
from profiler.sm.groups import split_sms

HIDDEN, INNER = 4096, 11008
SHAPES = ((HIDDEN, HIDDEN),) * 4 + ((HIDDEN, INNER),) * 2 + ((INNER, HIDDEN),)
"""Rows and columns of the weights of a Llama 7B layer."""

OPERATIONS = sum(2 * rows * columns for rows, columns in SHAPES)


class Meter:
    """Clock and power of a GPU while something runs."""

    def __init__(self) -> None:
        self.clock_mhz: list[float] = []
        self.power_w: list[float] = []
        self.capped: list[bool] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Reads nvidia-smi ten times a second."""
        query = "clocks.sm,power.draw,clocks_event_reasons.sw_power_cap"
        command = ["nvidia-smi", "-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
                   f"--query-gpu={query}", "--format=csv,noheader,nounits", "-lms", "100"]  # fmt: skip
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, stdout=output)
            try:
                yield
            finally:
                process.terminate()
                process.wait()
            output.seek(0)
            for row in csv.reader(output):
                if len(row) == 3:
                    self.clock_mhz.append(float(row[0]))
                    self.power_w.append(float(row[1]))
                    self.capped.append(row[2].strip() == "Active")


@contextlib.contextmanager
def told(sms: int) -> Iterator[None]:
    """cuBLAS chooses kernels for so many SMs; 0 for those of the device."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    library = ctypes.CDLL(next(line.split()[-1] for line in maps if "/libcublas.so" in line))
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    for_group = library.cublasSetSmCountTarget(handle, sms)
    if for_group:
        raise RuntimeError(f"cublasSetSmCountTarget answered {for_group}")
    try:
        yield
    finally:
        library.cublasSetSmCountTarget(handle, 0)


def multiply(
    streams: Sequence[Any], weights: Sequence[torch.Tensor], rows: Sequence[int], products: GroupProducts | None
) -> dict[str, Any]:
    """All groups at once, layer after layer for a second; TFLOP/s of all together."""
    inputs = [
        {width: torch.randn(count, width, device="cuda", dtype=torch.float16) for width in (HIDDEN, INNER)}
        for count in rows
    ]

    def layers(count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            for stream, given in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    for weight in weights:
                        torch.mm(given[weight.shape[1]], weight.t())
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    meter = Meter()
    with contextlib.ExitStack() as stack:
        if products is not None:
            stack.enter_context(chosen_products(products, choosing=True))
        layers(8)
        stack.enter_context(meter.running())
        took = [layers(16) for _ in range(5)]
    seconds = median(took)
    return {
        "rows": list(rows),
        "layer_s": took,
        "tflops": OPERATIONS * sum(rows) / seconds / 1e12,
        "clock_mhz": median(meter.clock_mhz) if meter.clock_mhz else None,
        "power_w": median(meter.power_w) if meter.power_w else None,
        "power_capped": sum(meter.capped) / len(meter.capped) if meter.capped else None,
    }


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--ranks", default="4,8")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    weights = [torch.randn(columns, rows, device="cuda", dtype=torch.float16) * 0.02 for rows, columns in SHAPES]
    found: list[dict[str, Any]] = []
    for ranks in (1, *(int(word) for word in options.ranks.split(","))):
        groups = split_sms(ranks)[0] if ranks > 1 else []
        streams = [group.stream() for group in groups] or [torch.cuda.Stream()]
        even = options.context // ranks
        cases = [[even] * ranks]
        if ranks > 1:
            cases += [[even + step * 128] * ranks for step in (-1, 1)]
            # First and last chunk of a balanced split of Llama 7B are some 20% away from the even one.
            steps = [round((1 - 2 * at / (ranks - 1)) * even * 0.18 / 128) * 128 for at in range(ranks)]
            cases += [[even + step for step in steps]]
        sms = groups[0].sms if groups else None
        products = GroupProducts(sms, streams) if sms else None
        for rows, by in itertools.product(cases, ("cuBLAS", "cuBLAS told", "timing") if sms else ("cuBLAS",)):
            with told(sms or 0) if by == "cuBLAS told" else contextlib.nullcontext():
                one = {"ranks": ranks, "sms": sms, "chosen_by": by,
                       **multiply(streams, weights, rows, products if by == "timing" else None)}  # fmt: skip
            found.append(one)
            shown = f"{rows[0]} each" if len(set(rows)) == 1 else "/".join(map(str, rows))
            print(f"{ranks} x {shown}, chosen by {by}: {one['tflops']:.0f} TFLOP/s "
                  f"at {one['clock_mhz']} MHz, {one['power_w']} W, capped {one['power_capped']}",
                  flush=True)  # fmt: skip
    if options.out:
        document = {
            "command": " ".join(["python benchmarks/sm_products.py", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "products": found,
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
