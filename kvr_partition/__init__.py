"""Find, store and use the best uneven split of a long prompt for KV-Runahead prefill.

Importing this package costs next to nothing: each public name is loaded when it is first touched,
and none of them needs more than the standard library and msgspec.
"""

from __future__ import annotations

from kvr_partition._version import __version__

TYPE_CHECKING = False  # `typing` itself takes longer to import than all of this

if TYPE_CHECKING:
    from typing import Any

    from kvr_partition.errors import (
        KVRError,
        NotFiniteError,
        OutOfRangeError,
        PartitionError,
        RankError,
        UnsupportedError,
    )
    from kvr_partition.loading import load
    from kvr_partition.partition import Partition
    from kvr_partition.predictor import PartitionPredictor
    from kvr_partition.table import Lookup, PartitionTable

__all__ = [
    "KVRError",
    "Lookup",
    "NotFiniteError",
    "OutOfRangeError",
    "Partition",
    "PartitionError",
    "PartitionPredictor",
    "PartitionTable",
    "RankError",
    "UnsupportedError",
    "__version__",
    "load",
]

_HOME = {
    "KVRError": "kvr_partition.errors",
    "NotFiniteError": "kvr_partition.errors",
    "OutOfRangeError": "kvr_partition.errors",
    "PartitionError": "kvr_partition.errors",
    "RankError": "kvr_partition.errors",
    "UnsupportedError": "kvr_partition.errors",
    "Partition": "kvr_partition.partition",
    "Lookup": "kvr_partition.table",
    "PartitionTable": "kvr_partition.table",
    "PartitionPredictor": "kvr_partition.predictor",
    "load": "kvr_partition.loading",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'kvr_partition' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
