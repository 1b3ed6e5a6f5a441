"""What the files of benchmarks/whole_gpus.py say together: medians, the schedule against measurements, predictors.

    python -m benchmarks.whole_gpus_figures data/h100-sxm/llama-3.1-8b/4-gpus models/llama-3.1-8b/*.predictor.json

No ranks are needed. Each log of the folder is read sample by sample, also those of runs that were cut short. The
answers of predictors are held against what was found, by the schedule of the machine that the search measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvr_partition.errors import OutOfRangeError
from kvr_partition.loading import load_predictor, load_table
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.measurement import Sample, median, median_interval
from kvr_partition.partition import Partition
from kvr_partition.table import PartitionTable
from profiler import MeasurementLog
from profiler.calibrate import machine_of_log


class Key(NamedTuple):
    """What samples are of; the purpose is without its run, the noise that of a layer."""

    purpose: str
    method: str
    sizes: tuple[int, ...]
    noise_bytes: int


def samples_of(log: Path) -> dict[Key, list[Sample]]:
    """All samples of a log but warm-ups."""
    found: dict[Key, list[Sample]] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if record["type"] == "sample" and not record.get("warmup"):
            purpose = "/".join(record["purpose"].split("/")[:2])
            key = Key(purpose, record["method"], tuple(record["sizes"]), record.get("noise", 0))
            found.setdefault(key, []).append(msgspec.convert(record["sample"], Sample))
    return found


def row(key: Key, samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians over samples; compute and wait of each rank."""
    seconds = [sample.ttft_s for sample in samples]
    ranks = range(len(samples[0].ranks))
    return {
        **key._asdict(),
        "samples": len(samples),
        "ttft_s": median(seconds),
        "interval_s": median_interval(seconds),
        "compute_s": [median([sample.ranks[at].compute_s for sample in samples]) for at in ranks],
        "wait_s": [median([sample.ranks[at].wait_s for sample in samples]) for at in ranks],
    }


def scheduled(splits: Sequence[dict[str, Any]], machine: Machine) -> Iterator[dict[str, Any]]:
    """What the schedule says of splits that nothing was fitted to."""
    for split in splits:
        said = simulate(Partition(tuple(split["sizes"])), machine).ttft_s
        yield {**split, "simulated_s": said, "simulated_over_measured": said / split["ttft_s"]}


def answered(
    paths: Sequence[Path], table: PartitionTable, ranks: int, machine: Machine
) -> Iterator[dict[str, Any]]:
    """What predictors of other machines say of the contexts of a table, and what that costs by the schedule."""
    for path in paths:
        predictor = load_predictor(path)
        for entry in table.entries:
            with contextlib.suppress(OutOfRangeError):
                answer = predictor.predict(entry.context, ranks=ranks).partition
                asked, found = (simulate(one, machine).ttft_s for one in (answer, entry.partition))
                yield {
                    "predictor": path.as_posix(),
                    "context": entry.context,
                    "predicted": answer.sizes,
                    "found": entry.sizes,
                    "slower_by_the_schedule": asked / found - 1,
                }


def main() -> None:
    """Read a folder, write its ``figures.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("predictors", nargs="*", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder
    with MeasurementLog(folder / "search" / "measurements.jsonl") as log:
        origin = next(iter(log.provenance.values()))
        machine = machine_of_log(log, origin)
    splits = json.loads((folder / "splits.json").read_text())["figures"]["splits"]
    found = {
        "provenance": msgspec.to_builtins(origin),
        "methods": {
            path.relative_to(folder).as_posix(): [row(*one) for one in samples_of(path).items()]
            for path in sorted(folder.rglob("*.jsonl"))
        },
        "schedule": list(scheduled(splits, machine)),
        "predictors": list(
            answered(options.predictors, load_table(folder / "search" / "table.json"), origin.ranks, machine)
        ),
    }
    (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
