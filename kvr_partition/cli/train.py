"""Train a predictor on what searches found, and say what it loses on contexts it has not seen.

Each OUT is the --out of a search; all of one model on one machine, on one or several rank counts. Every way to
predict is tried with each context left out in turn; the one that loses least is trained on everything and
exported as one JSON file that serving code loads without scikit-learn.

Examples:
  kvr-partition train kvr-runs/quickstart-llama-2xcpu-float32 --out my.predictor.json
  kvr-partition train runs/2-ranks runs/4-ranks --tune 20 --dataset rows.json --out my.predictor.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvr_partition.cli.options import add_output, need_at_least
from kvr_partition.errors import FileFormatError, KVRError

if TYPE_CHECKING:
    from kvr_partition.cli.show import Progress
    from kvr_partition.predictor import PartitionPredictor
    from kvr_partition.training import Row


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``train``."""
    parser.add_argument("runs", nargs="*", metavar="OUT", help="--out of a search")
    parser.add_argument(
        "--rows",
        metavar="FILE",
        action="append",
        default=[],
        help="train on this dataset as well, written with --dataset; can be given several times",
    )
    parser.add_argument("--dataset", metavar="FILE", help="write the rows it was trained on")
    parser.add_argument("--method", help="keep this way to predict, whatever loses least")
    parser.add_argument(
        "--quantum", type=int, help="predict multiples of so many tokens (default: as the searched splits are)"
    )
    parser.add_argument("--tune", type=int, default=0, metavar="N", help="tune each method with N Optuna trials")
    parser.add_argument("--jobs", type=int, default=1, help="processes to evaluate with; -1: one a core")
    parser.add_argument("--out", metavar="FILE", default="predictor.json", help="(default predictor.json)")
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Read, evaluate, train, write and print."""
    need_at_least("tune", options.tune, 0)
    if options.quantum is not None:
        need_at_least("quantum", options.quantum, 1)
    import warnings

    from kvr_partition.cli.show import Progress, print_json
    from kvr_partition.training import REGRESSORS, Dataset, train

    rows = _rows(options)
    if options.dataset:
        Dataset(tuple(rows)).save(options.dataset)
    with Progress(1.0 + len(REGRESSORS) * options.tune, options.quiet) as progress:
        tuned = _tuned(options, rows, progress)
        progress.doing(f"trying {len(REGRESSORS)} ways to predict {len(rows)} searched partitions")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that few rows make poor regressions is what the regrets tell
            predictor = train(rows, method=options.method, tuned=tuned, jobs=options.jobs, quantum=options.quantum)
        predictor.save(options.out)
    training = predictor.training
    if options.format == "json":
        print_json({"out": options.out, "training": training, "ranks": predictor.ranks, "tuned": tuned})
        return
    _show(options, predictor)


def _rows(options: argparse.Namespace) -> list[Row]:
    """Of all searches and datasets that were named, each once.

    Raises:
        KVRError: there are none.
    """
    from kvr_partition.training import load_dataset

    rows: list[Row] = []
    for name in options.rows:
        rows += load_dataset(name).rows
    for name in options.runs:
        rows += rows_of_folder(Path(name))
    rows = list(dict.fromkeys(rows))
    if not rows:
        raise KVRError("there is nothing to train on; name the --out of a search, or a dataset with --rows")
    return rows


def _tuned(options: argparse.Namespace, rows: Sequence[Row], progress: Progress) -> dict[str, Any]:
    """Parameters of each method with some to tune; none where nothing is to be tuned."""
    if not options.tune:
        return {}
    import warnings

    import optuna

    from kvr_partition.training import REGRESSORS
    from kvr_partition.training.evaluation import tune

    tuned: dict[str, Any] = {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for method, way in REGRESSORS.items():
        if not way.space:
            continue
        progress.doing(f"tuning {method}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned[method] = tune(rows, method, trials=options.tune, jobs=options.jobs)
        progress.advance(options.tune)
    return tuned


def _show(options: argparse.Namespace, predictor: PartitionPredictor) -> None:
    from kvr_partition.cli.show import print_table
    from kvr_partition.training.predictor import TRUSTED

    training = predictor.training
    overall = [score for score in training.scores if score.ranks is None]
    if overall:
        print("Lost on contexts that were left out, against the best known split:\n")
        print_table(
            ["method", "cases", "mean", "p95", "max", ""],
            [
                [
                    one.method,
                    str(one.regret.cases),
                    f"{one.regret.mean:.2%}",
                    f"{one.regret.p95:.2%}",
                    f"{one.regret.max:.2%}",
                    "<-" if one.method == training.method else "",
                ]
                for one in sorted(overall, key=lambda one: one.regret.mean)
            ],
        )
        least = min(overall, key=lambda one: one.regret.mean).method
        if options.method is None and training.method == TRUSTED != least:
            print(f"\n{TRUSTED} is kept: none that answered every case beats it by more than chance.")
    else:
        print("Nothing could be left out: that needs three contexts on the same ranks.")
    for grid in predictor.grids:
        contexts, pasts = (sorted(each) for each in zip(*grid.searched, strict=True))
        print(f"\n{grid.ranks} ranks: contexts {_span(contexts)}, past {_span(pasts)} tokens")
    print(f"\nWritten to {options.out} ({training.method}). Next:")
    print(f"  kvr-partition predict --predictor {options.out} --context {predictor.grids[0].contexts[-1]} "
          f"--ranks {predictor.ranks[0]} --explain")  # fmt: skip


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def rows_of_folder(folder: Path) -> list[Row]:
    """The rows of one search's out directory.

    Raises:
        FileFormatError: no such search, or one whose log does not tell what chunks cost.
    """
    from kvr_partition.loading import load_table
    from kvr_partition.machine.cost import FitError
    from profiler.session import rows_of
    from profiler.store import MeasurementLog

    table = load_table(folder / "table.json")
    log_path = folder / "measurements.jsonl"
    if table.provenance is None or not log_path.is_file():
        raise FileFormatError(f"{folder} is not the --out of a search; it has no measurements.jsonl")
    with MeasurementLog(log_path) as log:
        try:
            return rows_of(table, log)
        except FitError as error:
            raise FileFormatError(f"{log_path} does not tell what a chunk costs: {error}") from None
