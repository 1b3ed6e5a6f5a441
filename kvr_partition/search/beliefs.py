"""What to expect of any partition after some measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvr_partition.measurement import Measurement
from kvr_partition.schedule import Setting, ttft
from kvr_partition.search.correction import TERM_SPREAD, corrected, noise_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LEAST_SURFACE = 0.003
"""How far, as a share, the corrected schedule may still be off from place to place, at least."""


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
            shift = shift + self._step_spread * largest_of(unknown)
            spread = np.hypot(spread, self._step_spread * (unknown > 0))
        return simulated * np.exp(shift + self._offset), spread

    def ranked(self) -> list[Measurement]:
        """What was measured, the one expected to be fastest first: a lucky sample does not win by itself."""
        if not self.measured:
            return []
        expected, _ = self.ttft_s([one.sizes for one in self.measured])
        return [self.measured[at] for at in expected.argsort(kind="stable")]


def largest_of(count: Any) -> Array:
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
