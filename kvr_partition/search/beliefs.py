"""What measurements say about the cost model they were planned with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvr_partition.cost import ChunkCost, LinkCost
from kvr_partition.measurement import Measurement, median
from kvr_partition.schedule import Setting, ease, ttft

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TERM_SPREAD, SPEED_SPREAD, LINK_SPREAD, SHARE_SPREAD = 0.2, 0.15, 0.5, 0.25
"""How far, as a share, a cost term, a rank's speed, a link and ``kv_share`` may be off at first."""

LEAST_SURFACE = 0.003
"""How far, as a share, the corrected schedule may still be off from place to place, at least."""

STEP_PAIRS, LEAST_STEP = 6, 0.004
"""Pairs of measurements with a chunk size in common that it takes to believe in steps, and how large they are."""
FAR_BEYOND = 4.0
"""How many times the variance of noise is more than it scatters by."""

LONE_NOISE, LEAST_NOISE = 0.02, 1e-3
"""Relative standard error of a median: of one sample, and at least."""


def noise_of(measurement: Measurement) -> float:
    """Relative standard error of a measurement's median TTFT."""
    logs = [math.log(sample.ttft_s) for sample in measurement.samples]
    count = len(logs)
    if count < 3:
        return LONE_NOISE / math.sqrt(max(1, count))
    mean = math.fsum(logs) / count
    variance = math.fsum((one - mean) ** 2 for one in logs) / (count - 1)
    # A median of normal samples scatters a quarter more than their mean.
    return max(LEAST_NOISE, 1.25 * math.sqrt(variance / count))


@dataclass(frozen=True)
class Corrected:
    """What measurements say.

    Attributes:
        setting: the one that best explains how long ranks computed and links carried.
        drift: of each measurement the logarithm of how much slower the whole machine was than on average.
        step_spread: how far, as a share, chunks of one size are off from what is smooth in the size.
    """

    setting: Setting
    drift: tuple[float, ...]
    step_spread: float = 0.0


def corrected(setting: Setting, measurements: Sequence[Measurement]) -> Corrected:
    """The setting that best explains how long ranks computed and links carried, given where it came from.

    Each cost term, each rank's speed and each link may be off; what is measured decides how much, as far as
    it tells them apart (a maximum a posteriori estimate with log-normal spreads). Where all ranks were slower in
    one measurement than in another by more than noise, it was the machine, and no cost. Where chunks of the same
    size are off alike whenever they are measured, their sizes have steps.
    """
    timed = [one for one in measurements if one.ok and len(one.samples[0].ranks) == len(one.sizes)]
    if not timed:
        return Corrected(setting, (0.0,) * len(measurements))
    found = _with_costs(setting, timed)
    told = _with_links(found.setting, timed)
    known = dict(zip(map(id, timed), found.drift, strict=True))
    drift = tuple(known.get(id(one), 0.0) for one in measurements)
    return Corrected(_with_kv_share(told, timed, found.drift), drift, found.step_spread)


def _with_costs(setting: Setting, timed: Sequence[Measurement]) -> Corrected:
    import numpy as np
    from scipy.optimize import least_squares

    cost = setting.cost
    prices = np.array([cost.fixed_s, cost.per_token_s, cost.per_own_pair_s, cost.per_prefix_pair_s])
    sizes = np.array([one.sizes for one in timed], dtype=float)
    pasts = np.array([[one.past] for one in timed], dtype=float)
    starts = pasts + np.cumsum(sizes, axis=1) - sizes
    own = sizes * sizes * (1.0 if setting.dense else 0.5)
    terms = np.stack([np.ones_like(sizes), sizes, own, sizes * starts], axis=-1) * prices
    took = np.array([[_median(one, rank, "compute_s") for rank in range(len(one.sizes))] for one in timed])
    if not (took > 0).all() or not (terms.sum(axis=-1) > 0).all():
        return Corrected(setting, (0.0,) * len(timed))
    noise = np.array([noise_of(one) for one in timed])[:, None]
    ranks = sizes.shape[1]
    slowness = np.log([setting.slowness(rank) for rank in range(ranks)])
    known = np.log(took) - slowness - np.log(_eases(timed, setting))[:, None]
    drifts = _drift_spread(known - np.log(terms.sum(axis=-1)), float((noise**2).mean()))
    drifting = len(timed) if drifts else 0
    different, which = np.unique(sizes, return_inverse=True)
    which = which.reshape(sizes.shape)

    def parts(at: Array) -> tuple[Array, Array, Array, Array]:
        return at[:4], at[4 : 4 + ranks], at[4 + ranks : 4 + ranks + drifting], at[4 + ranks + drifting :]

    def off(at: Array) -> Array:
        cost_terms, slow, drift, steps = parts(at)
        expected = np.log(terms @ np.exp(cost_terms)) + slow
        if drifting:
            expected = expected + drift[:, None]
        if len(steps):
            expected = expected + steps[which]
        off_by: Array = expected - known
        return off_by

    def solved(step_spread: float) -> Array:
        def unlikely(at: Array) -> Array:
            cost_terms, slow, drift, steps = parts(at)
            spread = [cost_terms / TERM_SPREAD, slow / SPEED_SPREAD]
            spread += [drift / drifts] if drifting else []
            spread += [steps / step_spread] if len(steps) else []
            return np.concatenate([(off(at) / noise).ravel(), *spread])

        found: Array = least_squares(
            unlikely, np.zeros(4 + ranks + drifting + (len(different) if step_spread else 0))
        ).x
        return found

    found = solved(0.0)
    step_spread = _step_spread(-off(found), which, float((noise**2).mean()))
    if step_spread:
        found = solved(step_spread)
    cost_terms, slow, drift, steps = parts(found)
    fixed, token, own_pair, prefix_pair = (float(one) for one in prices * np.exp(cost_terms))
    factors = tuple((int(size), float(math.exp(step))) for size, step in zip(different, steps, strict=False))
    told = replace(
        setting,
        cost=ChunkCost(fixed, token, own_pair, prefix_pair, cost.kv_share, factors),
        speeds=tuple(float(one) for one in np.exp(-(slowness + slow))),
    )
    drifted = tuple(float(one) for one in drift) if drifting else (0.0,) * len(timed)
    return Corrected(told, drifted, step_spread)


