"""Search a few contexts of your own model on your own ranks, train a predictor on them, and ask it.

    python examples/retrain.py MODEL_FOLDER CONTEXTS OUT

The same as ``kvr-partition search`` and ``kvr-partition train``, as code to start from.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvr_partition.training import train
from profiler import MeasurementLog, RankGroup, SamplingPlan, Session
from profiler.session import rows_of

PLAN = SamplingPlan(warmup=1, least=2, most=4)


def main() -> None:
    """Measure, train, save."""
    model, out = sys.argv[1], Path(sys.argv[3])
    contexts = sorted(int(word) for word in sys.argv[2].split(","))
    out.mkdir(parents=True, exist_ok=True)
    with MeasurementLog(out / "measurements.jsonl") as log, RankGroup(model, ranks=2) as group:
        session = Session(group, log, contexts, budget=4, plan=PLAN)
        session.run()
        rows = rows_of(session.table, log)
        predictor = train(rows, group.provenance)
    session.table.save(out / "table.json")
    predictor.save(out / "predictor.json")
    middle = (contexts[0] + contexts[-1]) // 2
    print(predictor.predict(middle).partition, predictor.training.method)


if __name__ == "__main__":
    main()
