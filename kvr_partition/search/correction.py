"""Posterior of a machine, given measurements: cost terms, speeds, links, a bend and size effects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from kvr_partition.machine.bend import BentCost
from kvr_partition.machine.cost import LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import contention, ttft
from kvr_partition.measurement import Measurement, median
from kvr_partition.search.bends import Doubt
from kvr_partition.search.compute_times import USUAL_DRIFT, USUAL_WEIGHT, ComputeTimes, Spreads
from kvr_partition.search.measured import median_of, noise_of, usual_noise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LINK_SPREAD, SHARE_SPREAD = 0.5, 0.25
"""Prior standard deviations, as shares: of a link's rate and of ``kv_share``."""


@dataclass(frozen=True)
class Corrected:
    """The posterior of a machine.

    Attributes:
        machine: the most likely one, given how long ranks computed and links carried.
        drift: for each measurement the logarithm of the whole machine's slowness, relative to the average.
        size_effect_spread: standard deviation, as a share, of size effects around the prior's.
        measured_sizes: chunk sizes that were measured, whose effects are known.
        doubt: about the bend, where measurements show one.
        between: relative standard deviation from one measurement to the next, beyond that between samples. No more
            than is usual, given that, where nothing explains the times well: it need not be drift then.
    """

    machine: Machine
    drift: tuple[float, ...]
    size_effect_spread: float = 0.0
    measured_sizes: tuple[int, ...] = ()
    doubt: Doubt | None = None
    between: float = 0.0


def corrected(machine: Machine, measurements: Sequence[Measurement]) -> Corrected:
    """The posterior of a machine, given how long ranks computed and links carried.

    A maximum a posteriori estimate with log-normal priors on cost terms, ranks' speeds and links. A measurement in
    which all ranks are slower, by more than noise, is drift of the machine and changes no cost. Chunks of one size
    that are off alike in all measurements have a size effect; where those of sizes nearby are off, too, the cost
    has a bend.

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
        _with_kv_share(with_links, timed, found.drift),
        drift,
        found.size_effect_spread,
        found.measured_sizes,
        found.doubt,
        found.between,
    )


def _with_steps(machine: Machine, weight: float) -> Machine:
    """The same with size effects raised to an exponent."""
    steps = tuple((size, factor**weight) for size, factor in machine.cost.size_effects)
    return replace(machine, cost=replace(machine.cost, size_effects=steps))


def _with_costs(machine: Machine, timed: Sequence[Measurement]) -> Corrected:
    import numpy as np

    ranks = len(timed[0].sizes)
    slowness = np.log([machine.slowness(rank) for rank in range(ranks)])
    times = ComputeTimes.of(machine, timed, slowness, _contentions(timed, machine))
    if times is None:
        return Corrected(machine, (0.0,) * len(timed))
    spreads, weight = (
        times.spreads(usual_noise(timed)) if len(timed) > 1 and ranks > 1 else (Spreads(), USUAL_WEIGHT)
    )
    found = times.solved(weight, spreads)
    fixed, token, own, prefix = (float(term) for term in np.array(machine.cost.terms[:4]) * np.exp(found.terms))
    factors = dict(_with_steps(machine, weight).cost.size_effects)
    for size, step in zip(map(int, times.different), found.steps, strict=False):
        factors[size] = factors.get(size, 1.0) * math.exp(step)
    effects, bend = tuple(sorted(factors.items())), times.bend(found, spreads)
    posterior = replace(
        machine,
        cost=BentCost(fixed, token, own, prefix, machine.cost.kv_share, effects, bend),
        speeds=tuple(float(speed) for speed in np.exp(-(slowness + found.slow))),
    )
    drift = tuple(float(share) for share in found.drift) if len(found.drift) else (0.0,) * len(timed)
    sizes = tuple(map(int, times.different))
    between = math.hypot(spreads.drift, spreads.scatter)
    if found.strained:
        between = min(between, USUAL_DRIFT * usual_noise(timed))
    return Corrected(posterior, drift, spreads.step, sizes, times.doubt(spreads), between)


def _with_links(machine: Machine, timed: Sequence[Measurement]) -> Machine:
    ranks = len(timed[0].sizes)
    logs: list[list[float]] = [[] for _ in range(ranks - 1)]
    rates: list[list[float]] = [[] for _ in range(ranks - 1)]
    for measurement in timed:
        for rank in range(ranks - 1):
            took, carried = (
                median_of(measurement, rank, "transfer_s"),
                _bytes_sent(machine, measurement.sizes, rank),
            )
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
