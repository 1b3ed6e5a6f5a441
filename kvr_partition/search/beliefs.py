"""What to expect of any partition after some measurements."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import ttft
from kvr_partition.measurement import Measurement
from kvr_partition.search.compute_times import TERM_SPREAD
from kvr_partition.search.correction import Corrected, corrected
from kvr_partition.search.measured import noise_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LEAST_SURFACE = 0.003
"""Least relative standard deviation of the residual surface, which the corrected schedule leaves."""

SMOOTH_SHARES, LENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0), (0.3, 0.1, 1.0)
"""Grids of the share of what is left over that is a surface, and of its length scale in average chunks; the usual
length first."""

CLEAR = 3.0
"""Standard errors by which a measurement is faster beyond doubt."""


@dataclass(frozen=True)
class Beliefs:
    """TTFT of any partition as expected after some measurements.

    The corrected machine's schedule, times a smooth factor for what it does not explain: a Gaussian process
    over boundaries in units of the average chunk.
    """

    machine: Machine
    context: int
    measured: tuple[Measurement, ...]
    _process: Any
    _offset: float
    _found: Corrected

    @classmethod
    def after(cls, machine: Machine, context: int, measurements: Sequence[Measurement]) -> Beliefs:
        """What to believe after these measurements; failed ones say nothing."""
        import numpy as np
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel

        timed = tuple(measurement for measurement in measurements if measurement.ok)
        found = corrected(machine, timed)
        if not timed:
            return cls(found.machine, context, timed, None, 0.0, found)
        sizes = np.array([measurement.sizes for measurement in timed], dtype=float)
        took = np.log([measurement.ttft_s for measurement in timed]) - found.drift
        residual = took - np.log(ttft(sizes, found.machine))
        noise = np.array([noise_of(measurement) for measurement in timed])
        # Only what scatters by more than noise would in all likelihood is worth a surface of its own.
        by_chance = float((noise**2).mean()) * (1 + 2 * math.sqrt(2 / max(1, len(timed) - 1)))
        beyond = max(0.0, float(residual.var()) - by_chance)
        best: Any = None
        for smooth, length in itertools.product(SMOOTH_SHARES, LENGTHS):
            # Neighbours that differ speak of scatter from one measurement to the next, not of a surface.
            alpha = noise**2 + (1 - smooth) * beyond
            spread = max(LEAST_SURFACE, math.sqrt(smooth * beyond))
            kernel = ConstantKernel(spread**2, "fixed") * RBF(length, "fixed")
            process = GaussianProcessRegressor(kernel, alpha=alpha, optimizer=None)
            offset = float(np.average(residual, weights=1 / alpha))
            process.fit(_places(sizes), residual - offset)
            likely = process.log_marginal_likelihood_value_ - 0.5 * math.log(length / LENGTHS[0]) ** 2
            if best is None or likely > best[0]:
                best = likely, process, offset
        _, process, offset = best
        return cls(found.machine, context, timed, process, offset, found)

    def ttft_s(self, sizes: Any) -> tuple[Array, Array]:
        """Expected TTFT in seconds of partitions ``[n, ranks]``, and its relative uncertainty."""
        import numpy as np

        table = np.asarray(sizes, dtype=float)
        simulated = ttft(table, self.machine)
        if self._process is None:
            return simulated, np.full(len(table), TERM_SPREAD)
        shift, spread = self._process.predict(_places(table), return_std=True)
        found = self._found
        if found.size_effect_spread:
            unknown = ~np.isin(table, found.measured_sizes).all(axis=1)
            spread = np.hypot(spread, found.size_effect_spread * unknown)
        if found.doubt is not None:
            spread = np.hypot(spread, found.doubt.of(table, self.machine.past))
        return simulated * self.unmeasured_delay(table) * np.exp(shift + self._offset), spread

    def unmeasured_delay(self, sizes: Any) -> Array:
        """Factor by which chunk sizes never measured are expected to slow partitions ``[n, ranks]`` down."""
        import numpy as np

        found = self._found
        factors: Array = np.exp(found.size_effect_spread * expected_maximum(sizes, found.measured_sizes))
        return factors

    def ranked(self) -> list[Measurement]:
        """What was measured, the one expected to be fastest first: a lucky sample does not win by itself.

        Nothing comes before what was measured to be faster by far more than noise.
        """
        if not self.measured:
            return []
        expected, _ = self.ttft_s([measurement.sizes for measurement in self.measured])
        faster = self._clearly_faster()
        left = [int(at) for at in expected.argsort(kind="stable")]
        ranked = []
        while left:
            first = next(at for at in left if not faster[left, at].any())
            left.remove(first)
            ranked.append(self.measured[first])
        return ranked

    def _clearly_faster(self) -> Any:
        """Whether each was faster than each other one by their times alone, ``[measured, measured]``."""
        import numpy as np

        logs = np.log([measurement.ttft_s for measurement in self.measured])
        variance = np.array([noise_of(measurement) for measurement in self.measured]) ** 2 + self._found.between**2
        return logs[None, :] - logs[:, None] > CLEAR * np.sqrt(variance[:, None] + variance[None, :])


def expected_maximum(sizes: Any, measured_sizes: Iterable[int]) -> Array:
    """Expected maximum of the size effects of a partition's ranks, where some sizes were never measured.

    Ranks of a good split are expected to take equally long. The rank with the largest unknown size effect then
    sets the pace. Ranks of one size share its effect. Ranks of measured sizes take what is expected, so that an
    unknown size can only delay the others.

    Args:
        sizes: of partitions, ``[n, ranks]``.
        measured_sizes: chunk sizes whose effects are known.

    Returns:
        ``[n]``, in standard deviations of a size effect.
    """
    import numpy as np

    table = np.asarray(sizes, dtype=float)
    unknown = ~np.isin(table, list(measured_sizes))
    ordered = np.sort(np.where(unknown, table, -1.0), axis=1)
    different = (np.diff(ordered, axis=1, prepend=-1.0) > 0).sum(axis=1)
    alone, beside = _largest(table.shape[1])
    found: Array = np.where(unknown.all(axis=1), alone[different], beside[different])
    return found


@functools.cache
def _largest(most: int) -> tuple[Array, Array]:
    """Expected largest of 0 to ``most`` standard normal numbers, of them alone and of them and zero."""
    import numpy as np
    from scipy.integrate import trapezoid
    from scipy.special import ndtr

    places, count = np.linspace(0.0, 8.0, 1601), np.arange(most + 1)[:, None]
    beside = trapezoid(1 - ndtr(places) ** count, places)
    # Of none there is no largest; zero stands for it.
    alone = np.where(count[:, 0] > 0, beside - trapezoid(ndtr(-places) ** count, places), 0.0)
    return alone, beside


def _places(sizes: Array) -> Array:
    import numpy as np

    ranks = sizes.shape[1]
    places: Array = np.cumsum(sizes, axis=1)[:, :-1] / sizes.sum(axis=1, keepdims=True) * ranks
    return places
