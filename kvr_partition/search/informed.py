"""InformedSampler: an Optuna sampler that knows how a prefill works and learns what it does not know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import optuna
from msgspec.structs import replace
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from kvr_partition.errors import PartitionError
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Measurement
from kvr_partition.partition import Partition
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.local_search import descent, local_search
from kvr_partition.search.measured import LEAST_NOISE, LONE_NOISE, noise_of, rebalanced
from kvr_partition.search.space import Space

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LEAST_MEASURED, MOST_NEEDED = 3, 12
"""Measurements before a search may end, at least, and at most however noisy they are."""

SURE = 0.006
"""Relative standard error that all measurements together should have before a search ends."""

WORTH_IT, LEAST_GAIN = 0.05, 1e-3
"""Measure on while a candidate is expected to win this share of a measurement's standard error, and of TTFT."""


class PartitionSampler(optuna.samplers.BaseSampler):
    """What samplers that propose whole partitions share.

    They work on studies of a `Space`; any other search space, and any parameter it lacks, is sampled at random.

    Args:
        space: whose parameters the study has; None for a sampler of no particular study.
        seed: of what is random.
    """

    def __init__(self, space: Space | None = None, *, seed: int | None = None) -> None:
        self._space = space
        self._random = optuna.samplers.RandomSampler(seed=seed)
        self.proposals: dict[int, Partition] = {}
        """What was proposed for each trial, by its number; its parameters are only an image of that."""

    def propose(self, study: optuna.Study) -> Partition | None:
        """The next partition to measure; None when there is none worth it."""
        raise NotImplementedError

    def reseed_rng(self) -> None:
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._space is not None:
            ranges = zip(self._space.names(), self._space.ranges, strict=True)
            return {name: FloatDistribution(low, high) for name, (low, high) in ranges}
        return optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        if self._space is None or set(search_space) != set(self._space.names()):
            return {name: self.sample_independent(study, trial, name, one) for name, one in search_space.items()}
        partition = self.propose(study)
        if partition is None:
            return {}
        self.proposals[trial.number] = partition
        return dict(self._space.params(partition))

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        self._raise_error_if_multi_objective(study)
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def measured_in(study: optuna.Study) -> list[Measurement]:
    """The measurements that finished trials of a study keep, each partition once, in order."""
    found: dict[tuple[int, ...], Measurement] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
        kept = trial.user_attrs.get("measurement")
        if kept is not None:
            one = msgspec.json.decode(kept, type=Measurement)
            found.setdefault(one.sizes, one)
    return list(found.values())


