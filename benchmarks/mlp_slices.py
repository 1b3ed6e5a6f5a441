"""How long an MLP takes over rows in even slices of several lengths, on one GPU: what `MLP_ROWS` was chosen by.

    python -m benchmarks.mlp_slices --out mlp-slices.json

Slices of all lengths take turns, over the same rows and random weights in half precision.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from kvr_partition.cli.options import model_folder
from kvr_partition.measurement import median
from kvr_partition.runtime.fused import ops
from profiler.models import open_model

ROWS = (2432, 3456, 4096, 4224, 4608, 4864, 5120, 5632, 6144, 7168, 8192, 9216, 11264, 12672, 16384, 25088)
MOST = (4096, 8192, 16384, 32768)
WARMUP, ROUNDS = 2, 5


def even(rows: int, most: int, rounding: int = 128) -> list[tuple[int, int]]:
    """Runs of about equal length, of no more than ``most`` rows each."""
    step = math.ceil(rows / max(1, -(-rows // most)) / rounding) * rounding
    return [(low, min(low + step, rows)) for low in range(0, rows, step)]


def timed(hidden: int, inner: int, rows: int) -> dict[str, Any]:
    """Milliseconds of one MLP, by the longest slice."""

    def weight(height: int, width: int) -> torch.Tensor:
        return torch.randn(height, width, device="cuda", dtype=torch.float16) * 0.02

    gate, up, down = weight(inner, hidden), weight(inner, hidden), weight(hidden, inner)
    given = torch.randn(rows, hidden, device="cuda", dtype=torch.float16)
    residual = torch.zeros_like(given)
    repeats = max(2, 12000 // rows)
    took: dict[int, list[float]] = {most: [] for most in MOST}
    for turn in range(WARMUP + ROUNDS):
        for most in MOST:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for low, high in even(rows, most) * repeats:
                some = given[low:high]
                made = ops.gated(ops.product(some, gate, None), ops.product(some, up, None), "silu")
                ops.add_product_(residual[low:high], made, down, None)
            end.record()
            end.synchronize()
            if turn >= WARMUP:
                took[most].append(begin.elapsed_time(end) / repeats)
    return {"rows": rows, "ms": {str(most): median(times) for most, times in took.items()}}


def main() -> None:
    """Every model and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-7b,llama-3.1-8b")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "models": {}}
    for name in options.models.split(","):
        config = open_model(model_folder(name)).config
        found["models"][name] = [timed(config.hidden_size, config.intermediate_size, rows) for rows in ROWS]
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
