"""The predictor: valid partitions everywhere, the same everywhere, and nothing read that is not one."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvr_partition import (
    KVRError,
    OutOfRangeError,
    Partition,
    PartitionError,
    PartitionPredictor,
    PartitionTable,
    load,
)
from kvr_partition.errors import FileFormatError
from kvr_partition.export import router_table, vllm_config
from kvr_partition.machine.cost import ChunkCost
from kvr_partition.predictor import Grid, Regret
from tests.interpreter import HEAVY, loaded_after
from tests.predictors import COST, SHARES, cuts, grid, predictor


def test_between_nodes_it_interpolates_and_at_nodes_it_keeps_to_them() -> None:
    one = predictor(3)
    found = one.predict(2000)
    assert found.source == "predicted"
    assert found.partition == Partition.from_cuts(cuts(3, 2000, 0.0), 2000)
    third = [low + (high - low) / 3 for low, high in zip(cuts(3, 2000, 0), cuts(3, 5000, 0), strict=True)]
    assert one.predict(3000).partition == Partition.from_cuts(third, 3000)
    # Past of 3000 before 2000 tokens is a share of 0.6: three fifths of the way from 0.3 to 0.8.
    mixed = [low + (high - low) * 0.6 for low, high in zip(cuts(3, 2000, 0.3), cuts(3, 2000, 0.8), strict=True)]
    found = one.predict(2000, past=3000)
    assert found.partition.past == 3000
    assert found.partition.sizes == pytest.approx(Partition.from_cuts(mixed, 2000).sizes, abs=1)


@settings(deadline=None)
@given(
    st.integers(1, 16), st.integers(1, 200_000), st.integers(0, 300_000), st.sampled_from(["cost-model", "even"])
)
def test_every_prompt_gets_a_partition(ranks: int, context: int, past: int, fallback: Any) -> None:
    one = predictor(2, 3, 8)
    if context < ranks:
        with pytest.raises(PartitionError):
            one.predict(context, ranks, past, fallback=fallback)
        return
    found = one.predict(context, ranks, past, fallback=fallback)
    partition = found.partition
    assert (partition.context, partition.ranks, partition.past) == (context, ranks, past)
    assert min(partition.sizes) >= 1
    inside = ranks in (2, 3, 8) and 1000 <= context <= 40_000 and past <= 0.8 * (past + context)
    assert found.source == ("predicted" if inside else "even" if ranks == 1 else fallback)
    assert one.explain(context, ranks, past).inside == (inside or ranks == 1)
    if not inside and ranks > 1:
        with pytest.raises(OutOfRangeError, match=r"not trained for|outside the trained range"):
            one.predict(context, ranks, past)


@given(st.integers(1000, 40_000), st.sampled_from([1, 16, 64, 100]))
def test_boundaries_keep_to_a_quantum(context: int, quantum: int) -> None:
    partition = predictor(8).predict(context, quantum=quantum).partition
    assert all(boundary % quantum == 0 for boundary in partition.boundaries[:-1])
    if quantum == 1:
        trained = PartitionPredictor([msgspec.structs.replace(grid(8), quantum=50)], predictor().training, COST)
        assert all(boundary % 50 == 0 for boundary in trained.predict(context).partition.boundaries[:-1])
        assert trained.predict(context, quantum=1).partition == partition
    assert partition.context == context


WHOLE = Grid(
    3,
    (600, 700, 800),
    (0.0, 0.5),
    (((1 / 3, 2 / 3), (3 / 7, 5 / 7), (3 / 8, 6 / 8)), ((1 / 3, 2 / 3), (2 / 7, 5 / 7), (2 / 8, 6 / 8))),
    ((600, 0), (600, 600), (800, 0), (800, 800)),
    100,
    True,
)


def test_nothing_is_interpolated_between_whole_nodes() -> None:
    one = PartitionPredictor([WHOLE], predictor().training, COST)
    assert one.predict(700).partition.sizes == (300, 200, 200)
    # The node above, short by what is missing.
    assert one.predict(701).partition.sizes == (300, 300, 101)
    assert one.predict(605).partition.sizes == (300, 200, 105)
    assert one.predict(800).partition.sizes == (300, 300, 200)
    behind = one.predict(700, past=700).partition
    assert (behind.sizes, behind.past) == ((200, 300, 200), 700)
    # Between past shares there is nothing but interpolation.
    assert one.predict(700, past=100).partition.context == 700
    assert one.predict(650, quantum=1).partition.context == 650
    again = PartitionPredictor.from_json(one.to_json())
    assert again.grids == one.grids
    assert again.predict(701) == one.predict(701)


@given(st.integers(600, 800), st.integers(0, 800), st.sampled_from([None, 1, 100]))
def test_whole_nodes_give_valid_partitions(context: int, past: int, quantum: int | None) -> None:
    one = PartitionPredictor([WHOLE], predictor().training, COST)
    found = one.predict(context, past=past, quantum=quantum, fallback="even").partition
    assert (found.context, found.past, found.ranks) == (context, past, 3)
    assert min(found.sizes) >= 1


def test_out_of_range_names_the_range() -> None:
    one = predictor()
    with pytest.raises(OutOfRangeError, match="trained for 2, 3, 8 ranks; say which"):
        one.predict(2000)
    with pytest.raises(OutOfRangeError, match=r"context 999 is outside the trained range of 1000 to 40000 tokens"):
        one.predict(999, 2)
    with pytest.raises(OutOfRangeError, match="not trained for 4 ranks, but for 2, 3, 8"):
        one.predict(2000, 4)
    with pytest.raises(
        OutOfRangeError, match="past 18000 is outside the trained range for 2 ranks, 0 to 8000 at 2000"
    ):
        one.predict(2000, 2, past=18_000)
    with pytest.raises(OutOfRangeError, match="no fallback 'nearest'"):
        one.predict(999, 2, fallback="nearest")  # type: ignore[arg-type]
    for wrong in (True, 2000.5, "2000", -1):
        with pytest.raises(PartitionError):
            one.predict(wrong, 2)  # type: ignore[arg-type]


SEARCHED = ((1000, 0), (40_000, 0), (1000, 4000), (40_000, 4000))


def test_the_range_is_what_lies_between_searched_points() -> None:
    one = PartitionPredictor([msgspec.structs.replace(grid(2), searched=SEARCHED)], predictor().training, COST)
    # 80% of all tokens, as at the shortest context, and yet nothing so long was ever searched behind so many.
    with pytest.raises(
        OutOfRangeError, match="past 30000 is outside the trained range for 2 ranks, 0 to 4000 at 20000"
    ):
        one.predict(20_000, past=30_000)
    assert not one.explain(20_000, past=30_000).inside
    assert one.predict(20_000, past=30_000, fallback="even").source == "even"
    for past in (0, 1, 4000):
        assert one.predict(20_000, past=past).source == "predicted"
        assert one.explain(20_000, past=past).inside
    with pytest.raises(OutOfRangeError, match="0 to 4000 at 20000 tokens"):
        one.predict(20_000, past=4001)


def test_what_was_searched_behind_one_past_only_is_answered_behind_it_only() -> None:
    searched = ((1000, 2000), (40_000, 2000))
    one = PartitionPredictor([msgspec.structs.replace(grid(2), searched=searched)], predictor().training, COST)
    assert one.predict(5000, past=2000).source == "predicted"
    for past in (0, 1999, 2001):
        with pytest.raises(OutOfRangeError, match="2 ranks, 2000 at 5000 tokens"):
            one.predict(5000, past=past)


def test_what_answers_behind_cached_tokens_only_is_not_exported_as_nothing() -> None:
    searched = ((1000, 2000), (40_000, 2000))
    behind = PartitionPredictor([msgspec.structs.replace(grid(2), searched=searched)], predictor().training, COST)
    with pytest.raises(OutOfRangeError, match="answers behind cached tokens only"):
        router_table(behind)
    with pytest.raises(OutOfRangeError, match="cached tokens"):
        vllm_config(behind)
    # Nodes that nothing was searched around are none of its answers.
    inner = msgspec.structs.replace(grid(2), searched=((2000, 0), (5000, 0), (40_000, 8000)))
    routes = router_table(PartitionPredictor([inner], predictor().training, COST)).routes
    assert [route.context for route in routes] == [2000, 5000]
    with pytest.raises(OutOfRangeError, match="nothing on 3 ranks was searched without cached tokens"):
        vllm_config(PartitionPredictor([inner], predictor().training, COST), ranks=3)


def test_the_cost_model_knows_how_fast_each_rank_is() -> None:
    slow = msgspec.structs.replace(grid(2), speeds=(0.5, 1.0))
    one, alike = PartitionPredictor([slow], predictor().training, COST), predictor(2)
    split = one.predict(80_000, fallback="cost-model").partition
    times = [COST.seconds(split.sizes[0], 0) / 0.5, COST.seconds(split.sizes[1], split.sizes[0])]
    assert times[0] == pytest.approx(times[1], rel=1e-3)
    assert split.sizes[0] < 0.8 * alike.predict(80_000, fallback="cost-model").partition.sizes[0]
    # Of another number of ranks nobody has said anything.
    assert one.predict(80_000, 3, fallback="cost-model") == alike.predict(80_000, 3, fallback="cost-model")


def test_it_says_what_to_expect() -> None:
    found = predictor().explain(3000, 3)
    assert (found.inside, found.method, found.nearest) == (True, "corrected", (1000, 5000))
    assert found.regret == Regret(0.001, 0.002, 0.003, 4)
    # Of two ranks nothing was told apart; what all lost together is what is known.
    assert predictor().explain(5000, 2).regret == Regret(0.002, 0.004, 0.006, 12)
    outside = predictor().explain(50_000, 2)
    assert not outside.inside
    assert "outside the trained range" in outside.reason


def test_a_file_predicts_the_same_wherever_it_is_read(tmp_path: Path) -> None:
    one = predictor()
    one.save(tmp_path / "one.json")
    again = load(tmp_path / "one.json")
    assert isinstance(again, PartitionPredictor)
    assert again.to_json() == one.to_json()
    assert again.training == one.training
    digest = hashlib.sha256()
    for ranks in (2, 3, 8):
        for context in range(1000, 40_000, 37):
            past = context % 5 * 300
            sizes = one.predict(context, ranks, past).partition.sizes
            assert again.predict(context, ranks, past).partition.sizes == sizes
            digest.update(repr(sizes).encode())
    # Worked out once; another platform or Python must come to the same tokens.
    assert digest.hexdigest() == GOLDEN


GOLDEN = "fd9f82c331266f3fe6b7671ab001d8f3b4e70023ea8a0b26d670dd89f69c1f72"


def test_threads_get_what_one_gets() -> None:
    one = predictor()
    asked = [(context, ranks, context % 7 * 100) for context in range(1000, 9000, 11) for ranks in (2, 3, 8)]
    right = [one.predict(*each) for each in asked]
    found: list[Any] = [None] * 8

    def ask(at: int) -> None:
        found[at] = [one.predict(*each) for each in asked]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each == right for each in found)


def test_serving_needs_no_more_than_msgspec(tmp_path: Path) -> None:
    predictor().save(tmp_path / "one.json")
    code = (
        "from kvr_partition import load\n"
        f"one = load({str(tmp_path / 'one.json')!r})\n"
        "one.predict(3000, 3); one.explain(3000, 3); one.predict(99, 3, fallback='cost-model')"
    )
    loaded = loaded_after(code)
    assert "msgspec" in loaded
    assert not loaded & set(HEAVY)


def test_grids_that_make_no_sense_are_refused() -> None:
    good = grid(3)
    cases = {
        "ranks must be": {"ranks": 1},
        "contexts must grow": {"contexts": (1000, 1000, 5000, 40_000)},
        "from at least as many tokens": {"contexts": (2, 2000, 5000, 40_000)},
        "past_shares must grow": {"past_shares": (0.0, 0.0, 0.8)},
        "past_shares lie": {"past_shares": (0.0, 0.3, 1.0)},
        "a row for each": {"past_shares": (0.0, 0.3)},
        "speeds must be 3 numbers": {"speeds": (1.0, 1.0)},
        "numbers above 0": {"speeds": (1.0, 1.0, 0.0)},
        "one at least": {"searched": ()},
        "no prompt has more": {"contexts": (1000, 2000, 5000, 2**62)},
        "must lie among the nodes": {"searched": ((1000, 0), (40_001, 0))},
        "lie among the nodes": {"searched": ((1000, 0), (1000, 9000))},
        "2 growing shares": {"boundaries": tuple(((0.6, 0.5),) * 4 for _ in SHARES)},
    }
    for message, change in {
        "every multiple of 100 tokens": {"contexts": (600, 700, 900)},
        "every multiple of 128 tokens": {"quantum": 128},
        "different multiples of 100": {"boundaries": (((1 / 3, 0.34), (3 / 7, 5 / 7), (3 / 8, 6 / 8)),) * 2},
    }.items():
        with pytest.raises(PartitionError, match=message):
            PartitionPredictor([msgspec.structs.replace(WHOLE, **change)], predictor().training, COST)
    for message, change in cases.items():
        wrong = msgspec.structs.replace(good, **change)
        with pytest.raises(PartitionError, match=message):
            PartitionPredictor([wrong], predictor().training, COST)
    with pytest.raises(PartitionError, match="two grids for 3 ranks"):
        PartitionPredictor([good, good], predictor().training, COST)
    with pytest.raises(PartitionError, match="one rank count at least"):
        PartitionPredictor([], predictor().training, COST)
    with pytest.raises(PartitionError, match="must not be negative"):
        PartitionPredictor([good], predictor().training, ChunkCost(-1.0, 1.0, 0.0, 0.0, 0.0))


def test_files_of_others_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    whole = json.loads(predictor().to_json())
    wrongs: dict[str, Any] = {
        "unknown field": {**whole, "extra": 1},
        "missing required field": {key: value for key, value in whole.items() if key != "grids"},
        "this version reads 'kvr-partition/predictor/3'": {
            **whole,
            "schema": "kvr-partition/predictor/9",
        },
        "Expected `float`": {**whole, "cost": {**whole["cost"], "fixed_s": "0"}},
        "grid of 2 ranks": {**whole, "grids": [{**whole["grids"][0], "past_shares": [0.5, 0.1, 0.2]}]},
    }
    for message, wrong in wrongs.items():
        file.write_text(json.dumps(wrong))
        with pytest.raises(FileFormatError, match=message) as caught:
            load(file)
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps(whole).replace("0.2", "NaN", 1))
    with pytest.raises(FileFormatError):
        load(file)
    file.write_bytes(b'{"schema": "kvr-partition/predictor/3", ' + b" " * (65 << 20) + b"}")
    with pytest.raises(FileFormatError, match="larger than 64 MiB"):
        load(file)
    PartitionTable([]).save(file)
    with pytest.raises(FileFormatError, match="has schema 'kvr-partition/table/2'"):
        PartitionPredictor.from_json(file.read_bytes(), file)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_harmless(data: st.DataObject) -> None:
    """Bytes changed, dropped and repeated at random: never anything but our error or a predictor that predicts."""
    content = bytearray(predictor(2).to_json())
    for _ in range(data.draw(st.integers(1, 4))):
        if not content:
            break
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["change", "drop", "repeat", "tear"])):
            case "change":
                content[at] = data.draw(st.integers(0, 255))
            case "drop":
                del content[at : at + data.draw(st.integers(1, 40))]
            case "repeat":
                content[at:at] = content[at : at + data.draw(st.integers(1, 400))]
            case _:
                del content[at + 1 :]
    try:
        one = PartitionPredictor.from_json(bytes(content))
    except FileFormatError:
        return
    for context in (1000, 3333, 40_000):
        try:
            assert one.predict(context, 2).partition.context == context
        except KVRError:
            continue
