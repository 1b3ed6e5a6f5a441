"""Rows of simulated searches."""

from __future__ import annotations

import functools

from msgspec.structs import replace

from kvr_partition import Partition
from kvr_partition.machine.machine import Machine
from kvr_partition.training import (
    Row,
)
from kvr_partition.training.simulated import landscapes, searched_row
from tests.landscapes import measured

CONTEXTS = (2048, 4096, 8192, 16384)


LANDS = landscapes(ranks=(3,))


@functools.cache
def rows(land: int = 4, pasts: bool = False) -> tuple[Row, ...]:
    """Searches of a few contexts on one landscape."""
    return tuple(
        searched_row(LANDS[land], context, past, budget=5)
        for context in CONTEXTS
        for past in ((0, context // 3, context) if pasts else (0,))
    )


def rugged_row(context: int, truth: Machine) -> Row:
    """Some splits in steps of 128 tokens, measured without noise on a machine whose chunk sizes have steps."""
    even = context // 3 // 128 * 128
    moves = [(more, less) for more in range(0, 5) for less in range(0, 5 - more)]
    splits = [Partition((even + 128 * more, even, context - 2 * even - 128 * more)) for more, _ in moves[::3]]
    splits += [
        Partition((even + 128 * more, even - 128 * less, context - 2 * even + 128 * (less - more)))
        for more, less in moves[1::3]
    ]
    trials = [measured(one, truth) for one in dict.fromkeys(splits)]
    best = min(trials, key=lambda one: one.ttft_s)
    row = rows()[0]
    return replace(
        row,
        context=context,
        sizes=best.sizes,
        trials=tuple(trials),
        prior=LANDS[4].prior.filed(3),
        truth=LANDS[4].truth.filed(3),
    )
