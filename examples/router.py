"""Decide where to cut prompts, in a process that has neither torch nor scikit-learn.

    python examples/router.py PREDICTOR_OR_TABLE RANKS

Each line of standard input is the number of a prompt's tokens, and of those already cached if there are any; each
line of output the chunk sizes and where they come from.
"""

from __future__ import annotations

import sys

from kvr_partition import OutOfRangeError, Partition, PartitionPredictor, load


def main() -> None:
    """Answer until there are no more lines."""
    knows, ranks = load(sys.argv[1]), int(sys.argv[2])
    for line in sys.stdin:
        context, past = (*map(int, line.split()), 0)[:2]
        try:
            if isinstance(knows, PartitionPredictor):
                found = knows.predict(context, ranks=ranks, past=past, fallback="cost-model")
            else:
                found = knows.lookup(context, ranks=ranks, past=past)
            partition, source = found.partition, found.source
        except OutOfRangeError:
            partition, source = Partition.even(context, ranks, past=past), "even"
        print(partition, source, flush=True)


if __name__ == "__main__":
    main()
