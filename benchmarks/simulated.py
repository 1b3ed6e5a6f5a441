"""Real ranks against the simulator: TTFT of splits it never saw, and a searched split against a full sweep.

    python benchmarks/simulated.py --context 2048 --out data/epyc-2-cores/quickstart-llama/simulated.json

The chunks of a profile and every split of a two-rank sweep take turns in one run, so that the machine's drift
hits both. A search with the informed sampler runs on the same ranks, and what it names is timed once more side by
side with the best of the sweep.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import msgspec
import optuna

from kvr_partition.cli.options import model_folder
from kvr_partition.cli.show import print_table
from kvr_partition.machine.schedule import simulate
from kvr_partition.measurement import Measurement, Sample, median
from kvr_partition.partition import Partition
from kvr_partition.search import search
from kvr_partition.search.measured import noise_of
from profiler import Candidate, MeasurementLog, RankGroup, SamplingPlan
from profiler.calibrate import chunk_design, measured_machine, time_point


def sweep(
    group: RankGroup, log: MeasurementLog, context: int, splits: list[Partition], samples: int
) -> list[Measurement]:
    """Every split and, among them, every chunk that a profile needs, in another order each turn.

    The first turn is a warm-up.
    """
    taken: dict[Partition, list[Sample]] = {one: [] for one in splits}
    work: list[Partition | tuple[int, int]] = [*splits, *chunk_design(context, group.ranks)]
    for turn in range(1 + samples):
        random.Random(turn).shuffle(work)
        for one in work:
            if isinstance(one, Partition):
                sample = group.sample(Candidate("kvr", one))
                if turn:
                    taken[one].append(sample)
            else:
                time_point(group, context, *one, log, warmup=turn == 0)
    return [Measurement("kvr", split.sizes, tuple(found), "cap") for split, found in taken.items()]


def main() -> None:
    """Measure, predict, search and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart-llama")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=17, help="splits of the sweep, from 35%% to 75%%")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    context = options.context
    plan = SamplingPlan(warmup=1, least=options.samples, most=options.samples)
    with (
        tempfile.TemporaryDirectory() as scratch,
        MeasurementLog(Path(scratch) / "log.jsonl") as log,
        RankGroup(model_folder(options.model), 2, backend=options.backend, dtype=options.dtype, log=log) as group,
    ):
        shares = [0.35 + 0.4 * step / (options.steps - 1) for step in range(options.steps)]
        splits = [Partition.from_fractions((share, 1 - share), context, quantum=16) for share in shares]
        swept = sweep(group, log, context, splits, options.samples)
        # The chunks are in the log; only links are still to be timed.
        machine = measured_machine(group, context, log)
        found = search(
            lambda one: group.measure(one, plan=plan, purpose="search"),
            context,
            2,
            options.budget,
            machine=machine,
            quantum=16,
        )
        best = sorted(swept, key=lambda one: one.ttft_s)[:3]
        finalists = list(dict.fromkeys([found.best, *(one.partition for one in best), Partition.even(context, 2)]))
        again = group.measure_many(
            [Candidate("kvr", finalist) for finalist in finalists],
            plan=SamplingPlan(warmup=1, least=3 * options.samples, most=3 * options.samples),
            purpose="final",
        )
        origin = msgspec.to_builtins(group.provenance)

    def off(measured: Measurement, predicted: float) -> float:
        return predicted / measured.ttft_s - 1

    fresh = [off(one, simulate(one.partition, machine).ttft_s) for one in swept]
    print_table(
        ["split", "measured", "noise", "simulated", "off"],
        [
            [
                str(one.partition),
                f"{one.ttft_s * 1e3:.1f} ms",
                f"{noise_of(one):.1%}",
                f"{simulate(one.partition, machine).ttft_s * 1e3:.1f} ms",
                f"{error:+.1%}",
            ]
            for one, error in zip(swept, fresh, strict=True)
        ],
    )
    fastest = min(again, key=lambda one: one.ttft_s)
    named = again[0]
    figures = {
        "simulated_off_median": median([abs(one) for one in fresh]),
        "simulated_off_max": max(abs(one) for one in fresh),
        "searched": found.best.sizes,
        "partitions_measured": len(found.trials),
        "stopped": found.stopped,
        "fastest": fastest.sizes,
        "regret": named.ttft_s / fastest.ttft_s - 1,
        "noise": noise_of(named),
        "even_over_fastest": next(one for one in again if one.partition == Partition.even(context, 2)).ttft_s
        / fastest.ttft_s
        - 1,
    }
    print(json.dumps(figures, indent=1))
    if options.out:
        document = {
            "command": " ".join(["python benchmarks/simulated.py", *sys.argv[1:]]),
            "provenance": origin,
            "machine": msgspec.to_builtins(machine.filed(2)),
            "figures": figures,
            "sweep": [
                {
                    "sizes": one.sizes,
                    "samples_s": [sample.ttft_s for sample in one.samples],
                    "simulated_off": error,
                }
                for one, error in zip(swept, fresh, strict=True)
            ],
            "final": [
                {"sizes": one.sizes, "samples_s": [sample.ttft_s for sample in one.samples]} for one in again
            ],
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