def running_in(study: optuna.Study) -> set[tuple[int, ...]]:
    """Partitions that somebody is measuring right now."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return {tuple(trial.user_attrs["sizes"]) for trial in trials if "sizes" in trial.user_attrs}


class InformedSampler(PartitionSampler):
    """Proposes what is expected to win most, by a schedule whose costs every measurement corrects.

    It begins at the best split of the machine it is given. After each measurement, what ranks computed and
    links carried corrects cost terms, speeds and bandwidths; what the schedule still leaves unexplained
    becomes a smooth surface. Candidates are the best split of the corrected machine, and steps around it
    and around what was fastest; the one with the largest expected improvement is next. When none is
    expected to win more than measuring can tell, it proposes nothing.

    Args:
        space, seed: as in `PartitionSampler`.
        machine: what a prefill costs, as far as it is known.
    """

    def __init__(
        self, space: Space | None = None, machine: Machine | None = None, *, seed: int | None = None
    ) -> None:
        super().__init__(space, seed=seed)
        self._machine = machine if machine is None or space is None else replace(machine, past=space.past)
        self._seed = seed

    def propose(self, study: optuna.Study) -> Partition | None:
        if self._machine is None or self._space is None:
            return None
        return self.next(measured_in(study), running_in(study))

    def next(
        self, measured: Sequence[Measurement], running: set[tuple[int, ...]] | None = None
    ) -> Partition | None:
        """The partition to measure after these, or None when measuring is not worth it any more."""
        import numpy as np

        assert self._space is not None
        assert self._machine is not None
        context = self._space.context
        beliefs = Beliefs.after(self._machine, context, measured)
        solved = self._solved(beliefs)
        taken = {measurement.sizes for measurement in measured} | (running or set())
        ranked = beliefs.ranked()
        noise = sorted(noise_of(measurement) for measurement in ranked)[len(ranked) // 2] if ranked else LONE_NOISE
        enough = len(ranked) >= max(LEAST_MEASURED, min(MOST_NEEDED, math.ceil((noise / SURE) ** 2)))
        dealt = [split for split in self._rebalanced(ranked[:1]) if split.sizes not in taken]
        if len(ranked) < LEAST_MEASURED:
            even = Partition.even(context, len(solved.sizes), quantum=self._space.quantum, past=self._space.past)
            for split in (solved, *dealt, even):
                if split.sizes not in taken:
                    return split
        generator = np.random.default_rng((self._seed or 0, len(measured)))
        centres = [
            solved.boundaries[1:-1],
            *(split.boundaries[1:-1] for split in dealt),
            *(measurement.partition.boundaries[1:-1] for measurement in ranked[:3]),
        ]
        sizes = self._around(centres, context, generator)
        if beliefs.machine.cost.size_effects and len(sizes):
            sizes = np.unique(np.concatenate([sizes, self._exchanged(beliefs, sizes)]), axis=0)
        fresh = np.array([tuple(row) not in taken for row in sizes.tolist()], dtype=bool)
        sizes = sizes[fresh]
        if len(sizes) == 0:
            return None
        expected, spread = beliefs.ttft_s(sizes)
        if not ranked:
            return self._partition(sizes[int(expected.argmin())])
        best_s = float(beliefs.ttft_s([ranked[0].sizes])[0][0])
        gain = _expected_improvement(best_s, expected, spread)
        # Far from the best no gain is left that a float could hold; nearest to it is then next.
        at = int(gain.argmax()) if gain.max() > 0 else int(((best_s - expected) / spread).argmax())
        if enough and gain[at] < max(WORTH_IT * noise, LEAST_GAIN) * best_s:
            # What all measurements together point to is worth a last one, if it is not among them.
            solved_s = float(beliefs.ttft_s([solved.sizes])[0][0])
            return solved if solved.sizes not in taken and solved_s < best_s * (1 - LEAST_NOISE) else None
        return self._partition(sizes[at])

    def _rebalanced(self, measured: Sequence[Measurement]) -> list[Partition]:
        """Of each that says so and lies in the space; see `rebalanced`."""
        import numpy as np

        assert self._space is not None
        splits = [rebalanced(measurement, self._space.quantum) for measurement in measured]
        return [
            self._partition(row)
            for split in splits
            if split is not None
            for row in self._inside(np.array([split.sizes]))
        ]

    def _solved(self, beliefs: Beliefs) -> Partition:
        """The best split of a smooth machine; and with its size effects, where it has any."""
        assert self._space is not None
        space, machine = self._space, beliefs.machine
        found = best_split(space.context, len(space.ranges) + 1, machine, quantum=space.quantum)
        if not machine.cost.size_effects or space.context % space.quantum:
            return found
        return local_search(found, space.quantum, machine, beliefs.unmeasured_delay, self._inside)

    def _exchanged(self, beliefs: Beliefs, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Partitions of chunk sizes that go well, on the way from the best of these."""
        assert self._space is not None
        best = sizes[int(beliefs.ttft_s(sizes)[0].argmin())]
        known = [size for size, _ in beliefs.machine.cost.size_effects]
        return descent(best, self._space.quantum, lambda rows: beliefs.ttft_s(rows)[0], known, self._inside)

    def _partition(self, sizes: Any) -> Partition:
        assert self._space is not None
        return Partition((int(size) for size in sizes), self._space.past)

    def _around(self, centres: Sequence[Sequence[int]], context: int, generator: Any) -> NDArray[np.int64]:
        """Partitions near some boundaries, on the quantum and inside the space; ``[n, ranks]``."""
        import numpy as np

        assert self._space is not None
        quantum, steps = self._space.quantum, []
        for centre in centres:
            middle = np.array(centre, dtype=float)
            steps.append(middle[None, :])
            for scale in (1, 2, 4, 8, 16):
                steps.append(middle + generator.normal(0.0, scale * quantum, (300, len(middle))))
        cuts = np.round(np.concatenate(steps) / quantum).astype(np.int64) * quantum
        edges = np.concatenate(
            [np.zeros((len(cuts), 1), np.int64), cuts, np.full((len(cuts), 1), context)], axis=1
        )
        return self._inside(np.unique(np.diff(edges, axis=1), axis=0))

    def _inside(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those that lie in the space."""
        import numpy as np

        assert self._space is not None
        sizes = sizes[(sizes >= 1).all(axis=1)]
        ratios = np.log(sizes[:, :-1] / sizes[:, -1:])
        low, high = (np.array(side) for side in zip(*self._space.ranges, strict=True))
        inside: NDArray[np.int64] = sizes[((ratios >= low) & (ratios <= high)).all(axis=1)]
        return inside


def _expected_improvement(best_s: float, expected: Array, spread: Array) -> Array:
    """In seconds, of candidates whose TTFT is normal around what is expected."""
    import numpy as np
    from scipy.special import ndtr

    deviation = np.maximum(expected * spread, 1e-12)
    gap = (best_s - expected) / deviation
    gain: Array = (best_s - expected) * ndtr(gap) + deviation * np.exp(-gap * gap / 2) / math.sqrt(2 * math.pi)
    return gain


class HierarchicalGridSampler(PartitionSampler):
    """The search of the KV-Runahead paper: a grid around the even split, then finer ones around its best cell.

    Five values for each boundary; when all their combinations are measured the stride halves, down to the
    quantum. With two ranks that is a binary search; with more the number of cells is 5^(ranks − 1), so a
    budget ends it early, and cells near the middle come first.
    """

    def propose(self, study: optuna.Study) -> Partition | None:
        if self._space is None:
            return None
        return self.next(
            {measurement.sizes: measurement.ttft_s for measurement in measured_in(study)}, running_in(study)
        )

    def next(
        self, measured: dict[tuple[int, ...], float], running: set[tuple[int, ...]] | None = None
    ) -> Partition | None:
        """The next cell; None when the finest grid is done."""
        import itertools

        import numpy as np

        assert self._space is not None
        context, quantum = self._space.context, self._space.quantum
        ranks = len(self._space.ranges) + 1
        if context < ranks * quantum:
            raise PartitionError(f"a context of {context} tokens has no {ranks} chunks of {quantum} tokens")
        middle = np.array([round(context * cut / ranks / quantum) * quantum for cut in range(1, ranks)])
        stride = max(1, round(context / ranks / 4 / quantum)) * quantum
        offsets = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=ranks - 1)))
        offsets = offsets[np.abs(offsets).sum(axis=1).argsort(kind="stable")]
        while True:
            cuts = middle + stride * offsets
            edges = np.concatenate(
                [np.zeros((len(cuts), 1), np.int64), cuts, np.full((len(cuts), 1), context)], axis=1
            )
            sizes = np.diff(edges, axis=1)
            sizes = sizes[(sizes >= 1).all(axis=1)]
            cells = [tuple(row) for row in sizes.tolist()]
            for cell in cells:
                if cell not in measured and cell not in (running or set()):
                    return Partition(cell, self._space.past)
            if stride <= quantum:
                return None
            best = min(cells, key=lambda cell: measured.get(cell, math.inf))
            middle = np.cumsum(best)[:-1]
            stride = max(1, stride // quantum // 2) * quantum
