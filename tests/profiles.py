"""A machine of three ranks, and its profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.profile import Profile
from profiler.models import open_model
from tests.models import provenance

COST = ChunkCost(1e-3, 2e-5, 2e-9, 1.5e-9, 0.25)


LINKS = (LinkCost.of(2e9, 1e-4), LinkCost.of(1e9, 2e-4))


MACHINE = Machine(COST, 3, 512, link=LINKS, speeds=(1.0, 1.25, 1.0), solo_speedup=1.25)


def profile_of(folder: Path, **changes: Any) -> Profile:
    origin = provenance(ranks=3, model=open_model(folder).geometry)
    return msgspec.structs.replace(Profile.of(MACHINE, 4096, origin), **changes)
