"""Posterior of a machine, given measurements: cost terms, speeds, links and size effects."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from kvr_partition.machine.cost import ChunkCost, LinkCost, multiples
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import contention, ttft
from kvr_partition.measurement import Measurement, median

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TERM_SPREAD, SPEED_SPREAD, LINK_SPREAD, SHARE_SPREAD = 0.2, 0.15, 0.5, 0.25
"""Prior standard deviations, as shares: of a cost term, a rank's speed, a link and ``kv_share``."""

DRIFT_SPREADS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
STEP_SPREADS = (0.0, 0.01, 0.02, 0.04, 0.08)
SCATTER_SPREADS = (0.0, 0.01, 0.02, 0.04)
"""Grids of relative spreads: of the whole machine's drift, of size effects, and of all else."""

PROFILED_WEIGHTS, USUAL_WEIGHT, WEIGHT_SPREAD = (0.0, 0.25, 0.5, 0.75, 1.0), 0.5, 0.35
"""Grid of exponents applied to profiled size effects; the usual exponent, and its prior's standard deviation.

Prefills show less than profiles do: ranks that share a GPU disturb each other when all run the same chunk at once.
"""

USUAL_DRIFT, USUAL_SCATTER, USUAL_STEP = 3.0, 2.0, 0.05
"""Usual drift and scatter between measurements, as multiples of those between samples; usual size effects, as a
share."""

MOST_TIMES = 200
"""Rank times, at most about so many, that spreads are estimated from."""

LEAST_USUAL = 0.01
"""Least relative standard deviation between samples that is assumed; a few samples may differ by less."""

LONE_NOISE, LEAST_NOISE = 0.02, 1e-3
"""Relative standard error of a median: of one sample, and at least."""


def noise_of(measurement: Measurement) -> float:
    """Relative standard error of a measurement's median TTFT."""
    logs = [math.log(sample.ttft_s) for sample in measurement.samples]
    count = len(logs)
    if count < 3:
        return LONE_NOISE / math.sqrt(max(1, count))
    mean = math.fsum(logs) / count
    variance = math.fsum((log - mean) ** 2 for log in logs) / (count - 1)
    # A median of normal samples scatters a quarter more than their mean.
    return max(LEAST_NOISE, 1.25 * math.sqrt(variance / count))


@dataclass(frozen=True)
class Corrected:
    """The posterior of a machine.

    Attributes:
        machine: the most likely one, given how long ranks computed and links carried.
        drift: for each measurement the logarithm of the whole machine's slowness, relative to the average.
        size_effect_spread: standard deviation, as a share, of size effects around the prior's.
        measured_sizes: chunk sizes that were measured, whose effects are known.
    """

    machine: Machine
    drift: tuple[float, ...]
    size_effect_spread: float = 0.0
    measured_sizes: tuple[int, ...] = ()


def corrected(machine: Machine, measurements: Sequence[Measurement]) -> Corrected:
    """The posterior of a machine, given how long ranks computed and links carried.

    A maximum a posteriori estimate with log-normal priors on cost terms, ranks' speeds and links. A measurement in
    which all ranks are slower, by more than noise, is drift of the machine and changes no cost. Chunks of one size
    that are off alike in all measurements have a size effect.

    Args:
        machine: the prior.
    """
    timed = [
        measurement
        for measurement in measurements
        if measurement.ok and len(measurement.samples[0].ranks) == len(measurement.sizes)
    ]
    if not timed:
        return Corrected(_with_steps(machine, USUAL_WEIGHT), (0.0,) * len(measurements))
    found = _with_costs(machine, timed)
    with_links = _with_links(found.machine, timed)
    known = dict(zip(map(id, timed), found.drift, strict=True))
    drift = tuple(known.get(id(measurement), 0.0) for measurement in measurements)
    return Corrected(
        _with_kv_share(with_links, timed, found.drift), drift, found.size_effect_spread, found.measured_sizes
    )


