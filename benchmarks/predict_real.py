"""KVR-P against KVR-S on real ranks: searches, a predictor trained on them, and contexts that it has not seen.

    python benchmarks/predict_real.py --model llama-7b --backend sm --dtype float16 --ranks 4 \\
        --contexts 4096,8192,16384 --held-out 6144,12288 --out data/h100-sxm/llama-7b/predict-sm-4.json

Each context of --contexts is searched and the predictor trained on those alone. Each of --held-out is searched
then, and timed side by side: what the search found, what the predictor says, what it says of a cost with only the
steps of chunk sizes that these searches met and of one without steps, linear interpolation and the even split. In
the end the predictor is trained anew on everything and written beside, with all rows.

``--replay`` needs no ranks: it takes every measurement from the log of a run that was cut short, and ends that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import optuna

from kvr_partition.cli.options import model_folder, parse_contexts
from kvr_partition.cli.show import print_table
from kvr_partition.machine.machine import Machine
from kvr_partition.measurement import Measurement, median, median_interval
from kvr_partition.partition import Partition
from kvr_partition.search import search
from kvr_partition.search.measured import noise_of
from kvr_partition.table import Entry, PartitionTable
from kvr_partition.training import Dataset, Row, measured_row, train
from kvr_partition.training.evaluation import decoded
from kvr_partition.training.features import Query
from kvr_partition.training.regressors import Corrected, Interpolation
from profiler import Candidate, MeasurementLog, RankGroup, SamplingPlan
from profiler.calibrate import guessed_machine, machine_of_log, measured_machine
from profiler.sizes import profile_chunk_sizes


def main() -> None:
    """Search, train, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--backend", default="sm")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--contexts", default="4096,8192,16384")
    parser.add_argument("--held-out", default="")
    parser.add_argument("--past", type=int, default=0)
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--samples", type=int, default=3, help="of each partition in a search")
    parser.add_argument("--final", type=int, default=7, help="of each partition side by side")
    parser.add_argument("--quantum", type=int, default=128)
    parser.add_argument(
        "--profile", action="store_true", help="time chunks and links first; else guess from one rank"
    )
    parser.add_argument("--replay", action="store_true", help="measure nothing, go by the log beside --out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    contexts = parse_contexts(options.contexts)
    held_out = parse_contexts(options.held_out) if options.held_out else []
    few = SamplingPlan(warmup=1, least=options.samples, most=options.samples)
    more = SamplingPlan(warmup=1, least=options.final, most=options.final)
    rows: list[Row] = []
    entries: list[Entry] = []
    compared: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context(MeasurementLog(options.out.with_suffix(".jsonl")))
        group: RankGroup | Replayed
        if options.replay:
            group = Replayed(log)
            told = machine_of_log(log, group.provenance)
        else:
            group = stack.enter_context(
                RankGroup(
                    model_folder(options.model),
                    options.ranks,
                    backend=options.backend,
                    dtype=options.dtype,
                    log=log,
                    timeout_s=300,
                )
            )
            told = _told(group, max(contexts) + options.past, log, few, options.profile)
            began = time.monotonic()
            told = profile_chunk_sizes(group, told, dict.fromkeys([*contexts, *held_out], options.quantum), log)
            print(f"  {len(told.cost.size_effects)} sizes timed in {time.monotonic() - began:.1f} s", flush=True)

        def confirmed(context: int, splits: Sequence[Partition]) -> list[Measurement]:
            candidates = [Candidate("kvr", split) for split in splits]
            return group.measure_many(candidates, plan=few, purpose=f"confirm/{context}")

        def searched(context: int) -> Row:
            def measure(partition: Partition) -> Measurement:
                found = group.measure(partition, plan=few, purpose=f"search/{context}")
                print(f"  {context}: {partition} {found.ttft_s * 1e3:.1f} ms", flush=True)
                return found

            found = search(
                measure, context, options.ranks, options.budget, machine=told, quantum=options.quantum,
                past=options.past, confirm=lambda splits: confirmed(context, splits),
            )  # fmt: skip
            trials = [trial.measurement for trial in found.trials if trial.measurement.ok]
            best = found.measurement
            entries.append(
                Entry(
                    context,
                    found.best.sizes,
                    options.past,
                    best.ttft_s,
                    best.interval_s,
                    len(found.trials),
                    found.quantum,
                )
            )
            return measured_row(group.provenance, told, trials, found.best.sizes)

        rows += [searched(context) for context in contexts]
        predictor = train(rows, group.provenance)
        met = Corrected().fit([_untold(row) for row in rows])
        without_steps, interpolation = Corrected().fit(rows), Interpolation().fit(rows)
        for context in held_out:
            row = searched(context)
            rows.append(row)
            found = predictor.predict(context, past=options.past).partition

            def rounded(cuts: Sequence[float], context: int = context) -> Partition:
                return Partition.from_cuts(cuts, context, options.quantum, options.past)

            splits = {
                "KVR-S": row.partition,
                "KVR-P": found,
                "steps met": decoded(met, Query.of(_untold(row)), options.quantum),
                "without steps": rounded(without_steps.cuts(Query.of(row))),
                "interpolated": rounded(interpolation.cuts(Query.of(row))),
                "KVR-E": Partition.even(context, options.ranks, past=options.past),
            }
            candidates = {name: Candidate("kvr", split) for name, split in splits.items()}
            measured = group.measure_many(list(candidates.values()), plan=more, purpose=f"compare/{context}")
            by_name = dict(zip(candidates, measured, strict=True))
            best_s = min(one.ttft_s for one in measured)
            over = {name: _over(one, by_name["KVR-S"]) for name, one in by_name.items()}
            compared.append(
                {
                    "context": context,
                    "best_s": best_s,
                    "methods": {
                        name: {
                            "sizes": one.sizes,
                            "ttft_s": one.ttft_s,
                            "regret": one.ttft_s / best_s - 1,
                            "over_searched": over[name],
                            "noise": noise_of(one),
                            "samples_s": [sample.ttft_s for sample in one.samples],
                        }
                        for name, one in by_name.items()
                    },
                }
            )
            print_table(
                [str(context), "TTFT", "regret", "noise", "over KVR-S, turn by turn", "95%"],
                [[f"{name} {one.partition}", f"{one.ttft_s * 1e3:.1f} ms", f"{one.ttft_s / best_s - 1:+.2%}",
                  f"{noise_of(one):.2%}", f"{over[name]['median']:+.2%}",
                  f"{over[name]['low']:+.2%} to {over[name]['high']:+.2%}"] for name, one in by_name.items()],
            )  # fmt: skip
        origin = group.provenance
    final = train(rows, origin)
    final.save(options.out.with_suffix(".predictor.json"))
    PartitionTable(entries, origin).save(options.out.with_suffix(".table.json"))
    Dataset(tuple(rows)).save(options.out.with_suffix(".rows.json"))
    document = {
        "command": " ".join(["python benchmarks/predict_real.py", *sys.argv[1:]]),
        "provenance": msgspec.to_builtins(origin),
        "method": predictor.training.method,
        "held_out": compared,
        "scores": msgspec.to_builtins(final.training.scores),
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")


class Replayed:
    """What a group has measured, by its log."""

    def __init__(self, log: MeasurementLog) -> None:
        self._log = log
        self.provenance = next(iter(log.provenance.values()))

    def measure_many(
        self, candidates: Sequence[Candidate], *, plan: SamplingPlan, purpose: str
    ) -> list[Measurement]:
        """As measured then."""
        return [self.measure(candidate.partition, plan=plan, purpose=purpose) for candidate in candidates]

    def measure(self, partition: Partition, *, plan: SamplingPlan, purpose: str) -> Measurement:
        """As measured then."""
        found = self._log.finished(purpose, "kvr", partition)
        if found is None:
            raise SystemExit(f"{self._log.path} has no {purpose} of {partition} with {plan.least} samples")
        return found


def _untold(row: Row) -> Row:
    """The same, but told nothing of chunk sizes."""
    told = msgspec.structs.replace(row.prior, cost=msgspec.structs.replace(row.prior.cost, size_effects=()))
    return msgspec.structs.replace(row, prior=told)


def _over(one: Measurement, searched: Measurement) -> dict[str, float]:
    """How much longer than the searched split, compared within each turn, so that drift cancels out."""
    ratios = [mine.ttft_s / its.ttft_s - 1 for mine, its in zip(one.samples, searched.samples, strict=True)]
    low, high = median_interval(ratios)
    return {"median": median(ratios), "low": low, "high": high}


def _told(group: RankGroup, longest: int, log: MeasurementLog, plan: SamplingPlan, profile: bool) -> Machine:
    if profile:
        return measured_machine(group, longest, log)
    return guessed_machine(group, longest, lambda one: group.measure_many([one], plan=plan, purpose="guess")[0])


if __name__ == "__main__":
    main()
