"""Local search: two ranks exchange tokens until no exchange gains anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import ttft
from kvr_partition.partition import Partition

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Sizes = NDArray[np.int64]

MOST_EXCHANGES = 30
"""In a row, at most."""


def local_search(
    start: Partition,
    quantum: int,
    machine: Machine,
    delayed: Callable[[Sizes], Array],
    inside: Callable[[Sizes], Sizes] | None = None,
) -> Partition:
    """Where a local search ends, by a machine with size effects, from a partition that knows nothing of them.

    Args:
        start, quantum, inside: as in `descent`.
        machine: what a prefill costs.
        delayed: factor by which partitions ``[n, ranks]`` are expected to take longer for sizes never measured.
    """
    import numpy as np

    known = [size for size, _ in machine.cost.size_effects]

    def seconds(rows: Sizes) -> Array:
        return ttft(rows, machine) * delayed(rows)

    best = descent(np.array(start.sizes), quantum, seconds, known, inside)[-1]
    return Partition((int(size) for size in best), start.past)


def descent(
    start: Sizes,
    quantum: int,
    seconds: Callable[[Sizes], Array],
    known: Iterable[int] = (),
    inside: Callable[[Sizes], Sizes] | None = None,
) -> Sizes:
    """The partitions passed on the way, ``[n, ranks]``; the last is the best.

    With size effects, moving a boundary a little says nothing about moving it a little more, and a move
    that is good for one rank is bad for its neighbour: any two ranks may exchange one, two or four quanta, or what
    brings one of them to a size that is known.

    Args:
        start: chunk sizes ``[ranks]``, multiples of the quantum but for the last.
        seconds: of partitions ``[n, ranks]``.
        known: chunk sizes that were measured.
        inside: keeps those of some partitions that may be proposed; all without an empty chunk when None.
    """
    import numpy as np

    known = [size for size in known if size % quantum == 0]
    best, best_s = start, float(seconds(start[None, :])[0])
    passed = [best]
    for _ in range(MOST_EXCHANGES):
        tried = []
        for rank in range(len(start)):
            wanted = {int(best[rank]) + sign * steps * quantum for sign in (-1, 1) for steps in (1, 2, 4)}
            wanted |= {size for size in known if abs(size - best[rank]) <= best[rank] // 8}
            for other in range(len(start)):
                for size in wanted if other != rank else ():
                    row = best.copy()
                    row[rank], row[other] = size, best[other] + best[rank] - size
                    tried.append(row)
        if not tried:
            break
        rows = np.array(tried)
        rows = rows[(rows >= 1).all(axis=1)] if inside is None else inside(rows)
        if len(rows) == 0:
            break
        times = seconds(rows)
        at = int(times.argmin())
        if times[at] >= best_s * (1 - 1e-9):
            break
        best, best_s = rows[at], float(times[at])
        passed.append(best)
    return np.array(passed)