def _step_spread(left: Array, which: Any, noise: float) -> float:
    """How far chunks of one size are off alike, whenever they are measured, as a share; 0 if not beyond chance.

    Until enough sizes were met twice, what scatters far beyond noise may be that.

    Args:
        left: ``[measurements, ranks]``, logarithm of what each rank took over what is expected of its chunk.
        which: the same of its size.
        noise: variance of each.
    """
    import itertools

    import numpy as np

    products = []
    for size in range(int(which.max()) + 1):
        there = which == size
        means = [float(left[at][there[at]].mean()) for at in range(len(left)) if there[at].any()]
        products += [one * other for one, other in itertools.combinations(means, 2)]
    if len(products) < STEP_PAIRS:
        # What was fitted has taken its part of the scatter.
        beyond = float((left**2).sum()) / max(1, left.size - 4 - left.shape[1]) - noise
        return math.sqrt(beyond) if beyond > max(FAR_BEYOND * noise, LEAST_STEP**2) else 0.0
    mean, error = float(np.mean(products)), float(np.std(products)) / math.sqrt(len(products))
    return math.sqrt(mean) if mean > max(2 * error, LEAST_STEP**2) else 0.0


def _drift_spread(off: Array, noise: float) -> float:
    """By how much the whole machine's speed varied between measurements, as a share; 0 if not beyond noise.

    A cost that is wrong makes one rank late when its chunk grows, and another early whose chunk then shrinks. Only
    drift makes all ranks late together, so what their lateness has in common is its variance.

    Args:
        off: ``[measurements, ranks]``, logarithm of what each rank took over what was expected.
        noise: variance of each.
    """
    import numpy as np

    count, ranks = off.shape
    if count < 3 or ranks < 2:
        return 0.0
    apart = off - off.mean(axis=0)
    together = apart.T @ apart / (count - 1)
    common = float((together.sum() - np.trace(together)) / (ranks * (ranks - 1)))
    return math.sqrt(common) if common > noise else 0.0


def _with_links(setting: Setting, timed: Sequence[Measurement]) -> Setting:
    ranks = len(timed[0].sizes)
    logs: list[list[float]] = [[] for _ in range(ranks - 1)]
    rates: list[list[float]] = [[] for _ in range(ranks - 1)]
    for one in timed:
        for rank in range(ranks - 1):
            took, carried = _median(one, rank, "transfer_s"), _bytes_sent(setting, one.sizes, rank)
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

    if setting.topology == "chain":
        links = tuple(scaled(setting.link_between(at, at + 1), logs[at], rates[at]) for at in range(ranks - 1))
        return replace(setting, link=links)
    # A fan-out's times are sums over links; only what all have in common can be told.
    together = [value for each in logs for value in each], [value for each in rates for value in each]
    if isinstance(setting.link, LinkCost):
        return replace(setting, link=scaled(setting.link, *together))
    return replace(setting, link=tuple(scaled(link, *together) for link in setting.link))


def _with_kv_share(setting: Setting, timed: Sequence[Measurement], drift: Sequence[float]) -> Setting:
    """How early a layer's KV is ready shows in nothing but TTFT itself."""
    import numpy as np

    share = setting.cost.kv_share
    if not 0 < share < 1:
        return setting
    took, noise = np.log([one.ttft_s for one in timed]) - drift, np.array([noise_of(one) for one in timed])
    best = None
    for factor in np.exp(np.linspace(-2, 2, 21) * SHARE_SPREAD):
        tried = replace(setting, cost=replace(setting.cost, kv_share=min(0.95, share * float(factor))))
        off = (np.log(_simulated(timed, tried)) - took) / noise
        unlikely = float((off**2).sum()) + (math.log(factor) / SHARE_SPREAD) ** 2
        if best is None or unlikely < best[0]:
            best = unlikely, tried
    assert best is not None
    return best[1]


