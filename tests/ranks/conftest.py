"""Ranks that tests start in their own process are forked, too."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

import profiler.linktest
import profiler.transport
from tests.forked import ForkedRanks


@pytest.fixture(autouse=True, scope="session")
def forked_ranks() -> Iterator[None]:
    """See `tests.forked`; ranks of programs that these tests run by themselves start as ever."""
    ForkedRanks.take_over()
    yield
    profiler.transport.subprocess = profiler.linktest.subprocess = subprocess
