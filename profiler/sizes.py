"""Which chunk sizes kernels like: a few layers of every size, timed before any partition is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from kvr_partition.machine.cost import LEAST_STEP, ChunkCost, size_effects_of
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.solve import best_split
from profiler.ranks import RankGroup
from profiler.store import ChunkLine, MeasurementLog, Records

LAYERS, ROUNDS = 4, 4
"""What is timed of each size, after a first round that does not count."""

ENOUGH_S = 3.0
"""Seconds of timed chunks, for sizes that take turns, after which one counted round is enough."""

TOGETHER = 16
"""Sizes timed in turn, as one batch: fewer than the recordings that SM-partition ranks keep."""

FINEST, LARGEST = 64, 128
"""Quanta up to which every size is timed, and up to which any is: sizes above the first are sampled more sparsely,
those above the second not at all. There a quantum changes less than the cost model is off, and timing takes the
longest."""

MARGIN, LEAST_MARGIN = 0.15, 2
"""How much chunks of a good split may differ from those of a guess: a share, at least so many quanta."""

LEAST_SIZES = 5
"""Sizes, at least, that a smooth cost is fitted to; size effects are what it leaves."""


def profile_chunk_sizes(
    group: RankGroup,
    machine: Machine,
    quanta: Mapping[int, int],
    log: MeasurementLog,
    on_chunk: Callable[[int], None] | None = None,
) -> Machine:
    """A machine with the effects of all chunk sizes that good splits of some contexts may have, timed.

    The same machine where kernels take single rows, or every quantum is too fine to matter to them.

    Args:
        machine: what chunks cost, about.
        quanta: by context, what boundaries are multiples of; it is for contexts between as well.
        on_chunk: told of each timed chunk.

    Raises:
        RankError: timing failed.
        PartitionError: a context too short for so many ranks.
    """
    coarse = {context: quantum for context, quantum in quanta.items() if quantum >= LEAST_STEP}
    if group.tile_rows == 1 or not coarse:
        return machine
    sizes = likely_sizes(machine, list(coarse), group.ranks, min(coarse.values()))
    time_sizes(group, sizes, log, on_chunk)
    return replace(machine, cost=with_size_effects(machine.cost, log.of_run(group.run)))


def likely_sizes(machine: Machine, contexts: Sequence[int], ranks: int, quantum: int) -> tuple[int, ...]:
    """Multiples of the quantum that chunks may have in good splits of these contexts, and of any between them.

    From `FINEST` quanta on every other one, and none beyond `LARGEST`.

    Args:
        machine: what chunks cost, about.
        quantum: what boundaries are multiples of.

    Raises:
        PartitionError: a context too short for so many ranks.
    """
    smooth = replace(machine, past=0, cost=replace(machine.cost, size_effects=()))
    least = min(best_split(min(contexts), ranks, smooth, quantum).sizes)
    most = max(best_split(max(contexts), ranks, smooth, quantum).sizes)
    low = max(1, math.floor(min(least * (1 - MARGIN), least - LEAST_MARGIN * quantum) / quantum))
    high = math.ceil(max(most * (1 + MARGIN), most + LEAST_MARGIN * quantum) / quantum)
    each = range(low, min(high, max(contexts) // quantum, LARGEST) + 1)
    return tuple(at * quantum for at in each if at < FINEST or at % 2 == 0)


def time_sizes(
    group: RankGroup,
    sizes: Sequence[int],
    log: MeasurementLog,
    on_chunk: Callable[[int], None] | None = None,
) -> None:
    """Time `LAYERS` layers of chunks of these sizes into a log, in turn, all ranks at once.

    What the log already has is not timed again.

    Args:
        on_chunk: told of each timed chunk.

    Raises:
        RankError: timing failed.
    """
    layers = min(LAYERS, len(group.windows) - 1)
    if layers < 1:
        return
    run = group.run
    records = log.of_run(run)
    # The longest first: what ranks set aside for it is enough for all.
    longest_first = sorted(sizes, reverse=True)
    for first in range(0, len(longest_first), TOGETHER):
        together = longest_first[first : first + TOGETHER]
        for turn in range(1 + ROUNDS):
            of = {
                size: [chunk for chunk in records.chunks if (chunk.chunk, chunk.layers) == (size, layers)]
                for size in together
            }
            known = {size: sum(not line.warmup for line in lines) for size, lines in of.items()}
            spent_s = math.fsum(max(line.seconds) for lines in of.values() for line in lines)
            missing = [size for size in together if known[size] < (1 if spent_s >= ENOUGH_S else ROUNDS)]
            for size in missing:
                seconds = tuple(one for one, _ in group.time_chunk(size, 0, layers=layers))
                log.append(ChunkLine(run, size, 0, turn == 0, seconds, layers=layers))
                if on_chunk is not None:
                    on_chunk(size)


def with_size_effects(cost: ChunkCost, records: Records) -> ChunkCost:
    """A cost with the size effects that `time_sizes` found; unchanged where too few sizes were timed."""
    times: dict[int, list[float]] = {}
    for line in records.chunks:
        if line.layers is not None and not line.warmup:
            each = math.fsum(line.seconds) / len(line.seconds) / line.layers
            times.setdefault(line.chunk, []).append(each)
    if len(times) < LEAST_SIZES:
        return cost
    # Whatever disturbs so short a run only makes it longer.
    return replace(cost, size_effects=size_effects_of([(size, min(taken)) for size, taken in times.items()]))
