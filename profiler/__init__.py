"""Measure prefills on real ranks: start them, time candidates by one protocol, keep every sample."""

from __future__ import annotations

from profiler.measure import Candidate, SamplingPlan
from profiler.ranks import RankGroup
from profiler.store import MeasurementLog

__all__ = ["Candidate", "MeasurementLog", "RankGroup", "SamplingPlan"]
