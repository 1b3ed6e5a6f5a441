"""What the numbers of a comparison mean, and how attention is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition import Partition
from kvr_partition.certificate import Certificate, Deviation
from kvr_partition.cli.comparison import Comparison, together
from kvr_partition.cli.options import parse_bytes, parse_rate
from kvr_partition.dtypes import DTYPES
from kvr_partition.errors import UnsupportedError
from kvr_partition.measurement import Failure, Measurement, RankTimes, Sample
from kvr_partition.work import attention_dot_products
from tests.models import provenance


def timed(method: str, sizes: tuple[int, ...], seconds: float, noise: int = 0) -> Measurement:
    sample = Sample(seconds, (RankTimes(seconds, 0.0, 0.0),) * len(sizes), kv_bytes=1000)
    return Measurement(method, sizes, (sample,) * 6, "precise", noise=noise)


NAMED = [
    ("single", timed("single", (100,), 1.0)),
    ("TSP", timed("tsp", (50, 50), 0.9)),
    ("zigzag", timed("zigzag", (50, 50), 0.6)),
    ("KVR-S", timed("kvr", (60, 40), 0.5)),
    ("TTFT(p)", timed("bound", (60, 40), 0.4)),
]


def test_each_number_means_what_its_name_says() -> None:
    noisy = [("TSP", timed("tsp", (50, 50), 0.99, 7)), ("KVR-S", timed("kvr", (60, 40), 0.51, 7))]
    facts = {fact["method"]: fact for fact in Comparison(NAMED, noisy, ranks=2, windows=[None, None]).facts()}
    ours = facts["KVR-S"]
    assert ours["ttft_s"] == 0.5
    assert ours["speedup_over_tsp"] == pytest.approx(0.9 / 0.5)
    assert ours["speedup_over_best_baseline"] == pytest.approx(0.6 / 0.5)
    assert ours["efficiency"] == pytest.approx(1.0 / (2 * 0.5))
    assert ours["over_bound"] == pytest.approx(0.25)
    assert ours["loss_under_noise"] == pytest.approx(0.02)
    assert ours["noise_bytes"] == 7
    assert facts["TSP"]["loss_under_noise"] == pytest.approx(0.1)
    assert facts["zigzag"]["over_bound"] is None
    assert facts["single"]["efficiency"] is None
    assert facts["TSP"]["attention_dot_products"] == 2 * 100 * 100
    assert ours["attention_dot_products"] == 2 * 5050
    shared = {fact["method"]: fact for fact in Comparison(NAMED, ranks=2, shared=True).facts()}
    assert shared["KVR-S"]["efficiency"] == pytest.approx(2.0)  # all ranks together are one GPU


def test_columns_without_a_value_are_left_out_and_failures_say_why() -> None:
    failed = Measurement("tsp", (50, 50), (), "failed", failure=Failure("lost", "rank 1 is gone"))
    header, rows = Comparison([NAMED[0], ("TSP", failed)], ranks=2).table()
    assert header == ["method", "TTFT", "95% interval", "KV sent", "chunks"]
    assert rows[1] == ["TSP", "failed", "", "", "50/50  rank 1 is gone"]
    header, rows = together([("100", Comparison(NAMED, ranks=2)), ("200", Comparison(NAMED[:1], ranks=2))])
    assert header[:3] == ["context", "method", "TTFT"]
    assert [row[0] for row in rows] == ["100", "", "", "", "", "200"]
    assert all(len(row) == len(header) for row in rows)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4).map(lambda sizes: Partition(sizes)),
    st.none() | st.integers(1, 20),
)
def test_dot_products_are_counted_one_by_one(partition: Partition, window: int | None) -> None:
    seen = [
        sum(1 for key in range(query + 1) if window is None or key > query - window)
        for query in range(partition.context)
    ]
    for method in ("single", "kvr", "zigzag", "bound", "tsp-causal"):
        assert attention_dot_products(method, partition, [window, window]) == 2 * sum(seen)
    assert attention_dot_products("tsp", partition, [window]) == partition.context**2
    masked = sum(
        size * (size + (start if window is None else min(start, window - 1)))
        for size, start in zip(partition.sizes, partition.starts, strict=True)
    )
    assert attention_dot_products("kvr", partition, [window], "cache") == masked


@pytest.mark.parametrize(
    ("text", "value"), [("10GB/s", 1e10), ("1.5 GiB/s", 1.5 * 2**30), ("250mb/s", 2.5e8), ("5e9", 5e9)]
)
def test_a_bandwidth_is_read(text: str, value: float) -> None:
    assert parse_rate(text) == value


@pytest.mark.parametrize("text", ["fast", "10Gbit/s", "-3GB/s", "0GB/s", "", "10GB/h", "nan"])
def test_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match="bandwidth"):
        parse_rate(text)
    assert parse_bytes("0", "--noise") == 0


def certificate(*deviations: Deviation, same_token: bool = True) -> Certificate:
    return Certificate("kvr", (60, 40), "float64", same_token, deviations, provenance())


def test_a_certificate_names_the_first_layer_and_rank_that_diverge() -> None:
    fine = Deviation(1, 0, 3e-7, 2e-7)
    assert certificate(fine).holds
    broken = certificate(
        Deviation(1, None, 0.5, 1e-7), Deviation(2, 4, 0.3, 1e-7), Deviation(1, 4, 0.2, 1e-7), fine
    )
    assert not broken.holds
    assert broken.divergence == Deviation(1, 4, 0.2, 1e-7)
    assert certificate(Deviation(1, None, 0.5, 1e-7), fine).divergence == Deviation(1, None, 0.5, 1e-7)
    assert not certificate(fine, same_token=False).holds
    assert not certificate(Deviation(0, 0, float("inf"), 1e-7)).holds


def test_rounding_is_allowed_what_it_costs_one_rank_twice_and_no_more() -> None:
    for dtype, epsilon in ((name, one.epsilon) for name, one in DTYPES.items()):
        assert Deviation(0, 0, 2e-3 + epsilon, 1e-3).within(dtype)
        assert not Deviation(0, 0, (2e-3 + epsilon) * 1.001, 1e-3).within(dtype)
