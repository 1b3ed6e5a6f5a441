"""The schedule once more, slow and obvious: when anything happens is what has to happen before it."""

from __future__ import annotations

from functools import cache

from kvr_partition import Partition
from kvr_partition.machine.machine import Machine
from kvr_partition.noise import noisy_link


def finished(partition: Partition, machine: Machine) -> list[float]:
    """When each rank is done, in seconds."""
    cost, layers, ranks = machine.cost, machine.layers, partition.ranks
    sizes = partition.sizes
    whole = machine.topology == "chain" and machine.forwards != "chunks"
    blocking = machine.topology == "chain" and machine.forwards == "blocking"
    starts = [machine.past + sum(sizes[:rank]) for rank in range(ranks)]

    def per_layer(rank: int, seconds: float) -> float:
        return seconds * machine.slowness(rank) / layers

    def before_kv(rank: int) -> float:
        return per_layer(rank, cost.kv_share * (cost.fixed_s + cost.per_token_s * sizes[rank]))

    def own_block(rank: int) -> float:
        pairs = sizes[rank] ** 2 if machine.dense else sizes[rank] ** 2 / 2
        return per_layer(rank, cost.per_own_pair_s * pairs)

    def the_rest(rank: int) -> float:
        linear = (1 - cost.kv_share) * (cost.fixed_s + cost.per_token_s * sizes[rank])
        rest = per_layer(rank, linear + cost.per_prefix_pair_s * sizes[rank] * starts[rank])
        return rest if machine.overlap else rest + own_block(rank)

    def queue(source: int, target: int) -> list[tuple[int, int | None]]:
        """Messages of a link in their order: (layer, chunk), or None for background traffic."""
        messages: list[tuple[int, int | None]] = []
        for layer in range(layers):
            if target == source + 1 and noisy_link(layer, ranks, machine.noise, machine.noise_seed) == source:
                messages.append((layer, None))
            # One message with everything goes by the name of the rank's own chunk.
            messages.append((layer, source))
            if machine.topology == "chain" and not whole:
                messages += [(layer, chunk) for chunk in range(source - 1, -1, -1)]
        return messages

    @cache
    def began(rank: int, layer: int) -> float:
        return 0.0 if layer == 0 else ended(rank, layer - 1)

    @cache
    def ready(rank: int, layer: int) -> float:
        return began(rank, layer) + before_kv(rank)

    def met(rank: int, layer: int) -> float:
        """When a rank has done all that needs nothing from others."""
        return ready(rank, layer) + (own_block(rank) if machine.overlap else 0.0)

    @cache
    def left(source: int, target: int, position: int) -> float:
        """When the last byte of a message has left."""
        layer, chunk = queue(source, target)[position]
        available = ready(source, layer)
        if chunk is not None and whole:
            available = max([available, *(arrived(source, layer, one) for one in range(source))])
        elif chunk is not None and chunk != source:
            available = max(available, arrived(source, layer, chunk))
        if chunk is not None and blocking:
            available = max(available, met(source, layer), met(target, layer))
        free = left(source, target, position - 1) if position else 0.0
        tokens = sum(sizes[: source + 1]) if whole else sizes[source if chunk is None else chunk]
        nbytes = machine.noise if chunk is None else tokens * machine.entry_bytes
        return max(available, free) + nbytes * machine.link_between(source, target).seconds_per_byte

    @cache
    def arrived(rank: int, layer: int, chunk: int) -> float:
        source = rank - 1 if machine.topology == "chain" else chunk
        position = queue(source, rank).index((layer, source if whole else chunk))
        return left(source, rank, position) + machine.link_between(source, rank).latency_s

    @cache
    def ended(rank: int, layer: int) -> float:
        resumed = met(rank, layer)
        for chunk in range(rank):
            resumed = max(resumed, arrived(rank, layer, chunk))
        if blocking and rank + 1 < ranks:
            resumed = left(rank, rank + 1, queue(rank, rank + 1).index((layer, rank)))
        return resumed + the_rest(rank)

    return [ended(rank, layers - 1) for rank in range(ranks)]