def _simulated(timed: Sequence[Measurement], setting: Setting) -> Array:
    """TTFT in seconds of each of these partitions, each behind its own past."""
    import numpy as np

    times = np.empty(len(timed))
    for past in {one.past for one in timed}:
        at = [index for index, one in enumerate(timed) if one.past == past]
        times[at] = ttft([timed[index].sizes for index in at], replace(setting, past=past))
    return times


def _eases(timed: Sequence[Measurement], setting: Setting) -> Array:
    """`schedule.ease` of each of these partitions, each behind its own past."""
    import numpy as np

    return np.array([ease([one.sizes], replace(setting, past=one.past))[0] for one in timed])


def _bytes_sent(setting: Setting, sizes: Sequence[int], rank: int) -> list[tuple[float, LinkCost]]:
    """Bytes a rank puts on each of its links in one prefill."""
    row = setting.entry_bytes * setting.layers
    if setting.topology == "chain":
        return [(sum(sizes[: rank + 1]) * row, setting.link_between(rank, rank + 1))]
    return [(sizes[rank] * row, setting.link_between(rank, peer)) for peer in range(rank + 1, len(sizes))]


def _median(measurement: Measurement, rank: int, field: str) -> float:
    return median([getattr(sample.ranks[rank], field) for sample in measurement.samples])


@dataclass(frozen=True)
class Beliefs:
    """TTFT of any partition as expected after some measurements.

    The corrected setting's schedule, times a smooth factor for what it does not explain: a Gaussian process
    over boundaries in units of the average chunk.
    """

    setting: Setting
    context: int
    measured: tuple[Measurement, ...]
    _process: Any
    _offset: float
    _step_spread: float = 0.0

    @classmethod
    def after(cls, setting: Setting, context: int, measurements: Sequence[Measurement]) -> Beliefs:
        """What to believe after these measurements; failed ones say nothing."""
        import numpy as np
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel

        timed = tuple(one for one in measurements if one.ok)
        found = corrected(setting, timed)
        if not timed:
            return cls(found.setting, context, timed, None, 0.0)
        sizes = np.array([one.sizes for one in timed], dtype=float)
        took = np.log([one.ttft_s for one in timed]) - found.drift
        residual = took - np.log(ttft(sizes, found.setting))
        noise = np.array([noise_of(one) for one in timed])
        # Only what scatters by more than noise would in all likelihood is worth a surface of its own.
        by_chance = float((noise**2).mean()) * (1 + 2 * math.sqrt(2 / max(1, len(timed) - 1)))
        beyond = max(0.0, float(residual.var()) - by_chance)
        best: Any = None
        for smooth in (1.0, 0.75, 0.5, 0.25, 0.0):
            # Neighbours that differ speak of scatter from one measurement to the next, not of a surface.
            alpha = noise**2 + (1 - smooth) * beyond
            spread = max(LEAST_SURFACE, math.sqrt(smooth * beyond))
            kernel = ConstantKernel(spread**2, "fixed") * RBF(0.3, "fixed")
            process = GaussianProcessRegressor(kernel, alpha=alpha, optimizer=None)
            offset = float(np.average(residual, weights=1 / alpha))
            process.fit(_places(sizes), residual - offset)
            if best is None or process.log_marginal_likelihood_value_ > best[0].log_marginal_likelihood_value_:
                best = process, offset
        return cls(found.setting, context, timed, best[0], best[1], found.step_spread)

    def ttft_s(self, sizes: Any) -> tuple[Array, Array]:
        """Expected TTFT in seconds of partitions ``[n, ranks]``, and its relative uncertainty."""
        import numpy as np

        table = np.asarray(sizes, dtype=float)
        simulated = ttft(table, self.setting)
        if self._process is None:
            return simulated, np.full(len(table), TERM_SPREAD)
        shift, spread = self._process.predict(_places(table), return_std=True)
        if self._step_spread:
            # Of several ranks whose sizes were never met the one that was met worst sets the pace.
            known = [size for size, _ in self.setting.cost.steps]
            unknown = (~np.isin(table, known)).sum(axis=1)
            shift = shift + self._step_spread * _largest_of(unknown)
            spread = np.hypot(spread, self._step_spread * (unknown > 0))
        return simulated * np.exp(shift + self._offset), spread

    def ranked(self) -> list[Measurement]:
        """What was measured, the one expected to be fastest first: a lucky sample does not win by itself."""
        if not self.measured:
            return []
        expected, _ = self.ttft_s([one.sizes for one in self.measured])
        return [self.measured[at] for at in expected.argsort(kind="stable")]


def _largest_of(count: Any) -> Array:
    """Expected largest of so many standard normal numbers, after Blom; 0 of none."""
    import numpy as np
    from scipy.special import ndtri

    some = np.maximum(np.asarray(count, dtype=float), 1.0)
    largest: Array = np.where(np.asarray(count) > 1, ndtri((some - 0.375) / (some + 0.25)), 0.0)
    return largest


def _places(sizes: Array) -> Array:
    import numpy as np

    ranks = sizes.shape[1]
    places: Array = np.cumsum(sizes, axis=1)[:, :-1] / sizes.sum(axis=1, keepdims=True) * ranks
    return places
