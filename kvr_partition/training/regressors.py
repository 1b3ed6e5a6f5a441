"""Ways to predict a partition: the published one, the cost model, and regressions on either."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from msgspec.structs import replace

from kvr_partition.errors import OutOfRangeError
from kvr_partition.machine.cost import LEAST_STEP, ChunkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.partition import Partition
from kvr_partition.search.beliefs import expected_maximum
from kvr_partition.search.correction import corrected
from kvr_partition.search.local_search import local_search
from kvr_partition.training.dataset import MachineKey, Row
from kvr_partition.training.features import Query, features, places, solved

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


class Regressor(Protocol):
    """Learns from rows, then tells boundaries."""

    def fit(self, rows: Sequence[Row]) -> Regressor:
        """Learn; returns itself."""

    def cuts(self, query: Query) -> Sequence[float]:
        """Inner boundaries as shares of the context, growing.

        Raises:
            OutOfRangeError: nothing that was learnt answers this.
        """

    def sizes(self, query: Query, quantum: int) -> tuple[int, ...] | None:
        """The chunks, where single sizes are known to be fast or slow; None where `cuts` says it all."""


class _Smooth:
    """Knows nothing of single chunk sizes."""

    def sizes(self, query: Query, quantum: int) -> tuple[int, ...] | None:
        return None


def growing(cuts: Sequence[float]) -> list[float]:
    """The same boundaries with every chunk at least a fiftieth of the average one."""
    ranks = len(cuts) + 1
    least = 0.02 / ranks
    found: list[float] = []
    for at, cut in enumerate(cuts):
        low = (found[-1] if found else 0.0) + least
        found.append(min(max(cut, low), 1 - least * (ranks - 1 - at)))
    return found


class Interpolation(_Smooth):
    """KVR-P as published: linear between the nearest searched contexts of the same machine and past share."""

    def fit(self, rows: Sequence[Row]) -> Interpolation:
        self._series: dict[tuple[MachineKey, float], list[Row]] = {}
        for row in sorted(rows, key=lambda row: row.context):
            self._series.setdefault((row.machine, round(row.past_share, 6)), []).append(row)
        return self

    def cuts(self, query: Query) -> Sequence[float]:
        rows = self._series.get((query.machine, round(query.past_share, 6)), [])
        below = [row for row in rows if row.context <= query.context][-1:]
        above = [row for row in rows if row.context >= query.context][:1]
        if not below or not above:
            raise OutOfRangeError(f"no searched contexts on both sides of {query.context}")
        low, high = below[0], above[0]
        span = high.context - low.context
        weight = (query.context - low.context) / span if span else 0.0
        return [one + weight * (other - one) for one, other in zip(low.cuts, high.cuts, strict=True)]


def _with_size_effects(
    cuts: Sequence[float],
    query: Query,
    quantum: int,
    machine: Machine,
    measured_sizes: Iterable[int] = (),
    size_effect_spread: float = 0.0,
) -> tuple[int, ...] | None:
    """The best chunks near some boundaries, given size effects; None where no size has any."""
    if not machine.cost.size_effects or quantum < LEAST_STEP or query.context % quantum:
        return None
    import numpy as np

    def delayed(sizes: Any) -> Array:
        factors: Array = np.exp(size_effect_spread * expected_maximum(sizes, measured_sizes))
        return factors

    start = Partition.from_cuts(cuts, query.context, quantum)
    return local_search(start, quantum, machine, delayed).sizes


class CostModel:
    """The fitted cost model, solved anew for each context; learns nothing."""

    def fit(self, rows: Sequence[Row]) -> CostModel:
        return self

    def cuts(self, query: Query) -> Sequence[float]:
        return solved(query.prior.behind(query.past), query.context, query.ranks)

    def sizes(self, query: Query, quantum: int) -> tuple[int, ...] | None:
        return _with_size_effects(self.cuts(query), query, quantum, query.prior.behind(query.past))


@dataclass(frozen=True)
class _Learnt:
    """The posterior of a machine, and how it differs from the prior.

    Attributes:
        machine: without size effects. Boundaries are solved without: other contexts have other sizes.
        size_effects: profiled, or from measured prefills.
        measured_sizes, size_effect_spread: the sizes that were measured, and how far others may be off.
    """

    key: MachineKey
    machine: Machine
    terms: tuple[float, ...]
    """Logarithms, of the four cost terms and of ``kv_share``."""
    link: float
    size_effects: tuple[tuple[int, float], ...]
    measured_sizes: tuple[int, ...]
    size_effect_spread: float

    @classmethod
    def of(cls, key: MachineKey, rows: Sequence[Row]) -> _Learnt:
        prior = rows[0].prior
        learnt = corrected(prior, [trial for row in rows for trial in row.trials if trial.ok])
        effects = learnt.machine.cost.size_effects
        found = replace(learnt.machine, cost=learnt.machine.cost.smooth)
        ranks = key[4]
        links = [
            _log_ratio(
                found.link_between(at, at + 1).seconds_per_byte, prior.link_between(at, at + 1).seconds_per_byte
            )
            for at in range(ranks - 1)
        ]
        pairs = zip(found.cost.terms, prior.cost.terms, strict=True)
        terms = tuple(_log_ratio(*pair) for pair in pairs)
        return cls(
            key, found, terms, sum(links) / len(links), effects, learnt.measured_sizes, learnt.size_effect_spread
        )


def _log_ratio(value: float, base: float) -> float:
    return math.log(value / base) if value > 0 and base > 0 else 0.0


class Corrected:
    """The cost model as corrected by what was measured, solved anew for each context.

    A machine on which nothing was measured is taken to be off as others are: its cost terms as those of the
    same model on the same hardware, or else of other models on it; its links as those of the same bandwidth there.
    """

    def fit(self, rows: Sequence[Row]) -> Corrected:
        by_machine: dict[MachineKey, list[Row]] = {}
        for row in rows:
            by_machine.setdefault(row.machine, []).append(row)
        self._learnt = {key: _Learnt.of(key, of_it) for key, of_it in by_machine.items()}
        self._transferred: dict[MachineKey, Machine] = {}
        return self

    def machine(self, query: Query) -> Machine:
        """The measured machine; where nothing was measured, the prior shifted as on other machines."""
        known = self._learnt.get(query.machine)
        if known is not None:
            return replace(known.machine, past=query.past)
        if query.machine not in self._transferred:
            self._transferred[query.machine] = self._suggested(query)
        return replace(self._transferred[query.machine], past=query.past)

    def cuts(self, query: Query) -> Sequence[float]:
        return solved(self.machine(query), query.context, query.ranks)

    def sizes(self, query: Query, quantum: int) -> tuple[int, ...] | None:
        learnt = self._learnt.get(query.machine)
        if learnt is None:
            return None
        machine = self.machine(query)
        stepped = replace(machine, cost=replace(machine.cost, size_effects=learnt.size_effects))
        return _with_size_effects(
            self.cuts(query), query, quantum, stepped, learnt.measured_sizes, learnt.size_effect_spread
        )

    def _suggested(self, query: Query) -> Machine:
        hardware, model, bandwidth, _, _ = query.machine
        there = [learnt_there for learnt_there in self._learnt.values() if learnt_there.key[0] == hardware]
        same = [learnt_there for learnt_there in there if learnt_there.key[1] == model] or there
        links = [learnt_there.link for learnt_there in there if learnt_there.key[2] == bandwidth]
        prior = query.prior
        cost, link = prior.cost, prior.link
        if same:
            factors = [
                math.exp(sum(logs) / len(same))
                for logs in zip(*(learnt_there.terms for learnt_there in same), strict=True)
            ]
            terms = [term * factor for term, factor in zip(cost.terms, factors, strict=True)]
            cost = ChunkCost(terms[0], terms[1], terms[2], terms[3], min(0.95, terms[4]))
        if links and isinstance(link, tuple):
            factor = math.exp(sum(links) / len(links))
            link = tuple(replace(hop, seconds_per_byte=hop.seconds_per_byte * factor) for hop in link)
        return replace(prior, cost=cost, link=link)


class Residual(_Smooth):
    """What the corrected cost model leaves, as a smooth function of context and past share on each machine.

    Args:
        length: octaves of context, and quarters of past share, over which it changes.
        noise: how far a searched boundary scatters, as a share of what remains to be explained.
    """

    def __init__(self, length: float = 2.0, noise: float = 1.0) -> None:
        self._length = length
        self._noise = noise

    def fit(self, rows: Sequence[Row]) -> Residual:
        import numpy as np
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF

        self._base = Corrected().fit(rows)
        self._processes: dict[MachineKey, Any] = {}
        for key in dict.fromkeys(row.machine for row in rows):
            of_it = [row for row in rows if row.machine == key]
            if len(of_it) < 2:
                continue
            left = np.array([np.subtract(row.cuts, self._base.cuts(Query.of(row))) for row in of_it])
            scale = float(np.sqrt((left**2).mean())) or 1.0
            process = GaussianProcessRegressor(RBF(self._length, "fixed"), alpha=self._noise, optimizer=None)
            process.fit([_place_of(Query.of(row)) for row in of_it], left / scale)
            self._processes[key] = process, scale
        return self

    def cuts(self, query: Query) -> Sequence[float]:
        base = self._base.cuts(query)
        known = self._processes.get(query.machine)
        if known is None:
            return base
        process, scale = known
        left = process.predict([_place_of(query)]).reshape(-1) * scale
        return growing([cut + float(more) for cut, more in zip(base, left, strict=True)])


def _place_of(query: Query) -> list[float]:
    return [math.log2(query.context), 4 * query.past_share]


class Regression(_Smooth):
    """A scikit-learn regressor of features on how far a boundary is from the even split's, in average chunks.

    Args:
        make: the regressor, not yet fitted.
        on_cost_model: predict the distance from the cost model's boundary instead.
    """

    def __init__(self, make: Callable[[], Any], *, on_cost_model: bool = False) -> None:
        self._make = make
        self._on_cost_model = on_cost_model

    def fit(self, rows: Sequence[Row]) -> Regression:
        import numpy as np

        known = [features(Query.of(row)) for row in rows]
        wanted = [np.subtract(row.cuts, self._base(Query.of(row))) * row.ranks for row in rows]
        self._model = self._make()
        self._model.fit(np.concatenate(known), np.concatenate(wanted))
        return self

    def cuts(self, query: Query) -> Sequence[float]:
        offsets = self._model.predict(features(query)) / query.ranks
        return growing([float(base + more) for base, more in zip(self._base(query), offsets, strict=True)])

    def _base(self, query: Query) -> Sequence[float]:
        if self._on_cost_model:
            return solved(query.prior.behind(query.past), query.context, query.ranks)
        return places(query.ranks)


def _gaussian_process(length: float = 2.0, noise: float = 1e-3) -> Any:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    process = GaussianProcessRegressor(RBF(length, "fixed"), alpha=noise, optimizer=None, normalize_y=True)
    return make_pipeline(StandardScaler(), process)


def boosting(rate: float = 0.1, depth: int = 4, rounds: int = 200) -> Any:
    """Gradient-boosted trees."""
    from sklearn.ensemble import GradientBoostingRegressor

    return GradientBoostingRegressor(learning_rate=rate, max_depth=depth, n_estimators=rounds, random_state=0)


@dataclass(frozen=True)
class Way:
    """A way to predict: how a regressor of it is made, and what of that can be tuned.

    Attributes:
        make: given what is tuned by name; default values where it is not.
        space: lowest and highest value of each parameter, and whether it is drawn by its logarithm; whole numbers
            where both are.
    """

    make: Callable[..., Regressor]
    space: Mapping[str, tuple[float, float, bool]] = field(default_factory=dict)

    def __call__(self, **given: Any) -> Regressor:
        """A regressor that was not yet fitted."""
        return self.make(**given)


REGRESSORS: dict[str, Way] = {
    "interpolation": Way(Interpolation),
    "cost-model": Way(CostModel),
    "corrected": Way(Corrected),
    "residual": Way(Residual, {"length": (0.5, 8.0, True), "noise": (0.05, 20.0, True)}),
    "gaussian-process": Way(
        lambda **given: Regression(lambda: _gaussian_process(**given)),
        {"length": (0.5, 8.0, True), "noise": (1e-5, 0.3, True)},
    ),
    "boosting": Way(
        lambda **given: Regression(lambda: boosting(**given)),
        {"rate": (0.02, 0.3, True), "depth": (2, 6, False), "rounds": (50, 400, False)},
    ),
}
"""By name. `train` tries all of them; benchmarks/predictor.py has others, which lose by more."""
