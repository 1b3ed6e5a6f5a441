"""From rows of one machine to the predictor that serving code loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from kvr_partition.errors import OutOfRangeError, PartitionError
from kvr_partition.predictor import Grid, PartitionPredictor, Training
from kvr_partition.provenance import Provenance
from kvr_partition.training.dataset import Row, common_quantum, digest
from kvr_partition.training.evaluation import Outcome, decoded, evaluate, scores
from kvr_partition.training.features import Query
from kvr_partition.training.regressors import REGRESSORS, Corrected

NODES_PER_OCTAVE = 8
"""Contexts of a grid; what a curve bends between two of them is far less than a token is worth."""

PAST_NODES = 9

MOST_WHOLE = 512
"""Nodes of a grid that has every multiple of the quantum; each is solved by itself, in some tenths of a second."""

TRUSTED = "corrected"
"""The way to predict that others have to beat."""

FEW_CASES, FEW_SPREAD = 3, 0.01
"""Of so few held-out cases, a spread of less than this in what is lost is taken for chance."""


def best_method(found: Sequence[Outcome], held_out: str = "context") -> str | None:
    """The method to keep for what was held out; None if nothing was."""
    return next(iter(ranked(found, held_out)), None)


def ranked(found: Sequence[Outcome], held_out: str = "context") -> list[str]:
    """Methods by mean regret on what was held out, the best first; only those that answered everything asked.

    A few noisy cases pick a winner among many methods by chance. The corrected cost model, which knows how a
    prefill works, is therefore first unless another beats it by more than two standard errors of the difference.
    """
    losses: dict[str, list[float]] = {}
    for one in found:
        if one.held_out == held_out:
            losses.setdefault(one.method, []).append(one.regret)
    # Who passes on the hard cases has not won.
    most = max((len(loss) for loss in losses.values()), default=0)
    order = sorted((name for name, each in losses.items() if len(each) == most), key=lambda one: mean(losses[one]))
    if TRUSTED in order and not _beats(losses[order[0]], losses[TRUSTED]):
        order.remove(TRUSTED)
        order.insert(0, TRUSTED)
    return order


def _beats(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Whether less is lost, case by case, than chance explains."""
    from scipy.stats import t

    won = [other - loss for loss, other in zip(losses, others, strict=True)]
    count, spread, errors = len(won), stdev(won) if len(won) > 1 else 0.0, 2.0
    if count <= FEW_CASES:
        # They say little about their own spread: only what is lost by far more than usual counts.
        spread, errors = max(spread, FEW_SPREAD), float(t.ppf(0.975, min(2, count)))
    return mean(won) > errors * spread / math.sqrt(count)


