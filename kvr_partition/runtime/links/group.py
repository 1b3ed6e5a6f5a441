"""The links of a process group: which kind a device needs, and how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from kvr_partition.partition import Partition
from kvr_partition.runtime.agreement import LINK_CTAS, Turn, agreement_of, made_for_links, timeout_s
from kvr_partition.runtime.links.host import HostLinks
from kvr_partition.runtime.links.plan import NO_LIMITS, LinkLimits, Links, NoLinks, Topology
from kvr_partition.runtime.links.stream import StreamLinks


def link_group(ranks: Sequence[int] | None = None) -> dist.ProcessGroup | None:
    """A process group made for the links of a prefill, to be given to `prefill`.

    NCCL takes as many SMs for a transfer as make it the fastest. A prefill has a whole layer's time for each one,
    and needs the SMs. All ranks of the world call this, once.

    Args:
        ranks: of the world, those that prefill together; all when None.
    """
    backend, options = None, None
    timeout = timedelta(seconds=timeout_s(dist.group.WORLD))
    if "nccl" in dist.get_backend_config():
        backend, options = "nccl", dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = LINK_CTAS
        # Torch ends the process at its time-out; by then this rank has told who it waited for.
        timeout = 2 * timeout + timedelta(seconds=10)
    group: dist.ProcessGroup | None = dist.new_group(ranks, timeout=timeout, backend=backend, pg_options=options)
    if isinstance(group, dist.ProcessGroup):
        made_for_links.add(group)
        agreement_of(group)  # ranks meet here, not on the clock of the first prompt
    return group


def group_links(
    partition: Partition,
    rank: int,
    device: torch.device,
    *,
    turn: Turn,
    topology: Topology = "chain",
    limits: LinkLimits = NO_LIMITS,
) -> Links:
    """The links of one rank in one turn of its group, whichever its device needs."""
    if turn.of is None:
        return NoLinks()
    kind = StreamLinks if device.type == "cuda" else HostLinks
    # In a chain neighbours talk to each other, in a fan-out all do.
    near = 1 if topology == "chain" else partition.ranks
    peers = [peer for peer in range(partition.ranks) if 0 < abs(peer - rank) <= near]
    return kind(partition, rank, topology, limits, turn.of.links(device, peers), turn)
