"""What is uncertain about a measured context, and that stated regrets count it."""

from __future__ import annotations

import math
from statistics import mean, pstdev

import pytest
from msgspec.structs import replace

from benchmarks.landscapes import Landscape, Measured, landscapes
from benchmarks.stated_regret import SHARES, UNSEEN, at, searched
from kvr_partition import Partition
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.draws import drawn
from kvr_partition.training import evaluate, train
from kvr_partition.training.evaluation import Outcome, regret
from tests.rows import rows

LANDS = [land for land in landscapes("usual") if land.ranks in (2, 3) and "300 GB/s" in land.name]


@pytest.mark.parametrize("noise", [0.005, 0.04])
def test_draws_scatter_as_what_was_measured_does(noise: float) -> None:
    land = LANDS[0]
    measure = Measured(land, 0, noise, 3)
    even = Partition.even(land.context, land.ranks)
    trials = [measure(land.solved), measure(even)]
    found = drawn(land.fitted, land.context, trials, 30)
    logs = [math.log(float(one.ttft_s([land.solved.sizes])[0][0])) for one in found]
    # Three samples tell a median to about 0.7 of their spread, and the machine says nothing much beyond it.
    assert 0.2 * noise < pstdev(logs) < 2 * noise
    believed = math.log(float(Beliefs.after(land.fitted, land.context, trials).ttft_s([land.solved.sizes])[0][0]))
    assert mean(logs) == pytest.approx(believed, abs=noise)
    again = drawn(land.fitted, land.context, trials, 3)
    assert [one.machine for one in again] == [one.machine for one in found[:3]]


def test_a_partition_far_from_what_was_measured_is_less_certain_than_one_beside_it() -> None:
    land = LANDS[0]
    measure = Measured(land, 0, 0.01, 3)
    trials = [measure(land.solved)]
    found = drawn(land.fitted, land.context, trials, 20)

    def spread(sizes: tuple[int, ...]) -> float:
        return pstdev(math.log(float(one.ttft_s([sizes])[0][0])) for one in found)

    first, second = land.solved.sizes
    assert spread((first // 3, second + first - first // 3)) > 2 * spread(
        (first + land.quantum, second - land.quantum)
    )


def test_what_a_measured_context_loses_is_more_than_what_its_likeliest_costs_say() -> None:
    """The best partition is not known either: expectations of a minimum are below the minimum of expectations."""
    row = replace(rows()[1], truth=None, best_s=None, origin="measured")
    losses = row.losses(row.partition)
    assert len(losses) > 5
    assert min(losses) >= 0
    assert row.regret(row.partition) == pytest.approx(mean(losses))
    assert row.regret(row.partition) > 1e-4


def lost(land: Landscape, context: int, sizes: tuple[int, ...]) -> float:
    there = next(at(land, share) for share in (*SHARES, *UNSEEN) if at(land, share).context == context)
    taken = float(there.ttft_s([sizes])[0])
    return taken / min(taken, there.best_s()) - 1


def test_what_is_stated_holds_where_nobody_searched() -> None:
    """The likeliest costs alone stated less than most of these lose."""
    above, stated = 0, []
    for land in LANDS[:3]:
        predictor = train([searched(at(land, share), 0, 0.02, 1, 8) for share in SHARES], method="corrected")
        expected = predictor.explain(land.context).regret
        assert expected is not None
        stated.append(expected.max)
        for share in UNSEEN:
            context = at(land, share).context
            above += lost(land, context, predictor.predict(context).partition.sizes) > expected.max
    assert above <= 0.25 * len(LANDS[:3]) * len(UNSEEN)
    # And it is no idle warning either.
    assert max(stated) < 0.04


def test_the_fewer_contexts_were_left_out_the_more_of_the_doubt_counts() -> None:
    row, losses = rows()[1], tuple(at / 100 for at in range(11))
    cases = [Outcome("corrected", "context", row, mean(losses), losses) for _ in range(6)]
    assert regret(cases[:1]).max == pytest.approx(0.09)
    assert regret(cases[:3]).max == pytest.approx(0.07)
    assert regret(cases).max == pytest.approx(0.05)
    assert regret(cases[:2]).mean == pytest.approx(0.05)
    # What is known has no doubt.
    assert regret([Outcome("corrected", "context", row, 0.3)]).max == 0.3


def test_a_context_left_out_is_judged_by_draws() -> None:
    searched_rows = [replace(row, truth=None, best_s=None, origin="measured") for row in rows()[:3]]
    (outcome,) = evaluate(searched_rows, ["corrected"])
    assert len(outcome.losses) > 5
    assert outcome.regret == pytest.approx(mean(outcome.losses))
    assert outcome.at_most(0.9) >= outcome.at_most(0.5)
