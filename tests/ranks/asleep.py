"""Runs on real gloo ranks, in processes of its own: prefills whose computing is a sleep and whose links are real.

``python -m tests.ranks.asleep FOLDER RANK RANKS`` carries out the cases of ``FOLDER/cases.json`` one after the
other and writes what this rank saw of each to ``FOLDER/seen<rank>.json``. Nothing but the links takes a core, so
ranks do not disturb each other however many there are.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from kvr_partition import Partition
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.runtime.agreement import agreement_of
from kvr_partition.runtime.links.group import link_setup
from kvr_partition.runtime.links.messages import Messages
from kvr_partition.runtime.links.plan import Hop, LinkLimits, Slot, Topology


class Case(msgspec.Struct, frozen=True):
    """One prefill.

    Attributes:
        sizes: of the chunks.
        cost: of a chunk, all layers together.
        layers, entry_bytes, speeds, topology: as in `kvr_partition.machine.machine.Machine`.
        bandwidth: bytes per second each link is held to.
        noise: bytes of background traffic in each layer.
    """

    sizes: tuple[int, ...]
    cost: ChunkCost
    layers: int
    entry_bytes: int
    bandwidth: float
    speeds: tuple[float, ...] = ()
    topology: Topology = "chain"
    noise: int = 0

    def machine(self, latency_s: float = 0.0) -> Machine:
        """The same for the schedule."""
        return Machine(
            self.cost,
            self.layers,
            self.entry_bytes,
            link=LinkCost.of(self.bandwidth, latency_s),
            speeds=self.speeds,
            topology=self.topology,
            noise=self.noise,
        )


class Seen(msgspec.Struct, frozen=True):
    """What one rank saw of a case.

    Attributes:
        end_s: when it was done, in seconds from when all ranks began.
        sent: layer, receiving rank and chunk of its messages, in the order they left.
    """

    end_s: float
    sent: tuple[tuple[int, int, int], ...]


def main() -> None:
    """Join the world, carry out the cases, write what was seen."""
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    cases = msgspec.json.decode((folder / "cases.json").read_bytes(), type=list[Case])
    seen = [carried_out(case) for case in cases]
    agreement_of(None).barrier()
    (folder / f"seen{rank}.json").write_bytes(msgspec.json.encode(seen))
    dist.destroy_process_group()


def carried_out(case: Case) -> Seen:
    """One prefill of this rank."""
    partition, device = Partition(case.sizes), torch.device("cpu")
    limits = LinkLimits(bandwidth=case.bandwidth, noise=case.noise)
    sent: list[tuple[int, int, int]] = []
    send = Messages.send

    def recorded(self: Messages, layer: int, hop: Hop, rows: torch.Tensor) -> Any:
        sent.append((layer, hop.peer, hop.piece.chunk))
        return send(self, layer, hop, rows)

    Messages.send = recorded  # type: ignore[method-assign]
    try:
        with agreement_of(None).turn() as turn:
            assert turn.of is not None
            turn.open = True
            rank = turn.of.rank
            before_kv, own_block, rest = shares(case, rank)
            setup = link_setup(turn, device)
            setup.connect(turn, device, case.topology)
            slots = [
                Slot(torch.zeros(partition.ends[rank], case.entry_bytes, dtype=torch.uint8), 0, None)
                for _ in range(case.layers)
            ]
            links = setup.row_links(partition, slots, device, turn, case.topology, limits)
            # The clock is the host's, the same for all ranks. The last one to come says when.
            began = max(map(json.loads, turn.exchange(json.dumps(time.monotonic() + 0.1).encode())))
            links.start(slots)
            until(began)
            for layer in range(case.layers):
                time.sleep(before_kv)
                links.kv_ready(layer)
                time.sleep(own_block)
                if rank:
                    links.wait_prefix(layer)
                time.sleep(rest)
            end = time.monotonic() - began
            links.finish()
    finally:
        Messages.send = send  # type: ignore[method-assign]
    return Seen(end, tuple(sent))


def shares(case: Case, rank: int) -> tuple[float, float, float]:
    """Seconds a layer takes a rank until its KV is ready, for its own block, and for the rest."""
    cost, machine = case.cost, case.machine()
    size, start = case.sizes[rank], sum(case.sizes[:rank])
    slow = machine.slowness(rank) / case.layers
    linear = (cost.fixed_s + cost.per_token_s * size) * slow
    return (
        linear * cost.kv_share,
        cost.per_own_pair_s * size**2 / 2 * slow,
        linear * (1 - cost.kv_share) + cost.per_prefix_pair_s * size * start * slow,
    )


def until(moment: float) -> None:
    """Sleep until then."""
    time.sleep(max(0.0, moment - time.monotonic()))


if __name__ == "__main__":
    main()
