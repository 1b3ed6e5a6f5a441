"""The paper's Llama rows, predicted from its one-GPU column.

    python benchmarks/paper.py --out data/paper/predicted.json

The cost of a chunk is fitted to `data/paper/single_gpu_llama7b.csv` alone (dense masked attention, as the paper
computes it). Everything else is known beforehand: 300 GB/s links, the shape of a layer, which says how much
of it comes before KV is ready, and for 13B how much more of everything there is.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from scipy.optimize import nnls

from kvr_partition.cli.show import print_table
from kvr_partition.machine.bounds import bounds, gathering_ttft
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import median
from kvr_partition.partition import Partition

PAPER = Path(__file__).resolve().parents[1] / "data" / "paper"
SHAPES = {"llama-7b": (32, 4096, 11008), "llama-13b": (40, 5120, 13824)}
"""Layers, hidden size, inner size of the MLP."""


def rows(name: str) -> list[dict[str, str]]:
    """A published table, without its comment lines."""
    lines = (PAPER / name).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def machine_of(model: str) -> Machine:
    """What one GPU's column says about a model; 13B by the sizes of its matrices."""
    column = [(int(row["context"]), float(row["single_s"])) for row in rows("single_gpu_llama7b.csv")]
    seconds = np.array([one for _, one in column])
    terms = np.array([[1.0, c, c * c] for c, _ in column]) / seconds[:, None]
    scale = np.linalg.norm(terms, axis=0)
    fixed, token, pair = nnls(terms / scale, np.ones(len(column)))[0] / scale
    base_layers, base_hidden, base_inner = SHAPES["llama-7b"]
    layers, hidden, inner = SHAPES[model]
    linear = layers * hidden * (4 * hidden + 3 * inner)
    linear /= base_layers * base_hidden * (4 * base_hidden + 3 * base_inner)
    attention = layers * hidden / (base_layers * base_hidden)
    share = 3 * hidden / (4 * hidden + 3 * inner)
    cost = ChunkCost(fixed, token * linear, pair * attention, pair * attention, share)
    return Machine(
        cost, layers, 2 * hidden * 2, link=LinkCost.of(300e9, 2e-5), overlap=False, dense=True
    )  # K and V, two bytes each


def searched_ttft(context: int, ranks: int, machine: Machine) -> float:
    """TTFT in seconds of a machine's best split."""
    return simulate(best_split(context, ranks, machine, quantum=16), machine).ttft_s


def main() -> None:
    """Predict every row and print it beside the published one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for row in rows("table1_llama.csv"):
        context, ranks = int(row["context"]), int(row["gpus"])
        machine = machine_of(row["model"])
        split = best_split(context, ranks, machine, quantum=16)
        even = Partition.even(context, ranks)
        tsp, kvr = gathering_ttft("tsp", context, ranks, machine), simulate(split, machine).ttft_s
        whole_s, blocking_s = (
            searched_ttft(context, ranks, replace(machine, forwards=how)) for how in ("whole", "blocking")
        )
        limits = bounds(context, ranks, machine, split)
        published_tsp, published_kvr = float(row["tsp_s"]), float(row["kvr_s_s"])
        found.append(
            {
                "model": row["model"],
                "context": context,
                "gpus": ranks,
                "sizes": split.sizes,
                "tsp_s": tsp,
                "published_tsp_s": published_tsp,
                "kvr_s": kvr,
                "published_kvr_s": published_kvr,
                # The best split of links that store and forward, and of those whose sends block as well.
                "kvr_whole_s": whole_s,
                "kvr_blocking_s": blocking_s,
                "kvr_e": simulate(even, machine).ttft_s,
                "speedup": tsp / kvr,
                "published_speedup": published_tsp / published_kvr,
                # Equations 3 to 7: the bounds, and the KV entries on the wire.
                "bound_dense_s": limits.dense_s,
                "bound_causal_s": limits.causal_s,
                "practical_s": limits.practical_s,
                "entries_tsp": (ranks - 1) * context,
                "entries_kvr_even": sum(even.ends[:-1]),
                "entries_kvr": sum(split.ends[:-1]),
            }
        )
    header = ["model", "context", "GPUs", "TSP", "published", "off", "KVR-S", "published", "off", "blocking",
              "off", "speed-up", "published", "off"]  # fmt: skip
    print_table(
        header,
        [
            [
                one["model"], str(one["context"]), str(one["gpus"]),
                f"{one['tsp_s']:.3f}", f"{one['published_tsp_s']:.3f}", _off(one["tsp_s"], one["published_tsp_s"]),
                f"{one['kvr_s']:.3f}", f"{one['published_kvr_s']:.3f}", _off(one["kvr_s"], one["published_kvr_s"]),
                f"{one['kvr_blocking_s']:.3f}", _off(one["kvr_blocking_s"], one["published_kvr_s"]),
                f"{one['speedup']:.2f}", f"{one['published_speedup']:.2f}",
                _off(one["speedup"], one["published_speedup"]),
            ]
            for one in found
        ],
    )  # fmt: skip
    for ranks in (4, 8):
        long = [one for one in found if one["context"] >= 8192 and one["gpus"] == ranks]
        named = {
            "TSP": "tsp_s",
            "KVR-S": "kvr_s",
            "stored and forwarded": "kvr_whole_s",
            "blocking": "kvr_blocking_s",
        }
        for name, field in named.items():
            published = "published_tsp_s" if name == "TSP" else "published_kvr_s"
            off = sorted(one[field] / one[published] - 1 for one in long)
            print(f"{ranks} GPUs, 8k and more, {name}: {off[0]:+.0%} to {off[-1]:+.0%}, median {median(off):+.0%}")
        off = sorted(one["speedup"] / one["published_speedup"] - 1 for one in long)
        print(f"{ranks} GPUs, 8k and more, speed-up over TSP: {off[0]:+.0%} to {off[-1]:+.0%}")
    if options.out:
        document = {"command": "python benchmarks/paper.py", "rows": found}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


def _off(predicted: float, published: float) -> str:
    return f"{predicted / published - 1:+.0%}"


if __name__ == "__main__":
    main()
