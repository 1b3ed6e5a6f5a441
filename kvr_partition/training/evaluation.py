"""Regret of ways to predict on data they have not seen, left out a group at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvr_partition.errors import OutOfRangeError, PartitionError
from kvr_partition.partition import Partition
from kvr_partition.predictor import Regret, Score
from kvr_partition.training.dataset import Row, common_quantum
from kvr_partition.training.features import Query
from kvr_partition.training.regressors import REGRESSORS, Regressor, Way

GROUPS: dict[str, Callable[[Row], Any]] = {
    "context": lambda row: row.context,
    "past": lambda row: round(row.past_share, 6),
    "model": lambda row: row.model,
    "bandwidth": lambda row: row.bandwidth,
    "hardware": lambda row: row.hardware,
}
"""What a row belongs to, by the name of what is held out."""


@dataclass(frozen=True)
class Outcome:
    """What one way to predict lost on one row that it had not seen.

    Attributes:
        regret: as expected.
        losses: what it may be, each as likely as the others; empty where it is known.
    """

    method: str
    held_out: str
    row: Row
    regret: float
    losses: tuple[float, ...] = ()

    def at_most(self, share: float) -> float:
        """What is not exceeded in such a share of what it may be."""
        ordered = sorted(self.losses) or [self.regret]
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def evaluate(
    rows: Sequence[Row],
    methods: Iterable[str] = tuple(REGRESSORS),
    held_out: Iterable[str] = ("context",),
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
    jobs: int = 1,
    quantum: int | None = None,
    ways: Mapping[str, Way] = REGRESSORS,
) -> list[Outcome]:
    """Leave each group out in turn, learn from the others, and predict it.

    A context or past share at the end of a machine's range is not asked for: nobody predicts beyond what was
    searched.

    Args:
        tuned: parameters of each method, see `tune`.
        jobs: processes; -1 for one a core.
        quantum: what predicted boundaries are multiples of; what the searched ones of the machine are when None.
        ways: what the methods are names of.

    Raises:
        PartitionError: an unknown method or group.
    """
    from joblib import Parallel, delayed

    for name in held_out:
        if name not in GROUPS:
            raise PartitionError(f"unknown group {name!r}; there are {', '.join(GROUPS)}")
    for method in methods:
        if method not in ways:
            raise PartitionError(f"unknown method {method!r}; there are {', '.join(ways)}")
    work = []
    for name in held_out:
        group = GROUPS[name]
        values = {group(row) for row in rows}
        if len(values) < 2:
            continue
        for value in sorted(values, key=repr):
            test = [row for row in rows if group(row) == value]
            train = [row for row in rows if group(row) != value]
            if name in ("context", "past"):
                test = [row for row in test if _inside(row, train, name)]
            work += [(method, name, train, test) for method in methods if test]
    found = Parallel(n_jobs=jobs)(
        delayed(_losses)(ways[method], train, test, (tuned or {}).get(method, {}), quantum)
        for method, _, train, test in work
    )
    return [
        Outcome(method, name, row, math.fsum(losses) / len(losses), losses)
        for (method, name, _, test), of_rows in zip(work, found, strict=True)
        for row, losses in zip(test, of_rows, strict=True)
        if losses is not None
    ]


def _inside(row: Row, train: Sequence[Row], name: str) -> bool:
    value = GROUPS[name]
    others = [value(other_row) for other_row in train if other_row.machine == row.machine]
    return any(other < value(row) for other in others) and any(other > value(row) for other in others)


def _losses(
    way: Way, train: Sequence[Row], test: Sequence[Row], given: Mapping[str, Any], quantum: int | None
) -> list[tuple[float, ...] | None]:
    regressor = way(**given).fit(train)
    losses: list[tuple[float, ...] | None] = []
    for row in test:
        # Rounded as a predictor that had been trained on the others would.
        of_it = [other_row for other_row in train if other_row.machine == row.machine]
        unit = quantum or (common_quantum(of_it) if of_it else 1)
        try:
            partition = decoded(regressor, Query.of(row), unit)
        except OutOfRangeError:
            losses.append(None)
            continue
        losses.append(tuple(max(0.0, loss) for loss in row.losses(partition)))
    return losses


def decoded(regressor: Regressor, query: Query, quantum: int) -> Partition:
    """What a regressor predicts, in whole quanta.

    Raises:
        OutOfRangeError: as `Regressor.cuts`.
    """
    sizes = regressor.sizes(query, quantum)
    if sizes is not None:
        return Partition(sizes, query.past)
    return Partition.from_cuts(regressor.cuts(query), query.context, quantum, query.past)


def scores(outcomes: Sequence[Outcome]) -> list[Score]:
    """Regret by method, by what was held out, and by ranks."""
    found = []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        for held_out in dict.fromkeys(outcome.held_out for outcome in outcomes):
            of_it = [outcome for outcome in outcomes if (outcome.method, outcome.held_out) == (method, held_out)]
            if not of_it:
                continue
            found.append(Score(method, held_out, None, regret(of_it)))
            counts = sorted({outcome.row.ranks for outcome in of_it})
            for ranks in counts if len(counts) > 1 else ():
                found.append(
                    Score(method, held_out, ranks, regret([one for one in of_it if one.row.ranks == ranks]))
                )
    return found


def regret(outcomes: Sequence[Outcome]) -> Regret:
    """Mean, 95th percentile and largest of what was lost.

    The mean is of what is expected. Of the others each case counts with its doubt: what is lost there with a
    probability of 10% if it is the only one, and less of it for each further case, down to the median. A loss on a
    context that nobody searched is then above the largest in fewer than one of ten, as simulations show
    (``benchmarks/stated_regret.py``).
    """
    share = max(0.5, 1 - 0.1 * len(outcomes))
    ordered = sorted(one.at_most(share) for one in outcomes)
    mean = math.fsum(one.regret for one in outcomes) / len(outcomes)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    # A median may be below the mean of what is skewed.
    return Regret(mean, max(mean, p95), max(mean, ordered[-1]), len(ordered))


def tune(
    rows: Sequence[Row],
    method: str,
    held_out: str = "context",
    trials: int = 20,
    seed: int = 0,
    jobs: int = 1,
    ways: Mapping[str, Way] = REGRESSORS,
) -> dict[str, Any]:
    """Parameters of a method that lose least when a group is left out, found with Optuna; {} for default ones."""
    import optuna

    space = ways[method].space
    if not space:
        return {}

    def loss(given: Mapping[str, Any]) -> float:
        losses = [
            outcome.regret for outcome in evaluate(rows, [method], [held_out], {method: given}, jobs, ways=ways)
        ]
        # The mean decides, the worst cases have a say.
        return sum(losses) / len(losses) + 0.1 * max(losses) if losses else float("inf")

    def objective(trial: optuna.Trial) -> float:
        given: dict[str, Any] = {}
        for name, (low, high, by_log) in space.items():
            if isinstance(low, int) and isinstance(high, int):
                given[name] = trial.suggest_int(name, low, high)
            else:
                given[name] = trial.suggest_float(name, low, high, log=by_log)
        return loss(given)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=8))
    study.optimize(objective, n_trials=trials)
    return {} if loss({}) <= study.best_value else dict(study.best_params)
