"""Search as many contexts of a range as a predictor needs, and no more."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvr_partition.errors import OutOfRangeError, UnsupportedError
from kvr_partition.machine.cost import FitError
from kvr_partition.predictor import Regret
from kvr_partition.search import Seed
from kvr_partition.training import Row, best_method, evaluate, train
from kvr_partition.training.evaluation import regret
from profiler.session import Session, rows_of

MOST_CONTEXTS = 12
"""Contexts that are searched at most, unless said otherwise."""

LEAST_RATIO = 1.1
"""Contexts closer together than this tell nothing new."""


@dataclass(frozen=True)
class Covered:
    """What searching a range of contexts came to.

    Attributes:
        low, high: the range, in tokens.
        until: regret that was asked for, as a share.
        regret: of the searched contexts, each left out in turn; None where nothing can be left out.
        method: how the predictor that loses so much predicts.
        contexts: searched, in ascending order.
        measured: partitions, in all searches together.
        seconds: that took, with all that was timed beside them.
        reached: whether the largest regret is no more than was asked for.
        why: what ended it where it is.
    """

    low: int
    high: int
    until: float
    regret: Regret | None
    method: str | None
    contexts: tuple[int, ...]
    measured: int
    seconds: float
    reached: bool
    why: str


def cover(session: Session, low: int, high: int, until: float, most: int = MOST_CONTEXTS) -> Covered:
    """Search the ends of a range, then where predictions between are least sure, until they are sure enough.

    After each search every context is left out in turn: a predictor of all others says what it would take there,
    and the measurements there say what that loses (`kvr_partition.training.evaluate`). Between two contexts a
    prediction is the less sure the more was lost at them and the farther apart they are. The next context is in
    the middle of the least sure gap, and what the predictor says of it is the first partition measured there.

    The same session, or another one on the same log and table, goes the same way again and measures nothing twice.

    Args:
        session: whose contexts these become.
        low, high: the range, in tokens.
        until: largest regret on contexts left out, as a share.
        most: contexts to search at most.

    Raises:
        UnsupportedError: an empty range, a target that is no share, or fewer than three contexts.
        PartitionError, RankError: as `Session.search`.
    """
    if not 1 <= low < high:
        raise UnsupportedError(f"a range of contexts goes from the shorter to the longer one; got {low} to {high}")
    if not 0 < until < 1:
        raise UnsupportedError(f"the regret to reach is a share between 0 and 1; got {until}")
    if most < 3:
        raise UnsupportedError(f"a context can be left out where there are three or more; got at most {most}")
    began, before = time.monotonic(), len(session.results)
    for context in (low, high):
        session.group.check_context(context, session.past)
        session.group.check_memory(context, session.past)
    # What an earlier run searched is known already.
    known = {entry.context for entry in session.table.entries if entry.past == session.past}
    searched = sorted({low, high, *(context for context in known if low < context < high)})
    # What chunks cost is measured once for all contexts, up to the longest.
    session.contexts = sorted({*session.contexts, *searched})
    # And by every sampler: predictions need it also where the search goes by something else.
    session.machine()
    for context in searched:
        session.search(context)
    while True:
        rows = _rows(session, searched)
        left_out = _left_out(rows)
        if left_out is not None and left_out.regret.max <= until:
            why = ""
            break
        following = _least_sure(searched, left_out, session)
        if not rows:
            why = "noise hides what chunks cost, which predictions are made from; try a quieter machine"
        elif len(searched) >= most:
            why = f"{len(searched)} contexts were searched, and {most} are the most that were asked for"
        elif following is None:
            why = "the searched contexts lie too close together to learn more from others"
        else:
            session.search(following, first=_predicted(rows, following))
            searched = sorted({*searched, following})
            continue
        break
    return Covered(
        low,
        high,
        until,
        None if left_out is None else left_out.regret,
        None if left_out is None else left_out.method,
        tuple(searched),
        sum(result.measured for result in session.results[before:]),
        time.monotonic() - began,
        not why,
        why,
    )


@dataclass(frozen=True)
class _LeftOut:
    """The best way to predict some rows, what it loses, and at which contexts."""

    method: str
    regret: Regret
    lost: dict[int, float]


def _rows(session: Session, contexts: Sequence[int]) -> list[Row]:
    """Of these contexts; none where the log does not tell what chunks cost."""
    try:
        rows = rows_of(session.table, session.log)
    except FitError:
        return []
    return [row for row in rows if row.context in contexts and row.past == session.past]


def _left_out(rows: Sequence[Row]) -> _LeftOut | None:
    """None where no row can be left out."""
    outcomes = evaluate(rows)
    method = best_method(outcomes)
    if method is None:
        return None
    of_it = [one for one in outcomes if one.method == method]
    return _LeftOut(method, regret(of_it), {one.row.context: one.regret for one in of_it})


def _least_sure(searched: Sequence[int], left_out: _LeftOut | None, session: Session) -> int | None:
    """The middle of the gap that a prediction is least sure in; None where all are narrow."""

    def doubt(gap: tuple[int, int]) -> float:
        octaves = math.log2(gap[1] / gap[0])
        # The ends of the range cannot be left out; their gaps count by the other side.
        return octaves if left_out is None else octaves * max(left_out.lost.get(end, 0.0) for end in gap)

    gaps = [gap for gap in pairwise(searched) if _middle(*gap, session) is not None]
    return _middle(*max(gaps, key=doubt), session) if gaps else None


def _middle(low: int, high: int, session: Session) -> int | None:
    """Halfway between two contexts by their ratio, on the quantum; None where it is too close to one of them."""
    middle = math.sqrt(low * high)
    quantum = session.quantum_of(round(middle))
    found = round(middle / quantum) * quantum
    return found if low * LEAST_RATIO <= found and found * LEAST_RATIO <= high else None


def _predicted(rows: Sequence[Row], context: int) -> list[Seed]:
    """What a predictor of these rows says of a context between them."""
    try:
        return [Seed("predicted", train(rows).predict(context, rows[0].ranks, rows[0].past).partition)]
    except OutOfRangeError:
        return []
