"""Search a few contexts of your own model on your own ranks, train a predictor on them, and ask it.

    python examples/retrain.py MODEL_FOLDER CONTEXTS OUT

The same as ``kvr-partition search`` and ``kvr-partition train``, as code to start from.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvr_partition.measurement import Measurement
from kvr_partition.partition import Partition
from kvr_partition.search import search
from kvr_partition.training import measured_row, train
from profiler import MeasurementLog, RankGroup, SamplingPlan
from profiler.calibrate import guessed_machine

PLAN = SamplingPlan(warmup=1, least=2, most=4)


def main() -> None:
    """Measure, train, save."""
    model, out = sys.argv[1], Path(sys.argv[3])
    contexts = sorted(int(word) for word in sys.argv[2].split(","))
    with MeasurementLog(out / "measurements.jsonl") as log, RankGroup(model, ranks=2, log=log) as group:
        told = guessed_machine(group, contexts[-1], lambda one: group.measure_many([one], plan=PLAN)[0])

        def measure(partition: Partition) -> Measurement:
            return group.measure(partition, plan=PLAN)

        rows = []
        for context in contexts:
            found = search(measure, context, group.ranks, budget=4, machine=told)
            trials = [one.measurement for one in found.trials if one.measurement.ok]
            rows.append(measured_row(group.provenance, told, trials, found.best.sizes))
        predictor = train(rows, group.provenance)
    predictor.save(out / "predictor.json")
    middle = (contexts[0] + contexts[-1]) // 2
    print(predictor.predict(middle).partition, predictor.training.method)


if __name__ == "__main__":
    main()