def _with_steps(machine: Machine, weight: float) -> Machine:
    """The same with size effects raised to an exponent."""
    steps = tuple((size, factor**weight) for size, factor in machine.cost.size_effects)
    return replace(machine, cost=replace(machine.cost, size_effects=steps))


def _with_costs(machine: Machine, timed: Sequence[Measurement]) -> Corrected:
    import numpy as np
    from scipy.optimize import least_squares

    cost = machine.cost
    prices = np.array(cost.terms[:4])
    sizes = np.array([measurement.sizes for measurement in timed], dtype=float)
    pasts = np.array([[measurement.past] for measurement in timed], dtype=float)
    starts = pasts + np.cumsum(sizes, axis=1) - sizes
    terms = multiples(sizes, starts, machine.dense) * prices
    took = np.array(
        [
            [_median(measurement, rank, "compute_s") for rank in range(len(measurement.sizes))]
            for measurement in timed
        ]
    )
    if not (took > 0).all() or not (terms.sum(axis=-1) > 0).all():
        return Corrected(machine, (0.0,) * len(timed))
    noise = np.array([noise_of(measurement) for measurement in timed])[:, None]
    ranks = sizes.shape[1]
    slowness = np.log([machine.slowness(rank) for rank in range(ranks)])
    all_known = np.log(took) - slowness - np.log(_contentions(timed, machine))[:, None]
    profiled_effects = np.log(cost.size_effect(sizes))
    different, which = np.unique(sizes, return_inverse=True)
    which = which.reshape(sizes.shape)

    def solved(known: Array, spreads: _Spreads) -> tuple[Array, Array, Array, Array]:
        count = len(timed) if spreads.drift else 0
        ends = np.cumsum([4, ranks, count])

        def unlikely(at: Array) -> Array:
            cost_terms, slow, drift, steps = np.split(at, ends)
            expected = np.log(terms @ np.exp(cost_terms)) + slow
            priors = [cost_terms / TERM_SPREAD, slow / SPEED_SPREAD]
            if count:
                expected = expected + drift[:, None]
                priors.append(drift / spreads.drift)
            if len(steps):
                expected = expected + steps[which]
                priors.append(steps / spreads.step)
            return np.concatenate([((expected - known) / np.hypot(noise, spreads.scatter)).ravel(), *priors])

        unknowns = int(ends[-1]) + (len(different) if spreads.step else 0)
        cost_terms, slow, drift, steps = np.split(least_squares(unlikely, np.zeros(unknowns)).x, ends)
        return cost_terms, slow, drift, steps

    def likeliest(weight: float, tried: Iterable[_Spreads]) -> tuple[float, _Spreads, float]:
        known = all_known - weight * profiled_effects
        # Linear in the logarithms of the terms, nearly, around what explains the times at first sight.
        near = solved(known, _Spreads())[0]
        each = terms * np.exp(near)
        shares = each / each.sum(axis=-1, keepdims=True)
        linear = known - np.log(each.sum(axis=-1)) + shares @ near
        # Some of very many measurements say as much.
        some = slice(None, None, max(1, sizes.size // MOST_TIMES))
        evidence, spreads = _likeliest(linear[some], shares[some], which[some], noise[some], _usual(timed), tried)
        return evidence - 0.5 * ((weight - USUAL_WEIGHT) / WEIGHT_SPREAD) ** 2, spreads, weight

    spreads, weight = _Spreads(), USUAL_WEIGHT
    if len(timed) > 1 and ranks > 1:
        every = itertools.product(DRIFT_SPREADS, STEP_SPREADS, SCATTER_SPREADS)
        best = likeliest(weight, itertools.starmap(_Spreads, every))
        if profiled_effects.any():
            near_best = [dataclasses.replace(best[1], step=step) for step in STEP_SPREADS]
            best = max((likeliest(one, near_best) for one in PROFILED_WEIGHTS), key=lambda found: found[0])
        _, spreads, weight = best
    cost_terms, slow, drift, steps = solved(all_known - weight * profiled_effects, spreads)
    fixed, token, own_pair, prefix_pair = (float(one) for one in prices * np.exp(cost_terms))
    factors = dict(_with_steps(machine, weight).cost.size_effects)
    for size, step in zip(map(int, different), steps, strict=False):
        factors[size] = factors.get(size, 1.0) * math.exp(step)
    with_costs = replace(
        machine,
        cost=ChunkCost(fixed, token, own_pair, prefix_pair, cost.kv_share, tuple(sorted(factors.items()))),
        speeds=tuple(float(speed) for speed in np.exp(-(slowness + slow))),
    )
    drifted = tuple(float(share) for share in drift) if len(drift) else (0.0,) * len(timed)
    return Corrected(with_costs, drifted, spreads.step, tuple(map(int, different)))


@dataclass(frozen=True)
class _Spreads:
    """Standard deviations, as shares.

    Attributes:
        drift: of the whole machine's speed, from one measurement to the next.
        step: of what chunks of a size take, from what is smooth in the size.
        scatter: of a rank's time, from one measurement to the next.
    """

    drift: float = 0.0
    step: float = 0.0
    scatter: float = 0.0


def _likeliest(
    known: Array, shares: Array, which: Any, noise: Array, usual: float, tried: Iterable[_Spreads]
) -> tuple[float, _Spreads]:
    """The spreads, of some, that make these times the most likely.

    A wrong cost delays a rank whose chunk grows, and favours one whose chunk shrinks. Drift delays all ranks of a
    measurement. A size effect delays all chunks of a size, in every measurement. Each is normal, so that the
    logarithms of times are normal, with the sum of their covariances.

    Args:
        known: ``[measurements, ranks]``, logarithms of times, linear in those of the cost terms.
        shares: ``[measurements, ranks, 4]``, of each term in each time.
        which: ``[measurements, ranks]``, number of the chunk's size.
        noise: ``[measurements, 1]``, relative standard error.
        usual: relative standard deviation from one sample to the next.

    Returns:
        The logarithm of how likely the times are then, and the spreads.
    """
    import numpy as np
    from scipy.linalg import cho_solve, cholesky

    count, ranks = known.shape
    measurement, rank = np.divmod(np.arange(count * ranks), ranks)

    def alike(label: Any) -> Array:
        same: Array = (label[:, None] == label[None, :]).astype(float)
        return same

    flat = shares.reshape(-1, shares.shape[-1])
    always = TERM_SPREAD**2 * flat @ flat.T + SPEED_SPREAD**2 * alike(rank) + np.diag(noise[measurement, 0] ** 2)
    # What all times have in common says nothing about how measurements differ.
    always = always + 1.0
    together, same_size, single = alike(measurement), alike(which.ravel()), np.eye(count * ranks)

    def evidence(spreads: _Spreads) -> float:
        covariance = (
            always + spreads.drift**2 * together + spreads.step**2 * same_size + spreads.scatter**2 * single
        )
        factor = cholesky(covariance, lower=True)
        left = known.ravel()
        likely = -0.5 * float(left @ cho_solve((factor, True), left)) - float(np.log(np.diag(factor)).sum())
        unusual = (
            spreads.drift / (USUAL_DRIFT * usual),
            spreads.scatter / (USUAL_SCATTER * usual),
            spreads.step / USUAL_STEP,
        )
        # What is unusual is unlikely, but not impossible.
        return likely - math.fsum(math.log1p(one * one) for one in unusual)

    return max(((evidence(spread), spread) for spread in tried), key=lambda one: one[0])


def _usual(timed: Sequence[Measurement]) -> float:
    """Relative standard deviation from sample to sample, the median over measurements; at least `LEAST_USUAL`."""
    samples = [
        noise_of(measurement) * math.sqrt(len(measurement.samples)) / (1.25 if len(measurement.samples) > 2 else 1)
        for measurement in timed
    ]
    return max(LEAST_USUAL, median(samples))


def _with_links(machine: Machine, timed: Sequence[Measurement]) -> Machine:
    ranks = len(timed[0].sizes)
    logs: list[list[float]] = [[] for _ in range(ranks - 1)]
    rates: list[list[float]] = [[] for _ in range(ranks - 1)]
    for measurement in timed:
        for rank in range(ranks - 1):
            took, carried = _median(measurement, rank, "transfer_s"), _bytes_sent(machine, measurement.sizes, rank)
            expected = sum(nbytes * link.seconds_per_byte for nbytes, link in carried)
            total = sum(nbytes for nbytes, _ in carried)
            if took > 0 and total > 0:
                rates[rank].append(took / total)
                if expected > 0:
                    logs[rank].append(math.log(took / expected))

    def scaled(link: LinkCost, found: Sequence[float], rate: Sequence[float]) -> LinkCost:
        if link.seconds_per_byte == 0:
            return replace(link, seconds_per_byte=median(rate)) if rate else link
        weight = len(found) / (len(found) + (0.05 / LINK_SPREAD) ** 2)
        factor = math.exp(weight * sum(found) / len(found)) if found else 1.0
        return replace(link, seconds_per_byte=link.seconds_per_byte * factor)

    if machine.topology == "chain":
        links = tuple(scaled(machine.link_between(at, at + 1), logs[at], rates[at]) for at in range(ranks - 1))
        return replace(machine, link=links)
    # A fan-out's times are sums over links; only what all have in common can be told.
    together = [value for log in logs for value in log], [value for each in rates for value in each]
    if isinstance(machine.link, LinkCost):
        return replace(machine, link=scaled(machine.link, *together))
    return replace(machine, link=tuple(scaled(link, *together) for link in machine.link))


def _with_kv_share(machine: Machine, timed: Sequence[Measurement], drift: Sequence[float]) -> Machine:
    """How early a layer's KV is ready shows in nothing but TTFT itself."""
    import numpy as np

    share = machine.cost.kv_share
    if not 0 < share < 1:
        return machine
    took, noise = (
        np.log([measurement.ttft_s for measurement in timed]) - drift,
        np.array([noise_of(measurement) for measurement in timed]),
    )
    best = None
    for factor in np.exp(np.linspace(-2, 2, 21) * SHARE_SPREAD):
        tried = replace(machine, cost=replace(machine.cost, kv_share=min(0.95, share * float(factor))))
        off = (np.log(_simulated(timed, tried)) - took) / noise
        unlikely = float((off**2).sum()) + (math.log(factor) / SHARE_SPREAD) ** 2
        if best is None or unlikely < best[0]:
            best = unlikely, tried
    assert best is not None
    return best[1]


def _simulated(timed: Sequence[Measurement], machine: Machine) -> Array:
    """TTFT in seconds of each of these partitions, each behind its own past."""
    import numpy as np

    times = np.empty(len(timed))
    for past in {measurement.past for measurement in timed}:
        at = [index for index, one in enumerate(timed) if one.past == past]
        times[at] = ttft([timed[index].sizes for index in at], replace(machine, past=past))
    return times


def _contentions(timed: Sequence[Measurement], machine: Machine) -> Array:
    """`schedule.contention` of each of these partitions, each behind its own past."""
    import numpy as np

    return np.array(
        [contention([measurement.sizes], replace(machine, past=measurement.past))[0] for measurement in timed]
    )


def _bytes_sent(machine: Machine, sizes: Sequence[int], rank: int) -> list[tuple[float, LinkCost]]:
    """Bytes a rank puts on each of its links in one prefill."""
    row = machine.entry_bytes * machine.layers
    if machine.topology == "chain":
        return [(sum(sizes[: rank + 1]) * row, machine.link_between(rank, rank + 1))]
    return [(sizes[rank] * row, machine.link_between(rank, peer)) for peer in range(rank + 1, len(sizes))]


def _median(measurement: Measurement, rank: int, field: str) -> float:
    return median([getattr(sample.ranks[rank], field) for sample in measurement.samples])
