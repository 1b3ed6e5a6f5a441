"""What explains how long ranks computed: cost terms, speeds, drift, a smooth bend, size effects, and scatter.

All are normal in the logarithms of times, nearly. Their spreads are those that make the times most likely; how
large each of them is, is then solved for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvr_partition.machine.bend import Bend
from kvr_partition.machine.cost import multiples
from kvr_partition.machine.machine import Machine
from kvr_partition.measurement import Measurement
from kvr_partition.search.bends import Basis, Doubt
from kvr_partition.search.measured import median_of, noise_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TERM_SPREAD, SPEED_SPREAD = 0.2, 0.15
"""Prior standard deviations, as shares: of a cost term and of a rank's speed."""

DRIFT_SPREADS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
STEP_SPREADS = (0.0, 0.01, 0.02, 0.04, 0.08)
SCATTER_SPREADS = (0.0, 0.01, 0.02, 0.04)
BEND_SPREADS = (0.03, 0.1, 0.3)
"""Grids of relative spreads: of the whole machine's drift, of size effects, of all else, and of a bend."""

BEND_SCALES = ((0.4, 0.8), (0.15, 0.8))
"""Grid of a bend's scales, see `Bend`."""

PROFILED_WEIGHTS, USUAL_WEIGHT, WEIGHT_SPREAD = (0.0, 0.25, 0.5, 0.75, 1.0), 0.5, 0.35
"""Grid of exponents applied to profiled size effects; the usual exponent, and its prior's standard deviation.

Prefills show less than profiles do: ranks that share a GPU disturb each other when all run the same chunk at once.
"""

USUAL_DRIFT, USUAL_SCATTER, USUAL_STEP, USUAL_BEND = 3.0, 2.0, 0.05, 0.05
"""Usual drift and scatter between measurements, as multiples of those between samples; usual size effects and
bend, as shares."""

STRAINED = 2.0
"""Root mean square of what is solved for, in its prior standard deviations, from which on it is not believed."""

MOST_TIMES = 200
"""Rank times, at most about so many, that spreads are estimated from."""


@dataclass(frozen=True)
class Spreads:
    """Standard deviations, as shares.

    Attributes:
        drift: of the whole machine's speed, from one measurement to the next.
        step: of what chunks of a size take, from what is smooth in the size.
        scatter: of a rank's time, from one measurement to the next.
        bend: of what is smooth in the size of a chunk and in what it sees, from what the terms say.
        scale: which of `BEND_SCALES` the bend has.
    """

    drift: float = 0.0
    step: float = 0.0
    scatter: float = 0.0
    bend: float = 0.0
    scale: int = 0


class Unknowns(NamedTuple):
    """Most likely logarithms of what explains the times.

    Attributes:
        terms: of the four terms of the cost, relative to the prior's.
        slow: of each rank's slowness, relative to the prior's.
        drift: of each measurement; empty where there is none.
        bumps: of independent bumps, in spreads of the bend; empty where there is none.
        steps: of each different size; empty where sizes have no effect.
    """

    terms: Array
    slow: Array
    drift: Array
    bumps: Array
    steps: Array

    @property
    def strained(self) -> bool:
        """Whether they are far from what was expected of them: nothing that is known explains the times well."""
        import numpy as np

        off = np.concatenate([self.terms / TERM_SPREAD, self.slow / SPEED_SPREAD, self.bumps])
        return float(np.sqrt((off * off).mean())) > STRAINED


