from __future__ import annotations

import math
from itertools import product

import pytest

from kvr_partition.measurement import Failure, Measurement, interval_is_sure, median, median_interval


@pytest.mark.parametrize("n", range(1, 15))
def test_the_interval_is_the_narrowest_symmetric_one_with_the_confidence(n: int) -> None:
    values = list(range(n))
    low, high = median_interval(values)
    assert high == n - 1 - low

    def coverage(k: int) -> float:
        """Chance that the median of a continuous distribution lies between k-th smallest and largest."""
        outcomes = (sum(sides) for sides in product((0, 1), repeat=n))
        return sum(k <= below <= n - k for below in outcomes) / 2**n

    k = int(low) + 1
    if interval_is_sure(n):
        assert coverage(k) >= 0.95
        assert k + 1 > n // 2 or coverage(k + 1) < 0.95
    else:
        assert (low, high) == (0, n - 1)
        assert coverage(1) < 0.95


def test_median() -> None:
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5


def test_a_failed_candidate_never_wins() -> None:
    failed = Measurement("kvr", (1, 1), (), "failed", failure=Failure("lost", "gone"))
    assert not failed.ok
    assert failed.ttft_s == math.inf
