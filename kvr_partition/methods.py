"""Names of the methods that KV-Runahead is compared with."""

from __future__ import annotations

from typing import Literal, get_args

GatheringMethod = Literal["tsp", "tsp-causal", "zigzag"]
"""TSP as published, TSP with causal kernels, and zigzag context parallelism: all gather the KV of all ranks."""

GATHERING: tuple[GatheringMethod, ...] = get_args(GatheringMethod)

ONE_RANK = ("stock", "single")
"""Methods of one rank: transformers as it is, and what KV-Runahead runs on each rank with one chunk for it all."""

BASELINES = (*GATHERING, "tp")
"""All of them, tensor parallelism included."""
