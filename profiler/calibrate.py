"""Time a few chunks on this machine and fit what a chunk costs."""

from __future__ import annotations

from collections.abc import Callable

from kvr_partition.cost import ChunkCost, FitError, TimedChunk
from kvr_partition.measurement import median
from profiler.ranks import RankGroup
from profiler.store import ChunkLine, MeasurementLog

LEAST_SAMPLES, MOST_SAMPLES = 3, 7


def chunk_design(context: int, ranks: int) -> list[tuple[int, int]]:
    """(chunk, prefix) points that tell the terms of a chunk's cost apart, for contexts up to ``context``.

    Chunks of a quarter, a half and the whole of the even chunk, each behind no prefix, behind half the
    prefix of the last rank and behind all of it.
    """
    even = max(context // ranks, 8)
    far = max(context - even, 2)
    return [(chunk, prefix) for chunk in (even // 4, even // 2, even) for prefix in (0, far // 2, far)]


def calibrate(
    group: RankGroup,
    context: int,
    log: MeasurementLog,
    on_chunk: Callable[[int, int], None] | None = None,
) -> ChunkCost:
    """Time the points of `chunk_design`, interleaved, all ranks at once as in a prefill; fit a cost.

    Times that the log already has are used and not taken again. While the fit is refused as too
    uncertain, more samples are taken, up to `MOST_SAMPLES` of each point.

    Args:
        context: the longest context the cost is for, in tokens.
        on_chunk: told of each timed chunk and prefix.

    Raises:
        RankError: timing failed.
        FitError: the times do not determine a cost.
    """
    points = chunk_design(context, group.ranks)
    run = group.run
    warm = False
    for wanted in range(LEAST_SAMPLES, MOST_SAMPLES + 1):
        while missing := [point for point in points if len(_seconds(log, *point)) < wanted]:
            for chunk, prefix in missing:
                log.append(ChunkLine(run, chunk, prefix, not warm, tuple(group.time_chunk(chunk, prefix))))
                if on_chunk is not None:
                    on_chunk(chunk, prefix)
            warm = True
        try:
            return ChunkCost.fit([TimedChunk(c, s, median(_seconds(log, c, s))) for c, s in points])
        except FitError:
            if wanted == MOST_SAMPLES:
                raise
    raise AssertionError("the last round returns or raises")


def _seconds(log: MeasurementLog, chunk: int, prefix: int) -> list[float]:
    """Times of a chunk, the slowest rank of each sample: a rank alone is faster than beside the others."""
    return [
        max(line.seconds)
        for line in log.chunks
        if (line.chunk, line.prefix) == (chunk, prefix) and not line.warmup
    ]
