"""Attention kernels that also return the log-sum-exp of their scores, and how results are merged."""

from __future__ import annotations

from kvr_partition.runtime.kernels.merging import merge_
from kvr_partition.runtime.kernels.plans import CudnnPlans, kernels_without_plans, planning, query_rows
from kvr_partition.runtime.kernels.table import KERNELS, Kernel, KernelChoice, attend, attend_parts

__all__ = [
    "KERNELS",
    "CudnnPlans",
    "Kernel",
    "KernelChoice",
    "attend",
    "attend_parts",
    "kernels_without_plans",
    "merge_",
    "planning",
    "query_rows",
]
