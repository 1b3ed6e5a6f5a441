"""What a link can do, tried with rows that are no model's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvr_partition.partition import Partition
from kvr_partition.runtime.agreement import Agreement
from kvr_partition.runtime.execution import on_device
from kvr_partition.runtime.links.group import LinkSetup, link_setup
from kvr_partition.runtime.links.plan import Hop, Piece, Slot


def time_pairs(
    agreement: Agreement, device: torch.device, pairs: Sequence[tuple[int, int]], nbytes: int, repeats: int
) -> dict[tuple[int, int], list[float]]:
    """Time messages between CUDA ranks, over all pairs at once. All ranks of the group call this.

    Args:
        pairs: the sending rank and the receiving one, which comes later.
        nbytes: of a message.
        repeats: messages of each pair, one after the other.

    Returns:
        For each pair that this rank sends to, the seconds that the stream was busy with each message.
    """
    rank, ranks = agreement.rank, agreement.ranks
    with agreement.turn() as turn, on_device(device):
        turn.open = True
        setup: LinkSetup = link_setup(turn, device)
        partition = Partition((1,) * ranks)
        execution = setup.execution
        rows = execution.empty((ranks, nbytes), dtype=torch.uint8, device=device).zero_()
        slots = [Slot(rows, 0, None)] * repeats
        near = sorted({low if high == rank else high for low, high in pairs if rank in (low, high)})
        wires, watch = setup.wires(partition, slots, device, turn, near)
        into = [
            Hop(low, Piece(low, partition.starts[low], partition.ends[low])) for low, high in pairs if high == rank
        ]
        out = [
            Hop(high, Piece(rank, partition.starts[rank], partition.ends[rank]))
            for low, high in pairs
            if low == rank
        ]
        if watch is not None:
            watch.begin([into] * repeats)
        posted = [
            (hop, wires[hop.peer].post(layer, hop, slot)) for layer, slot in enumerate(slots) for hop in into
        ]
        turn.exchange(b"")  # nobody begins before all are there
        spans: dict[tuple[int, int], list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        for hop in out:
            stream = setup.streams.to(hop.peer)
            stream.wait_stream(torch.cuda.current_stream())
            for layer in range(repeats):
                begin, end = setup.streams.timer(), setup.streams.timer()
                begin.record(stream)
                wires[hop.peer].send(layer, hop, rows[rank : rank + 1], stream)
                end.record(stream)
                spans.setdefault((rank, hop.peer), []).append((begin, end))
        for hop, what in posted:
            wires[hop.peer].wait(what, torch.cuda.current_stream())
        for hop in out:
            turn.wait_for_device(setup.streams.to(hop.peer).record_event(), hop.peer)
        if into:
            turn.wait_for_device(torch.cuda.current_stream().record_event(), into[0].peer)
        if watch is not None:
            watch.end()
        turn.exchange(b"")  # nobody's rows go before all have been written
        return {pair: [begin.elapsed_time(end) / 1e3 for begin, end in each] for pair, each in spans.items()}
