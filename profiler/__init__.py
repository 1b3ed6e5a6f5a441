"""Measure prefills on real ranks: start them, time candidates by one protocol, keep every sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from profiler.measure import Candidate, SamplingPlan
from profiler.ranks import RankGroup
from profiler.store import MeasurementLog

if TYPE_CHECKING:
    from profiler.session import Session

__all__ = ["Candidate", "MeasurementLog", "RankGroup", "SamplingPlan", "Session"]


def __getattr__(name: str) -> Any:
    # A session searches; ranks, which import this package too, do not.
    if name == "Session":
        from profiler.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
