"""From searched partitions to a predictor: rows, ways to predict, regret, export."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvr_partition import Partition, PartitionError, PartitionTable
from kvr_partition.errors import FileFormatError, OutOfRangeError
from kvr_partition.machine.cost import LinkCost
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.predictor import PartitionPredictor
from kvr_partition.table import Entry
from kvr_partition.training import (
    REGRESSORS,
    Dataset,
    Outcome,
    Row,
    best_method,
    evaluate,
    load_dataset,
    measured_row,
    scores,
    train,
)
from kvr_partition.training.dataset import common_quantum
from kvr_partition.training.evaluation import tune
from kvr_partition.training.features import NAMES, Query, features
from kvr_partition.training.regressors import Corrected, Interpolation, growing
from kvr_partition.training.simulated import searched_row
from tests.models import provenance
from tests.rows import CONTEXTS, LANDS, rows, rugged_row


def test_a_row_knows_how_good_any_partition_is() -> None:
    row = rows()[2]
    truth = LANDS[4].truth
    solved = best_split(row.context, row.ranks, truth)
    assert 0 <= row.regret(solved) < 0.002
    even = Partition.even(row.context, row.ranks)
    assert row.regret(even) == pytest.approx(
        simulate(even, truth).ttft_s / simulate(solved, truth).ttft_s - 1, abs=0.002
    )
    assert row.regret(row.partition) < 0.03
    # Without the truth, as of hardware, its own measurements must do.
    measured = replace(row, truth=None, best_s=None, origin="measured")
    assert measured.regret(even) == pytest.approx(row.regret(even), abs=0.03)
    assert measured.regret(row.partition) < 0.02


def test_measured_searches_become_rows() -> None:
    row = rows()[0]
    made = measured_row(provenance(ranks=3), LANDS[4].prior, row.trials, row.sizes, 1e9)
    assert (made.origin, made.model, made.context, made.past) == ("measured", "llama", 2048, 0)
    assert made.prior == row.prior
    assert made.bandwidth == 1e9
    with pytest.raises(PartitionError, match="these trials are of 2"):
        measured_row(provenance(ranks=3), LANDS[4].prior, [*row.trials, *rows()[1].trials], row.sizes)


def test_linear_interpolation_is_the_tables() -> None:
    table = PartitionTable(Entry(row.context, row.sizes) for row in rows())
    fitted = Interpolation().fit(rows())
    for context in (2048, 3000, 8191, 16384):
        query = dataclasses.replace(Query.of(rows()[0]), context=context)
        assert Partition.from_cuts(fitted.cuts(query), context) == table.lookup(context).partition
    with pytest.raises(OutOfRangeError, match="no searched contexts on both sides"):
        fitted.cuts(dataclasses.replace(Query.of(rows()[0]), context=20_000))


def test_measurements_correct_the_cost_model_for_contexts_they_are_not_of() -> None:
    held_out = rows()[2]
    others = [row for row in rows() if row is not held_out]

    def lost(name: str) -> float:
        cuts = REGRESSORS[name]().fit(others).cuts(Query.of(held_out))
        return held_out.regret(Partition.from_cuts(cuts, held_out.context))

    assert lost("corrected") < 0.01
    assert lost("corrected") <= lost("cost-model") + 1e-3


def test_an_unknown_machine_is_taken_to_be_off_as_others_are() -> None:
    """Cost terms are off by hardware, for all of its models."""
    same = [
        at for at, land in enumerate(LANDS) if land.hardware == LANDS[4].hardware and land.model != LANDS[4].model
    ]
    others = [row for at in same[:4] for row in rows(at)[1:3]]
    query = Query.of(rows()[2])
    fitted = Corrected().fit(others)
    truth, told = LANDS[4].truth.cost, LANDS[4].prior.cost
    found = fitted.machine(query).cost
    assert abs(found.per_token_s / truth.per_token_s - 1) < max(
        0.05, abs(told.per_token_s / truth.per_token_s - 1)
    )
    nowhere = dataclasses.replace(query, machine=("elsewhere", *query.machine[1:]))
    assert fitted.machine(nowhere).cost == told


@pytest.mark.parametrize("name", REGRESSORS)
def test_every_way_to_predict_gives_growing_boundaries(name: str) -> None:
    fitted = REGRESSORS[name]().fit([row for at in (4, 5, 6) for row in rows(at)])
    for context in (2048, 5000, 16384):
        cuts = fitted.cuts(dataclasses.replace(Query.of(rows()[0]), context=context))
        assert len(cuts) == 2
        assert 0 < cuts[0] < cuts[1] < 1


def test_boundaries_that_cross_are_set_right() -> None:
    assert growing([0.7, 0.2, 1.4]) == pytest.approx([0.7, 0.705, 0.995])
    assert growing([-1.0, 0.5]) == pytest.approx([0.02 / 3, 0.5])


def test_features_have_no_units() -> None:
    query = Query.of(rows()[1])
    known = features(query)
    assert known.shape == (2, len(NAMES))
    # The same machine a thousand times as slow, with all costs in proportion, is the same question.
    cost = query.prior.cost
    slower = replace(
        query.prior,
        cost=replace(
            cost,
            fixed_s=cost.fixed_s * 1e3,
            per_token_s=cost.per_token_s * 1e3,
            per_own_pair_s=cost.per_own_pair_s * 1e3,
            per_prefix_pair_s=cost.per_prefix_pair_s * 1e3,
        ),
        link=tuple(
            replace(link, seconds_per_byte=link.seconds_per_byte * 1e3) for link in query.prior.links(query.ranks)
        ),
    )
    assert features(dataclasses.replace(query, prior=slower)) == pytest.approx(known)


def test_what_is_left_out_has_not_been_seen() -> None:
    found = evaluate(rows(), ["interpolation", "cost-model"], ["context"])
    # Nobody predicts beyond what was searched, so the outermost contexts are not asked for.
    assert {one.row.context for one in found} == {4096, 8192}
    assert all(one.regret >= 0 for one in found)
    lines = scores(found)
    assert {(one.method, one.held_out, one.ranks) for one in lines} == {
        ("interpolation", "context", None),
        ("cost-model", "context", None),
    }
    with pytest.raises(PartitionError, match="unknown group 'moon'"):
        evaluate(rows(), held_out=["moon"])
    with pytest.raises(PartitionError, match="unknown method 'magic'"):
        evaluate(rows(), ["magic"])
    several = evaluate([*rows(4), *rows(5)], ["cost-model"], ["model", "hardware"])
    assert {one.held_out for one in several} <= {"model", "hardware"}


def outcomes(**losses: list[float]) -> list[Outcome]:
    row = rows()[0]
    return [Outcome(name.replace("_", "-"), "context", row, one) for name, each in losses.items() for one in each]


def test_the_method_that_answers_most_and_loses_least_wins() -> None:
    few, many = [0.0, 0.0], [0.01, 0.02, 0.01, 0.03, 0.01]
    assert best_method(outcomes(boosting=few, splines=many, interpolation=[2 * one for one in many])) == "splines"
    assert best_method([]) is None


def test_the_corrected_cost_model_is_kept_unless_another_beats_it_by_more_than_chance() -> None:
    corrected = [0.010, 0.012, 0.009, 0.011, 0.013]
    luck = [0.000, 0.030, 0.001, 0.002, 0.020]
    assert best_method(outcomes(corrected=corrected, splines=luck)) == "corrected"
    assert best_method(outcomes(corrected=corrected, splines=[one - 0.004 for one in corrected])) == "splines"
    # Two cases that are close say nothing, however clear they look.
    assert best_method(outcomes(splines=[0.0, 0.001], corrected=corrected[:2])) == "corrected"


@pytest.mark.parametrize("cases", [1, 2, 3])
def test_what_is_lost_by_a_lot_shows_in_few_cases(cases: int) -> None:
    """Five contexts leave three cases, three leave one."""
    lost = [0.18, 0.22, 0.2][:cases]
    assert best_method(outcomes(corrected=lost, interpolation=[0.0] * cases)) == "interpolation"
    assert best_method(outcomes(corrected=[0.02] * cases, interpolation=[0.0] * cases)) == "corrected"


def test_a_searched_context_is_answered_with_what_was_found_there() -> None:
    """Whatever the cost model thinks of it."""
    moved = (-256, 512, -256)
    searched = [
        replace(row, sizes=tuple(size + more for size, more in zip(row.sizes, moved, strict=True)))
        for row in rows(4)
    ]
    predictor = train(searched, provenance(ranks=3))
    for row in searched:
        assert predictor.predict(row.context).partition.sizes == row.sizes


def test_the_cost_model_beyond_the_range_knows_slow_ranks() -> None:
    cost = replace(LANDS[4].truth.cost, size_effects=())
    truth = replace(LANDS[4].truth, speeds=(0.5, 1.0, 1.0), cost=cost, link=LinkCost.of(1e12, 1e-6))
    land = dataclasses.replace(LANDS[4], truth=truth, prior=truth)
    predictor = train([searched_row(land, context, budget=3) for context in CONTEXTS], provenance(ranks=3))
    (grid,) = predictor.grids
    assert [speed / grid.speeds[1] for speed in grid.speeds] == pytest.approx([0.5, 1.0, 1.0], rel=0.03)
    context = 4 * CONTEXTS[-1]
    found = simulate(predictor.predict(context, fallback="cost-model").partition, truth).ttft_s
    assert found < 1.05 * simulate(best_split(context, 3, truth), truth).ttft_s


def test_tuning_gives_what_a_method_takes_or_nothing() -> None:
    given = tune([*rows(4), *rows(5)], "residual", trials=3)
    assert set(given) <= {"length", "noise"}
    REGRESSORS["residual"](**given)
    assert tune(rows(), "interpolation") == {}


def test_a_trained_predictor_is_the_regressor_it_was_made_from() -> None:
    searched = rows(4, pasts=True)
    predictor = train(searched, provenance(ranks=3))
    training = predictor.training
    assert training.method == best_method(evaluate(searched))
    assert (training.rows, training.measured) == (12, 0)
    assert len(training.digest) == 64
    assert {one.method for one in training.scores} == set(REGRESSORS)
    assert predictor.ranks == (3,)
    (grid,) = predictor.grids
    assert grid.searched == tuple(sorted({(row.context, row.past) for row in searched}))
    assert (grid.contexts[0], grid.contexts[-1]) == (2048, 16384)
    assert grid.past_shares[0] == 0.0
    assert grid.past_shares[-1] == 0.5
    regressor = REGRESSORS[training.method]().fit(searched)
    for context, past in ((2048, 0), (3333, 0), (9000, 4500), (16384, 16384), (12_345, 777)):
        query = dataclasses.replace(Query.of(searched[0]), context=context, past=past)
        right = Partition.from_cuts(regressor.cuts(query), context, past=past)
        found = predictor.predict(context, past=past).partition
        assert found.past == past
        # Between nodes it is interpolated: a thousandth of a chunk's length is nothing that a search could tell.
        assert found.sizes == pytest.approx(right.sizes, abs=2 + context / 300)
    again = train(searched, provenance(ranks=3))
    assert again.to_json() == predictor.to_json()


def test_predictions_keep_to_the_steps_of_the_searches() -> None:
    def of(context: int, *sizes: int) -> Row:
        return replace(rows()[0], context=context, sizes=sizes)

    uneven = of(2048, 768, 640, 640)
    assert common_quantum([uneven, of(4096, 1536, 1280, 1280)]) == 128
    # An even split won somewhere; it lies on no steps.
    assert common_quantum([uneven, of(4096, 1366, 1365, 1365)]) == 128
    assert common_quantum([of(4096, 1366, 1365, 1365)]) == 1
    # One row's boundaries have 128 · 7 tokens in common by chance.
    assert common_quantum([of(4096, 896, 896, 2304)]) == 128
    assert common_quantum([of(300, 128, 128, 44)]) == 64
    predictor = train(rows(), provenance(ranks=3), quantum=100)
    assert all(boundary % 100 == 0 for boundary in predictor.predict(5000).partition.boundaries)
    # What is said to be lost is lost by such predictions.
    assert predictor.training.scores == tuple(scores(evaluate(rows(), quantum=100)))
    with pytest.raises(PartitionError, match="quantum"):
        train(rows(), provenance(ranks=3), quantum=1000)


def test_a_predictor_knows_chunk_sizes_that_go_badly() -> None:
    smooth = LANDS[4].truth
    draw = random.Random(6)
    steps = tuple((size, math.exp(draw.gauss(0.0, 0.04))) for size in range(128, 8192, 128))
    truth = replace(smooth, cost=replace(smooth.cost, size_effects=steps))
    searched = [rugged_row(context, truth) for context in (3072, 3456, 3840, 4608, 5376, 6144)]
    trained = train(searched, provenance(ranks=3), method="corrected")
    plain = train(searched, provenance(ranks=3), method="corrected", quantum=16)
    (grid,) = trained.grids
    assert (grid.whole, grid.quantum) == (True, 128)
    assert grid.contexts == tuple(range(3072, 6145, 128))
    assert not plain.grids[0].whole

    def lost(predictor: PartitionPredictor) -> float:
        times = [
            simulate(predictor.predict(context, quantum=128).partition, truth).ttft_s
            for context in range(3200, 6144, 128)
        ]
        return sum(times)

    assert lost(trained) < lost(plain) * 0.99
    # Where steps were not found, boundaries say everything.
    even_ground = train([rugged_row(context, smooth) for context in (3072, 6144)], provenance(ranks=3))
    assert not even_ground.grids[0].whole


def test_one_machine_at_a_time() -> None:
    with pytest.raises(PartitionError, match="for one model on one machine; these rows are of"):
        train([*rows(4), *rows(10)])
    here = provenance(ranks=3)
    half = replace(here, dtype="float16")
    of_both = [replace(row, provenance=one) for row, one in zip(rows(), (here, half), strict=False)]
    with pytest.raises(PartitionError, match=r"these rows are of .*float16.*; .*float32"):
        train(of_both)
    with pytest.raises(PartitionError, match="nothing to train on"):
        train([])
    with pytest.raises(PartitionError, match="unknown method 'magic'"):
        train(rows(), method="magic")
    one = train(rows()[:1])
    assert one.training.scores == ()
    assert one.predict(2048).partition.context == 2048
    assert one.explain(2048).regret is None
    with pytest.raises(OutOfRangeError):
        one.predict(2049)


def test_a_dataset_is_a_strict_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    Dataset(rows()).save(file)
    assert load_dataset(file).rows == rows()
    whole = json.loads(file.read_text())
    whole["rows"][1]["sizes"][0] += 1
    file.write_text(json.dumps(whole))
    with pytest.raises(FileFormatError, match=r"rows\[1\] has sizes that are no partition"):
        load_dataset(file)
    whole["rows"][1]["sizes"][0] -= 1
    whole["rows"][0]["told"]["speeds"] = [1.0]
    file.write_text(json.dumps(whole))
    with pytest.raises(FileFormatError, match=r"rows\[0\] tells of another number of ranks"):
        load_dataset(file)
