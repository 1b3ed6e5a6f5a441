"""Time a few chunks on this machine and fit what a chunk costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from kvr_partition.dtypes import DTYPES
from kvr_partition.errors import RankError
from kvr_partition.machine.cost import ChunkCost, FitError, LinkCost, TimedChunk
from kvr_partition.machine.machine import FREE_LINK, Machine
from kvr_partition.machine.profile import Profile
from kvr_partition.measurement import Measurement, median
from kvr_partition.partition import Partition
from kvr_partition.provenance import Provenance
from profiler.measure import Candidate
from profiler.models import Operations
from profiler.ranks import RankGroup
from profiler.sizes import with_size_effects
from profiler.store import GUESS, ChunkLine, KeptKV, LinkLine, MeasurementLog, OperationsLine, Records

LEAST_SAMPLES, MOST_SAMPLES = 3, 7

ENOUGH_S = 20.0
"""Seconds of timed chunks after which fewer samples will do, where they determine a cost."""

LINK_BYTES, LINK_REPEATS = (1 << 12, 1 << 18, 1 << 22, 1 << 24), 7
"""Messages that links are timed with."""


def chunk_design(context: int, ranks: int) -> list[tuple[int, int]]:
    """(chunk, prefix) points that tell the terms of a chunk's cost apart, for contexts up to ``context``.

    Chunks of a quarter, a half and the whole of the even chunk, each behind no prefix, behind half the
    prefix of the last rank and behind all of it; and a first chunk half as long again, as uneven splits have.
    """
    even = _even_chunk(context, ranks)
    far = max(context - even, 2)
    points = [(chunk, prefix) for chunk in (even // 4, even // 2, even) for prefix in (0, far // 2, far)]
    longer = min(even + even // 2, context)
    return [*points, (longer, 0)] if longer > even else points


def _even_chunk(context: int, ranks: int) -> int:
    return max(context // ranks, 8)


def time_point(
    group: RankGroup, context: int, chunk: int, prefix: int, log: MeasurementLog, *, warmup: bool
) -> None:
    """Time one point of `chunk_design` into a log.

    The even chunk without prefix is then timed once more on the first rank alone, where ranks share hardware: how
    much faster that is, compared with the time right before, is what sharing costs.

    Raises:
        RankError: timing failed.
    """
    run = group.run
    even = (chunk, prefix) == (_even_chunk(context, group.ranks), 0)
    shared = even and group.ranks > 1 and group.shares_hardware
    for alone in (False, True) if shared else (False,):
        timed = group.time_chunk(chunk, prefix, alone=alone)
        seconds, first_kv_s = (tuple(part) for part in zip(*timed, strict=True))
        log.append(ChunkLine(run, chunk, prefix, warmup, seconds, first_kv_s, alone))


def calibrate(
    group: RankGroup,
    context: int,
    log: MeasurementLog,
    on_chunk: Callable[[int, int], None] | None = None,
) -> ChunkCost:
    """Time the points of `chunk_design`, interleaved, all ranks at once as in a prefill; fit a cost.

    Times that the log already has, under these conditions, are used and not taken again. While the fit is refused
    as too uncertain, more samples are taken, up to `MOST_SAMPLES` of each point. Chunks that take long are timed
    less often: they have more to average over.

    Args:
        context: the longest context the cost is for, in tokens.
        on_chunk: told of each timed chunk and prefix.

    Raises:
        RankError: timing failed.
        FitError: the times do not determine a cost.
    """
    points = chunk_design(context, group.ranks)
    records = log.of_run(group.run)
    warm = False
    for wanted in range(1, MOST_SAMPLES + 1):
        while missing := [point for point in points if len(_seconds(records, *point)) < wanted]:
            for chunk, prefix in missing:
                time_point(group, context, chunk, prefix, log, warmup=not warm)
                if on_chunk is not None:
                    on_chunk(chunk, prefix)
            warm = True
        if wanted < LEAST_SAMPLES and _spent_s(records, points) < ENOUGH_S:
            continue
        try:
            return ChunkCost.fit([_timed(records, chunk, prefix, len(group.windows)) for chunk, prefix in points])
        except FitError:
            if wanted == MOST_SAMPLES:
                raise
    raise AssertionError("the last round returns or raises")


def keep_samples(profile: Profile, log: MeasurementLog, run: str) -> None:
    """Put the samples of a profile into a log, once, so that whoever reads it knows what chunks and links cost.

    Args:
        run: of the log, under the same conditions.
    """
    known = {(line.chunk, line.prefix, line.seconds) for line in log.of_run(run).chunks}
    for chunk in profile.chunk_samples:
        if (chunk.chunk, chunk.prefix, chunk.seconds) not in known:
            log.append(
                ChunkLine(
                    run,
                    chunk.chunk,
                    chunk.prefix,
                    False,
                    chunk.seconds,
                    chunk.first_kv_s,
                    chunk.alone,
                    chunk.layers,
                )
            )
    links = {line.nbytes for line in log.of_run(run).links if not line.warmup}
    for link in profile.link_samples:
        if link.nbytes not in links:
            log.append(LinkLine(run, link.nbytes, False, link.seconds))


def _together(records: Records) -> list[ChunkLine]:
    """Whole chunks that count, timed with all ranks at work."""
    return [line for line in records.chunks if not line.warmup and not line.alone and line.layers is None]


def _timed(records: Records, chunk: int, prefix: int, layers: int) -> TimedChunk:
    lines = [line for line in _together(records) if (line.chunk, line.prefix) == (chunk, prefix)]
    first = [_mean(line.first_kv_s) for line in lines if line.first_kv_s and min(line.first_kv_s) > 0]
    return TimedChunk(
        chunk, prefix, median(_seconds(records, chunk, prefix)), median(first) if first else None, layers
    )


def rank_speeds(records: Records, ranks: int) -> tuple[float, ...]:
    """Of each rank, relative to the mean of all in each timed chunk, which is what costs are fitted to."""
    lines = [line for line in _together(records) if len(line.seconds) == ranks]
    if not lines:
        return (1.0,) * ranks
    return tuple(median([_mean(line.seconds) / line.seconds[rank] for line in lines]) for rank in range(ranks))


def time_links(group: RankGroup, log: MeasurementLog) -> tuple[LinkCost, ...]:
    """Latency and bandwidth of the link from each rank to the next; what the log has is not timed again.

    Raises:
        RankError: timing failed.
        FitError: the times explain no link.
    """
    run = group.run
    records = log.of_run(run)
    known = {line.nbytes for line in records.links if not line.warmup}
    for nbytes in LINK_BYTES:
        if nbytes not in known:
            for warmup in (True, False):
                seconds = tuple(group.time_links(nbytes, LINK_REPEATS))
                log.append(LinkLine(run, nbytes, warmup, seconds))
    return _links(records, group.ranks)


def timed_links(group: RankGroup) -> tuple[LinkCost, ...]:
    """The same, without a log.

    Raises:
        RankError: timing failed.
        FitError: the times explain no link.
    """
    timed = []
    for nbytes in LINK_BYTES:
        group.time_links(nbytes, LINK_REPEATS)
        timed.append((nbytes, group.time_links(nbytes, LINK_REPEATS)))
    return tuple(
        LinkCost.fit([(nbytes, median(seconds[at])) for nbytes, seconds in timed]) for at in range(group.ranks - 1)
    )


def rough_machine(group: RankGroup, found: Measurement) -> Machine:
    """A machine with guessed costs and timed links, to judge waits by where no chunk was timed.

    Args:
        found: of one rank, or of all.

    Raises:
        RankError: timing failed.
        FitError: the times explain no link.
    """
    cost = _guessed_cost(group.operations, found, group.backend, group.ranks)
    return replace(_guess(group, cost), link=timed_links(group))


def _guess(group: RankGroup, cost: ChunkCost) -> Machine:
    return Machine(
        cost,
        len(group.windows),
        group.entry_bytes,
        topology="fanout" if group.topology == "fanout" else "chain",
        overlap=group.resolved_depth == "attention",
    )


def _solo_speedup(records: Records) -> float:
    """How much faster the first rank is while all others are idle; 1 where nothing was timed alone."""
    ratios = []
    before: ChunkLine | None = None
    for line in records.chunks:
        if line.layers is not None:
            continue
        same = before is not None and (line.chunk, line.prefix) == (before.chunk, before.prefix)
        if line.alone and not line.warmup and before is not None and same:
            ratios.append(before.seconds[0] / line.seconds[0])
        before = line
    return max(1.0, median(ratios)) if ratios else 1.0


def _links(records: Records, ranks: int) -> tuple[LinkCost, ...]:
    lines = [line for line in records.links if not line.warmup]
    return tuple(
        LinkCost.fit([(line.nbytes, median(line.seconds[at])) for line in lines]) for at in range(ranks - 1)
    )


def guessed_machine(group: RankGroup, context: int, measure: Callable[[Candidate], Measurement]) -> Machine:
    """A guess from what one rank alone takes, dealt to matrix products and attention by their operations.

    Where one rank cannot read the whole context, all of them together are asked for what they compute.

    Args:
        context: tokens of the prompt.
        measure: times a candidate.

    Raises:
        RankError: neither could be timed.
    """
    found = alone = measure(Candidate.single(context))
    if not alone.ok:
        found = measure(Candidate("kvr", Partition.even(context, group.ranks)))
        if not found.ok:
            raise RankError(f"there is nothing to guess costs from: {alone.failure}; {found.failure}")
    counted = group.operations
    if group.log is not None and group.log.of_run(group.run).operations is None:
        group.log.append(OperationsLine(group.run, counted.per_token, counted.per_pair, counted.before_kv))
    return _guess(group, _guessed_cost(counted, found, group.backend, group.ranks))


def guessed_machine_of_log(
    log: MeasurementLog, origin: Provenance, counted: Operations | OperationsLine
) -> Machine:
    """The guess of `guessed_machine`, anew from a log, without ranks.

    Args:
        counted: the model's operation counts; those of the log, if it has any.

    Raises:
        FitError: the log has nothing to guess from.
    """
    records = log.under(origin)
    guesses = [measurement for measurement in records.measurements(GUESS) if measurement.ok]
    if not guesses:
        raise FitError("neither one rank nor an even split was timed to guess costs from")
    cost = _guessed_cost(counted, guesses[-1], origin.backend, origin.ranks)
    return _machine_of(records, origin, with_size_effects(cost, records))


def _guessed_cost(counted: Operations | OperationsLine, found: Measurement, backend: str, ranks: int) -> ChunkCost:
    """Of what one rank takes for a whole context, or all together compute for it."""
    if found.method == "single":
        # A rank with a part of a GPU is so much slower than all of it.
        seconds = found.ttft_s * (ranks if backend == "sm" else 1)
    else:
        seconds = math.fsum(
            median([sample.ranks[rank].compute_s for sample in found.samples]) for rank in range(ranks)
        )
    context = found.partition.context
    per_operation = seconds / (context * counted.per_token + context * context / 2 * counted.per_pair)
    pair = counted.per_pair * per_operation
    return ChunkCost(0.0, counted.per_token * per_operation, pair, pair, counted.before_kv)


def machine_of_log(log: MeasurementLog, origin: Provenance) -> Machine:
    """The prior of the search that wrote a log, without ranks: profiled, or else guessed.

    Raises:
        FitError: the log has no timed chunks and links, or they do not determine it, and there is no guess.
    """
    records = log.under(origin)
    points = list(dict.fromkeys((line.chunk, line.prefix) for line in _together(records)))
    layers = _kept(records, origin).layers
    try:
        cost = ChunkCost.fit([_timed(records, chunk, prefix, layers) for chunk, prefix in points])
        link = _links(records, origin.ranks) if origin.ranks > 1 else FREE_LINK
    except FitError:
        if records.operations is None:
            raise
        return guessed_machine_of_log(log, origin, records.operations)
    return replace(
        _machine_of(records, origin, with_size_effects(cost, records)),
        link=link,
        speeds=rank_speeds(records, origin.ranks),
        solo_speedup=_solo_speedup(records),
    )


def _kept(records: Records, origin: Provenance) -> KeptKV:
    """What a model keeps of a token: as the log says, else as its configuration does."""
    if records.kept is not None:
        return records.kept
    shape = origin.model
    width = DTYPES[origin.dtype].nbytes
    return KeptKV(shape.layers, 2 * shape.kv_heads * shape.head_dim * width * origin.batch)


def _machine_of(records: Records, origin: Provenance, cost: ChunkCost) -> Machine:
    """What conditions say of a machine."""
    kept = _kept(records, origin)
    return Machine(
        cost,
        kept.layers,
        kept.entry_bytes,
        topology="fanout" if origin.topology == "fanout" else "chain",
        overlap=origin.depth == "attention",
    )


def measured_machine(
    group: RankGroup,
    context: int,
    log: MeasurementLog,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Machine:
    """Everything about a machine that a schedule depends on, timed: chunks, ranks and links.

    Raises:
        RankError: timing failed.
        FitError: the times do not determine it.
    """
    cost = calibrate(group, context, log, on_chunk)
    records = log.of_run(group.run)
    return Machine(
        cost=cost,
        layers=len(group.windows),
        entry_bytes=group.entry_bytes,
        link=time_links(group, log) if group.ranks > 1 else FREE_LINK,
        speeds=rank_speeds(records, group.ranks),
        topology="fanout" if group.topology == "fanout" else "chain",
        overlap=group.resolved_depth == "attention",
        solo_speedup=_solo_speedup(records),
    )


def _seconds(records: Records, chunk: int, prefix: int) -> list[float]:
    """Times of a chunk, the mean of all ranks in each sample, which is what a rank of speed 1 takes.

    All ranks are busy at once, as in a prefill: a rank alone is faster than beside the others.
    """
    return [_mean(line.seconds) for line in _together(records) if (line.chunk, line.prefix) == (chunk, prefix)]


def _spent_s(records: Records, points: Sequence[tuple[int, int]]) -> float:
    """On chunks of these points, warm-ups included."""
    return math.fsum(max(line.seconds) for line in records.chunks if (line.chunk, line.prefix) in points)


def _mean(seconds: Sequence[float]) -> float:
    """Geometric, so that speeds multiply to 1."""
    return math.exp(math.fsum(math.log(second) for second in seconds) / len(seconds))
