"""KVR-S: search for the partition with the shortest time to first token, as an Optuna study."""

from kvr_partition.search.informed import HierarchicalGridSampler, InformedSampler
from kvr_partition.search.replay import Replay
from kvr_partition.search.result import SearchResult, Trial
from kvr_partition.search.samplers import SAMPLERS
from kvr_partition.search.space import Seed
from kvr_partition.search.study import search

__all__ = [
    "SAMPLERS",
    "HierarchicalGridSampler",
    "InformedSampler",
    "Replay",
    "SearchResult",
    "Seed",
    "Trial",
    "search",
]
