"""Smooth misfits of a cost: the bumps they are made of, and how far they may be off where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvr_partition.machine.bend import Bend, bend_places, bumps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MOST_BUMPS, LEAST_APART = 24, 0.25
"""Bumps of a bend at most, and how far apart they are at least, in length scales."""


@dataclass(frozen=True)
class Basis:
    """Bumps at chunks that were measured, made independent of each other.

    A bend is a Gaussian process with a covariance of bumps; the bumps stand for all chunks (Nyström's method).

    Attributes:
        scales: as in `Bend`.
        places: of the bumps, ``[bumps, 2]``.
        lower: Cholesky factor of how they correlate.
    """

    scales: tuple[float, float]
    places: Array
    lower: Array

    @classmethod
    def of(cls, sizes: Array, starts: Array, scales: tuple[float, float]) -> Basis:
        """For chunks of these sizes at these positions."""
        import numpy as np

        places = _far_apart(bend_places(sizes, starts, scales).reshape(-1, 2))
        return cls(scales, places, _cholesky(bumps(places, places) + 1e-6 * np.eye(len(places))))

    def heights(self, sizes: Any, starts: Any) -> Array:
        """Of independent bumps, at chunks ``[n, ranks]``: ``[n, ranks, bumps]``."""
        from scipy.linalg import solve_triangular

        raw = bumps(bend_places(sizes, starts, self.scales), self.places)
        heights: Array = solve_triangular(self.lower, raw.reshape(-1, len(self.places)).T, lower=True).T
        return heights.reshape(raw.shape)

    def bend(self, factors: Array) -> Bend:
        """The bend that is a sum of independent bumps, times these factors."""
        from scipy.linalg import solve_triangular

        weights = solve_triangular(self.lower, factors, lower=True, trans="T")
        places = tuple((float(size), float(seen)) for size, seen in self.places)
        return Bend(self.scales, places, tuple(map(float, weights)))


@dataclass(frozen=True, eq=False)
class Doubt:
    """How far a bend may be off.

    Attributes:
        spread: its standard deviation before anything was measured, as a share.
        basis: its bumps.
        precision: Cholesky factor of what measurements make the precision of its independent bumps.
    """

    spread: float
    basis: Basis
    precision: Array

    @classmethod
    def after(cls, spread: float, basis: Basis, heights: Array, noise: Array) -> Doubt:
        """What measurements leave of it, where nothing else explains their times.

        Args:
            heights: of the bumps at measured chunks, ``[n, ranks, bumps]``.
            noise: relative standard errors, ``[n, ranks]``.
        """
        import numpy as np

        scaled = (heights / noise[..., None]).reshape(-1, heights.shape[-1]) * spread
        precision = np.eye(scaled.shape[1]) + scaled.T @ scaled
        return cls(spread, basis, _cholesky(precision))

    def of(self, sizes: Any, past: int) -> Array:
        """Relative standard deviation of the least certain chunk of partitions ``[n, ranks]``."""
        import numpy as np

        table = np.asarray(sizes, dtype=float)
        found: Array = self.each(table, past + np.cumsum(table, axis=1) - table).max(axis=1)
        return found

    def each(self, sizes: Any, starts: Any) -> Array:
        """Relative standard deviation of chunks of these sizes at these positions, of any shape."""
        import numpy as np
        from scipy.linalg import solve_triangular

        heights = self.basis.heights(sizes, starts)
        flat = heights.reshape(-1, heights.shape[-1]).T
        # What no bump reaches is as uncertain as before; of the rest, what measurements leave.
        beyond = np.maximum(0.0, 1.0 - (flat * flat).sum(axis=0))
        left = solve_triangular(self.precision, flat, lower=True)
        found: Array = self.spread * np.sqrt(beyond + (left * left).sum(axis=0)).reshape(heights.shape[:-1])
        return found


def _cholesky(covariance: Array) -> Array:
    from scipy.linalg import cholesky

    lower: Array = cholesky(covariance, lower=True)
    return lower


def _far_apart(places: Array) -> Array:
    """Some of these places, each as far as can be from those before it; none next to another."""
    import numpy as np

    chosen = [0]
    distance = np.linalg.norm(places - places[0], axis=1)
    while len(chosen) < MOST_BUMPS and distance.max() > LEAST_APART:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(places - places[chosen[-1]], axis=1))
    return places[chosen]