@dataclass(frozen=True)
class ComputeTimes:
    """How long ranks computed, ``[measurements, ranks]``, and what may explain it.

    Attributes:
        sizes: of chunks.
        terms: seconds of each term by the prior, ``[measurements, ranks, 4]``.
        noise: relative standard errors, ``[measurements, 1]``.
        logs: of the times, by the prior's speeds and contention.
        effects: logarithms of profiled size effects.
        different, which: sizes, and the number of each chunk's.
        bases: bumps of a bend, for each of `BEND_SCALES`.
        heights: of these at each chunk, ``[measurements, ranks, bumps]`` each.
    """

    sizes: Array
    terms: Array
    noise: Array
    logs: Array
    effects: Array
    different: Array
    which: Any
    bases: tuple[Basis, ...]
    heights: tuple[Array, ...]

    @classmethod
    def of(
        cls, machine: Machine, timed: Sequence[Measurement], slowness: Array, contention: Array
    ) -> ComputeTimes | None:
        """Those of measurements; None where some chunk takes no time.

        Args:
            machine: the prior.
            slowness: logarithms, of each rank.
            contention: factor on the times of each measurement.
        """
        import numpy as np

        cost = machine.cost
        sizes = np.array([measurement.sizes for measurement in timed], dtype=float)
        ranks = range(sizes.shape[1])
        pasts = np.array([[measurement.past] for measurement in timed], dtype=float)
        starts = pasts + np.cumsum(sizes, axis=1) - sizes
        terms = multiples(sizes, starts, machine.dense) * np.array(cost.terms[:4])
        took = np.array([[median_of(measurement, rank, "compute_s") for rank in ranks] for measurement in timed])
        if not (took > 0).all() or not (terms.sum(axis=-1) > 0).all():
            return None
        different, which = np.unique(sizes, return_inverse=True)
        bases = tuple(Basis.of(sizes, starts, scales) for scales in BEND_SCALES)
        return cls(
            sizes=sizes,
            terms=terms,
            noise=np.array([noise_of(measurement) for measurement in timed])[:, None],
            logs=np.log(took) - slowness - np.log(contention)[:, None],
            effects=np.log(cost.size_effect(sizes)),
            different=different,
            which=which.reshape(sizes.shape),
            bases=bases,
            heights=tuple(basis.heights(sizes, starts) for basis in bases),
        )

    def solved(self, weight: float, spreads: Spreads) -> Unknowns:
        """What most likely made the times.

        Args:
            weight: exponent of profiled size effects.
        """
        import numpy as np
        from scipy.optimize import least_squares

        count, ranks = self.sizes.shape
        known, heights = self.logs - weight * self.effects, self.heights[spreads.scale]
        counts = [4, ranks, count if spreads.drift else 0, heights.shape[-1] if spreads.bend else 0]
        ends = np.cumsum(counts)

        def unlikely(at: Array) -> Array:
            terms, slow, drift, bumps, steps = np.split(at, ends)
            expected = np.log(self.terms @ np.exp(terms)) + slow
            priors = [terms / TERM_SPREAD, slow / SPEED_SPREAD]
            if len(drift):
                expected = expected + drift[:, None]
                priors.append(drift / spreads.drift)
            if len(bumps):
                expected = expected + spreads.bend * (heights @ bumps)
                priors.append(bumps)
            if len(steps):
                expected = expected + steps[self.which]
                priors.append(steps / spreads.step)
            return np.concatenate([((expected - known) / np.hypot(self.noise, spreads.scatter)).ravel(), *priors])

        unknowns = int(ends[-1]) + (len(self.different) if spreads.step else 0)
        return Unknowns(*np.split(least_squares(unlikely, np.zeros(unknowns)).x, ends))

    def bend(self, found: Unknowns, spreads: Spreads) -> Bend | None:
        """The bend of what was solved for."""
        return self.bases[spreads.scale].bend(found.bumps * spreads.bend) if len(found.bumps) else None

    def doubt(self, spreads: Spreads) -> Doubt | None:
        """About the bend, once these times are known."""
        import numpy as np

        if not spreads.bend:
            return None
        noise = np.hypot(np.broadcast_to(self.noise, self.sizes.shape), max(spreads.scatter, spreads.step))
        return Doubt.after(spreads.bend, self.bases[spreads.scale], self.heights[spreads.scale], noise)

    def spreads(self, usual: float) -> tuple[Spreads, float]:
        """The most likely spreads, and the most likely exponent of profiled size effects.

        Args:
            usual: relative standard deviation from one sample to the next.
        """
        straight = itertools.starmap(Spreads, itertools.product(DRIFT_SPREADS, STEP_SPREADS, SCATTER_SPREADS))
        best = self._likeliest(usual, USUAL_WEIGHT, straight)
        grids = (best[1].drift,), STEP_SPREADS, SCATTER_SPREADS, BEND_SPREADS, range(len(BEND_SCALES))
        bent = itertools.starmap(Spreads, itertools.product(*grids))
        best = max(best, self._likeliest(usual, USUAL_WEIGHT, bent), key=_evidence)
        if self.effects.any():
            near_best = [dataclasses.replace(best[1], step=step) for step in STEP_SPREADS]
            best = max((self._likeliest(usual, weight, near_best) for weight in PROFILED_WEIGHTS), key=_evidence)
        return best[1:]

    def _likeliest(self, usual: float, weight: float, tried: Iterable[Spreads]) -> tuple[float, Spreads, float]:
        """The spreads, of some, that make these times the most likely: how likely, which, and the exponent.

        A wrong cost delays a rank whose chunk grows, and favours one whose chunk shrinks. Drift delays all ranks
        of a measurement. A size effect delays all chunks of a size, in every measurement; a bend also those of
        sizes nearby. Each is normal, so the logarithms of times are, with the sum of their covariances.
        """
        import numpy as np
        from scipy.linalg import cho_solve, cholesky

        known, shares = self._linear(weight)
        # Some of very many measurements say as much.
        some = slice(None, None, max(1, self.sizes.size // MOST_TIMES))
        left, shares, which = known[some].ravel(), shares[some].reshape(-1, 4), self.which[some].ravel()
        count = len(left)
        measurement, rank = np.divmod(np.arange(count), self.sizes.shape[1])
        # What all times have in common says nothing about how measurements differ.
        always = TERM_SPREAD**2 * shares @ shares.T + SPEED_SPREAD**2 * _alike(rank) + 1.0
        always = always + np.diag(self.noise[some][measurement, 0] ** 2)
        together, same_size, single = _alike(measurement), _alike(which), np.eye(count)
        flat = [heights[some].reshape(count, -1) for heights in self.heights]
        nearby = [heights @ heights.T for heights in flat]

        def evidence(spreads: Spreads) -> float:
            covariance = (
                always + spreads.drift**2 * together + spreads.step**2 * same_size + spreads.scatter**2 * single
            )
            if spreads.bend:
                covariance = covariance + spreads.bend**2 * nearby[spreads.scale]
            factor = cholesky(covariance, lower=True)
            likely = -0.5 * float(left @ cho_solve((factor, True), left)) - float(np.log(np.diag(factor)).sum())
            unusual = (
                spreads.drift / (USUAL_DRIFT * usual),
                spreads.scatter / (USUAL_SCATTER * usual),
                spreads.step / USUAL_STEP,
                spreads.bend / USUAL_BEND,
            )
            # What is unusual is unlikely, but not impossible.
            return likely - math.fsum(math.log1p(one * one) for one in unusual)

        likely, spreads = max(((evidence(spread), spread) for spread in tried), key=lambda one: one[0])
        return likely - 0.5 * ((weight - USUAL_WEIGHT) / WEIGHT_SPREAD) ** 2, spreads, weight

    def _linear(self, weight: float) -> tuple[Array, Array]:
        """Logarithms of the times, linear in those of the terms, and the share of each term in each time.

        Around what explains the times at first sight.
        """
        import numpy as np

        near = self.solved(weight, Spreads()).terms
        each = self.terms * np.exp(near)
        shares = each / each.sum(axis=-1, keepdims=True)
        return self.logs - weight * self.effects - np.log(each.sum(axis=-1)) + shares @ near, shares


def _evidence(found: tuple[float, Spreads, float]) -> float:
    return found[0]


def _alike(label: Any) -> Array:
    same: Array = (label[:, None] == label[None, :]).astype(float)
    return same
