"""The predictor and the table that come with a model, from what was measured on some hardware.

    python benchmarks/bundle.py --quantum 128 --out models/llama-7b/h100-sxm \\
        data/h100-sxm/llama-7b/predict-sm-{2,4,8}.rows.json

Sources are rows that benchmarks/predict_real.py wrote, and logs of benchmarks/prefill.py, whose searches are rows
too. Two files are written, OUT.predictor.json and OUT.table.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvr_partition.cli.options import model_folder
from kvr_partition.table import Entry, PartitionTable
from kvr_partition.training import Row, load_dataset, measured_row, train
from kvr_partition.training.dataset import common_quantum
from profiler import MeasurementLog
from profiler.calibrate import guessed_machine_of_log
from profiler.models import open_model, operations


def main() -> None:
    """Read, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="*.rows.json or *.jsonl")
    parser.add_argument("--quantum", type=int, help="predict multiples of so many tokens")
    parser.add_argument("--out", type=Path, required=True, help="both files, without their endings")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # that few rows make poor regressions is what the regrets tell
    rows: list[Row] = []
    for source in options.sources:
        rows += [row_of(source)] if source.suffix == ".jsonl" else load_dataset(source).rows
    train(rows, quantum=options.quantum).save(f"{options.out}.predictor.json")
    PartitionTable([entry_of(row, rows, options.quantum) for row in rows], rows[-1].provenance).save(
        f"{options.out}.table.json"
    )


def row_of(log_path: Path) -> Row:
    """The search in one log of benchmarks/prefill.py; the best split stands in the file beside it."""
    figures = json.loads(log_path.with_suffix(".json").read_text())["figures"]
    best = next(figure["sizes"] for figure in figures["full_bandwidth"]["methods"] if figure["method"] == "KVR-S")
    with MeasurementLog(log_path) as log:
        origin = next(iter(log.provenance.values()))
        counted = log.operations or operations(open_model(model_folder(origin.model.name)))
        told = guessed_machine_of_log(log, origin, counted)
        # The log has the topology in the method's name; a search has it in its conditions.
        trials = [
            msgspec.structs.replace(measurement, method="kvr")
            for measurement in log.measurements("search")
            if measurement.ok
        ]
    return measured_row(origin, told, trials, tuple(best))


def entry_of(row: Row, rows: Sequence[Row], quantum: int | None) -> Entry:
    """What a table keeps of a search."""
    found = next(trial for trial in row.trials if trial.sizes == row.sizes)
    unit = quantum or common_quantum([one for one in rows if one.ranks == row.ranks])
    return Entry(row.context, row.sizes, row.past, found.ttft_s, found.interval_s, len(row.trials), unit)


if __name__ == "__main__":
    main()