def train(
    rows: Sequence[Row],
    provenance: Provenance | None = None,
    *,
    method: str | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
    jobs: int = 1,
    quantum: int | None = None,
) -> PartitionPredictor:
    """The predictor of one machine: every way to predict is tried on contexts it has not seen, and the best kept.

    Args:
        rows: searched partitions of one model on one machine, on one or several rank counts.
        provenance: of the machine; that of the last row that has one when None.
        method: keep this one, whatever was measured; the best when None.
        tuned: parameters of each method.
        jobs: processes to evaluate with.
        quantum: what predicted boundaries are multiples of; what the searched ones are when None.

    Raises:
        PartitionError: no rows, rows of several machines, or an unknown method.
    """
    if not rows:
        raise PartitionError("there is nothing to train on: no searched partitions")
    known = [row.provenance for row in rows if row.provenance is not None]
    provenance = provenance or next(reversed(known), None)
    places: set[tuple[Any, ...]] = {row.machine[:4] for row in rows}
    if len(places) == 1:
        # The same name can stand for several configurations, which take their time differently.
        places = {
            (
                origin.model.name,
                origin.model.config_digest,
                origin.dtype,
                origin.depth,
                origin.layers,
                origin.batch,
            )
            for origin in known
        }
    if len(places) > 1:
        shown = "; ".join(" ".join(str(value) for value in place) for place in sorted(places, key=repr))
        raise PartitionError(f"a predictor is for one model on one machine; these rows are of {shown}")
    if method is not None and method not in REGRESSORS:
        raise PartitionError(f"unknown method {method!r}; there are {', '.join(REGRESSORS)}")
    found = evaluate(rows, tuned=tuned, jobs=jobs, quantum=quantum)
    counts = sorted({row.ranks for row in rows})
    posterior = Corrected().fit(rows)
    speeds = {row.ranks: posterior.machine(Query.of(row)).speeds for row in rows}
    # A method may have no answer at some corner of the range although it had one for every held-out case.
    for chosen in [method] if method else [*ranked(found), TRUSTED]:
        regressor = REGRESSORS[chosen](**(tuned or {}).get(chosen, {})).fit(rows)
        try:
            grids = [
                _grid(regressor, [row for row in rows if row.ranks == count], quantum, speeds[count])
                for count in counts
            ]
            break
        except OutOfRangeError as error:
            reason = f"{chosen} cannot answer everything inside the searched range: {error}; use another method"
    else:
        raise PartitionError(reason)
    training = Training(
        chosen, len(rows), sum(row.origin == "measured" for row in rows), digest(rows), tuple(scores(found))
    )
    largest = max(rows, key=lambda row: (row.context, row.ranks))
    cost = posterior.machine(Query.of(largest)).cost.plain
    return PartitionPredictor(grids, training, cost, provenance)


def _grid(regressor: Any, rows: Sequence[Row], quantum: int | None, speeds: tuple[float, ...]) -> Grid:
    """A regressor evaluated on nodes close enough to interpolate between, inside the searched range.

    Where a partition was searched, the node is what was found: nothing that was measured is answered worse.
    """
    first = rows[0]
    contexts = sorted({row.context for row in rows})
    share_nodes = _share_nodes(sorted({row.past_share for row in rows}))
    unit = common_quantum(rows) if quantum is None else quantum

    def asked(context: int, share: float) -> Query:
        return Query(first.machine, first.prior, context, round(share / (1 - share) * context))

    every = range(contexts[0], contexts[-1] + 1, unit)
    whole = (
        not any(context % unit for context in contexts)
        and len(every) * len(share_nodes) <= MOST_WHOLE
        and regressor.sizes(asked(contexts[0], share_nodes[0]), unit) is not None
    )
    nodes = list(every) if whole else _context_nodes(contexts)

    found = {(row.context, row.past_share): row for row in rows}

    def cuts(context: int, share: float) -> tuple[float, ...]:
        row, query = found.get((context, share)), asked(context, share)
        # One that was searched in finer steps than those asked for has no place on a grid of these.
        if row is not None and not any(size % unit for size in row.sizes[:-1]):
            return row.cuts
        if not whole:
            return tuple(float(cut) for cut in regressor.cuts(query))
        return tuple(boundary / query.context for boundary in decoded(regressor, query, unit).boundaries[1:-1])

    boundaries = tuple(tuple(cuts(context, share) for context in nodes) for share in share_nodes)
    searched = tuple(sorted({(row.context, row.past) for row in rows}))
    return Grid(first.ranks, tuple(nodes), tuple(share_nodes), boundaries, searched, unit, whole, speeds)


def _context_nodes(contexts: Sequence[int]) -> list[int]:
    low, high = contexts[0], contexts[-1]
    steps = max(1, math.ceil(NODES_PER_OCTAVE * math.log2(high / low))) if high > low else 0
    spread = {round(low * (high / low) ** (step / steps)) for step in range(steps + 1)} if steps else {low}
    return sorted(spread | set(contexts))


def _share_nodes(shares: Sequence[float]) -> list[float]:
    low, high = shares[0], shares[-1]
    if low == high:
        return [low]
    return sorted({low + (high - low) * step / (PAST_NODES - 1) for step in range(PAST_NODES)} | set(shares))
