"""prefill(): one rank's part of a KV-Runahead prefill, and decoding on from its result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers.cache_utils import Cache

from kvr_partition.errors import PartitionError
from kvr_partition.partition import Partition
from kvr_partition.predictor import PartitionPredictor
from kvr_partition.runtime import attention
from kvr_partition.runtime.cache import RunaheadCache, RunaheadLayer
from kvr_partition.runtime.execution import AT_ONCE, Execution
from kvr_partition.runtime.group_links import group_links
from kvr_partition.runtime.kernels import CudnnPlans
from kvr_partition.runtime.links import NO_LIMITS, LinkLimits, Links, NoLinks, Topology
from kvr_partition.runtime.support import (
    Depth,
    check_context,
    first_token,
    forward,
    probe,
    replaced_attention,
)
from kvr_partition.table import PartitionTable
from kvr_partition.timeline import RankTimeline


@dataclass(frozen=True)
class PrefillResult:
    """What a rank has after a prefill.

    Attributes:
        rank, ranks: which rank this is, of how many.
        first_token: greedy first token of each prompt, ``[batch, 1]`` int64 on the host; None except on
            the last rank.
        logits: logits of the prompt's last position, ``[batch, vocabulary]``; None except on the last rank.
        cache: this rank's KV; on the last rank that of the whole prompt, ready for ``generate``.
        kv_bytes: bytes of KV this rank put on the wire.
    """

    rank: int
    ranks: int
    first_token: torch.Tensor | None
    logits: torch.Tensor | None
    cache: Any
    kv_bytes: int
    _timeline: Callable[[], RankTimeline]

    @property
    def is_last(self) -> bool:
        """Whether this is the rank that decodes on."""
        return self.rank == self.ranks - 1

    @property
    def timeline(self) -> RankTimeline:
        """Where this rank's time went, layer by layer."""
        return self._timeline()


def prefill(
    model: Any,
    input_ids: torch.Tensor,
    partition: Partition | PartitionTable | PartitionPredictor,
    *,
    group: dist.ProcessGroup | None = None,
    depth: Depth = "auto",
    reserve: int = 0,
    topology: Topology = "chain",
    limits: LinkLimits = NO_LIMITS,
    past: Cache | None = None,
) -> PrefillResult:
    """Read a prompt on all ranks of an initialised ``torch.distributed`` world.

    Every rank calls it with the same model weights, the same token ids and the same partition.

    Args:
        model: a Hugging Face causal LM, in eval mode, on this rank's device.
        input_ids: the whole prompt, ``[batch, context]``; prompts of a batch have equal length.
        partition: one chunk per rank of the group; or a table or predictor, which is asked for the prompt's
            length, the group's ranks and what ``past`` holds.
        group: the process group; the default group when None. A single-chunk partition needs none.
        depth: how far to reach into the model; ``"auto"`` takes attention depth where it is exact.
        reserve: tokens of room for decoding to allocate at once on the last rank.
        topology: ``"chain"``: each rank hands on everything to the next, as published; ``"fanout"``: each
            sends its own chunk to all later ones.
        limits: what links are held to, for experiments.
        past: on every rank, a cache that holds the partition's ``past`` tokens before this prompt (a
            prefix-cache hit): any transformers cache, which is copied, or a `RunaheadCache` with rows to
            spare, which is gone on with in place.

    Raises:
        OutOfRangeError: the table or predictor has no partition for this prompt.
        PartitionError: the partition does not fit the prompt or the group, or the model's positions.
        UnsupportedError: the model cannot be split exactly.
        RankError: the link to another rank broke.
    """
    held = 0 if past is None else past.get_seq_length()
    if not isinstance(partition, Partition):
        partition = chosen_partition(partition, input_ids.shape[-1], _world_size(group), held)
    rank = 0 if partition.ranks == 1 else dist.get_rank(group)
    world = 1 if partition.ranks == 1 else dist.get_world_size(group)
    if partition.ranks != world:
        raise PartitionError(f"the partition has {partition.ranks} chunks, but the group has {world} ranks")
    if input_ids.dim() != 2 or input_ids.shape[1] != partition.context:
        raise PartitionError(
            f"input_ids must be [batch, {partition.context}] for this partition; got {list(input_ids.shape)}"
        )
    if held != partition.past:
        raise PartitionError(f"the partition has {partition.past} past tokens, but the cache given holds {held}")
    check_context(model.config, partition.past + partition.context + reserve)
    start, end = partition.starts[rank], partition.ends[rank]
    chunk_ids = input_ids[:, start - held : end - held]
    room = reserve if rank == partition.ranks - 1 else 0
    cache = chunk_cache(model, chunk_ids, prefix=start, reserve=room, past=past)
    links = group_links(partition, rank, input_ids.device, topology=topology, limits=limits, group=group)
    try:
        return run_chunk(model, chunk_ids, cache, rank=rank, ranks=partition.ranks, links=links, depth=depth)
    except BaseException:
        links.abort()
        raise


def chosen_partition(
    knows: PartitionTable | PartitionPredictor, context: int, ranks: int, past: int = 0
) -> Partition:
    """What a table or predictor says about a prompt; the whole prompt where there is one rank.

    Raises:
        OutOfRangeError: it does not know.
    """
    if ranks == 1:
        return Partition((context,), past)
    if isinstance(knows, PartitionTable):
        return knows.lookup(context, ranks=ranks, past=past).partition
    return knows.predict(context, ranks=ranks, past=past).partition


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


@torch.no_grad()
def chunk_cache(
    model: Any,
    chunk_ids: torch.Tensor,
    *,
    prefix: int,
    reserve: int = 0,
    past: Cache | None = None,
    execution: Execution = AT_ONCE,
) -> RunaheadCache:
    """The cache that `run_chunk` needs for one chunk.

    Args:
        chunk_ids: the chunk's tokens, ``[batch, tokens]``.
        prefix: tokens before the chunk, those in ``past`` included.
        reserve: tokens of room for decoding.
        past: a cache of the first tokens, see `RunaheadCache.allocate`.
        execution: allocates the rows.
    """
    return RunaheadCache.allocate(
        probe(model).layers,
        batch=chunk_ids.shape[0],
        prefix=prefix,
        chunk=chunk_ids.shape[1],
        reserve=reserve,
        dtype=model.dtype,
        device=chunk_ids.device,
        empty=execution.empty,
        past=past,
    )


@torch.no_grad()
def run_chunk(
    model: Any,
    chunk_ids: torch.Tensor,
    cache: RunaheadCache,
    *,
    rank: int,
    ranks: int,
    links: Links,
    depth: Depth = "auto",
    execution: Execution = AT_ONCE,
) -> PrefillResult:
    """Run a model over one chunk behind a prefix that ``links`` deliver, or that is in the cache already.

    Args:
        chunk_ids: the chunk's tokens, ``[batch, tokens]``.
        cache: of `chunk_cache`, not used before.
        execution: at once, or to be recorded.
    """
    support = probe(model)
    chosen = support.choose(depth)
    clock = execution.clock(chunk_ids.device)
    run = _ChunkRun(cache, links, clock.stamp)
    clock.stamp()
    links.start([layer.slot for _, layer in cache.kv_layers])
    cache.prefilling = run.store_own if chosen == "attention" else run.store_and_wait
    route = support.route if chosen == "attention" else None
    with replaced_attention(model, route, run.attend) as extra:
        output = forward(model, chunk_ids, cache, **extra)
    cache.prefilling = None
    logits, token = first_token(output, execution.to_host) if rank == ranks - 1 else (None, None)
    clock.stamp()
    transfer_s = links.finish()
    return PrefillResult(
        rank=rank,
        ranks=ranks,
        first_token=token,
        logits=logits,
        cache=cache,
        kv_bytes=links.sent_bytes,
        _timeline=lambda: RankTimeline.of_stamps(clock.seconds(), transfer_s),
    )


class _ChunkRun:
    """What happens in each layer while a chunk runs. Stamps as in `RankTimeline.of_stamps`."""

    def __init__(self, cache: RunaheadCache, links: Links, stamp: Callable[[], int]) -> None:
        self._position = {index: position for position, (index, _) in enumerate(cache.kv_layers)}
        self._links = links
        self._stamp = stamp
        self._current: tuple[RunaheadLayer, int] | None = None

    def store_and_wait(
        self, layer: RunaheadLayer, index: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache depth: the model's attention gets everything the chunk can see, once it is there."""
        start, end = layer.append(keys, values)
        self._hand_over(index)
        self._wait(layer, index)
        return layer.store.keys(start, end), layer.store.values(start, end)

    def store_own(
        self, layer: RunaheadLayer, index: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention depth: the model's attention gets the chunk itself; `attend` fetches the prefix."""
        _, end = layer.append(keys, values)
        self._hand_over(index)
        self._current = (layer, index)
        own = end - keys.shape[-2]
        return layer.store.keys(own, end), layer.store.values(own, end)

    def attend(
        self,
        module: torch.nn.Module | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attention of the chunk, prefix last."""
        assert self._current is not None
        layer, index = self._current
        self._current = None

        def prefix() -> tuple[torch.Tensor, torch.Tensor] | None:
            self._wait(layer, index)
            if layer.kept_prefix == 0:
                return None
            return layer.store.keys(0, layer.kept_prefix), layer.store.values(0, layer.kept_prefix)

        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = attention.attend_chunk(query, key, value, prefix, scale=scale, window=layer.kv.window)
        return output.transpose(1, 2).contiguous()

    def _hand_over(self, index: int) -> None:
        self._stamp()
        self._links.own_ready(self._position[index])

    def _wait(self, layer: RunaheadLayer, index: int) -> None:
        self._stamp()
        if layer.kept_prefix:
            self._links.wait_prefix(self._position[index])
        self._stamp()


def warm_up(model: Any, tokens: int, depth: Depth = "auto") -> int:
    """Prepare this process for prompts of any length up to ``tokens``, so that a new length pays nothing extra.

    Serving code calls it once, after loading the model, on the thread that will run prefills: kernels load,
    and on CUDA the plans are built from which `prefill` puts unseen shapes together, and the memory that a
    prefill takes is set aside.

    Returns:
        How many plans were built; 0 where kernels need none.
    """
    device = next(model.parameters()).device
    # A chunk behind a prefix shows which kinds of calls the model makes.
    chunk = max(1, min(512, tokens // 2))
    ids = torch.zeros((1, chunk), dtype=torch.long, device=device)
    cache = chunk_cache(model, ids, prefix=chunk)
    for _, layer in cache.kv_layers:
        layer.store.rows.zero_()
    run_chunk(model, ids, cache, rank=0, ranks=1, links=NoLinks(), depth=depth)
    if device.type != "cuda":
        return 0
    built = CudnnPlans.here().build_ahead(tokens)
    # One token less is a length without a plan, so everything that such a length needs runs once. Where the
    # longest prompt fits only when it is split, there is nothing to set aside.
    ids = torch.zeros((1, max(1, tokens - 1)), dtype=torch.long, device=device)
    with contextlib.suppress(torch.OutOfMemoryError):
        cache = chunk_cache(model, ids, prefix=0)
        run_chunk(model, ids, cache, rank=0, ranks=1, links=NoLinks(), depth=depth)
    torch.cuda.synchronize(device)
    return built


def decode(
    model: Any, input_ids: torch.Tensor, result: PrefillResult, max_new_tokens: int, **generate: Any
) -> torch.Tensor:
    """Go on from the first token, on the last rank, with the model's own ``generate``.

    Args:
        input_ids: the prompt, ``[batch, context]``.
        max_new_tokens: how many tokens in all, the first one included.
        generate: passed on; greedy unless it says otherwise.

    Returns:
        The new tokens, ``[batch, up to max_new_tokens]``.

    Raises:
        PartitionError: called on another rank than the last, or more tokens than the model has positions.
    """
    if result.first_token is None:
        raise PartitionError(f"rank {result.rank} has no first token; decode on the last rank")
    check_context(model.config, input_ids.shape[1] + max_new_tokens)
    first = result.first_token.to(input_ids.device)
    if max_new_tokens <= 1:
        return first
    tokens = torch.cat([input_ids, first], dim=1)
    options = {"do_sample": False, **generate}
    whole: torch.Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=result.cache,
        max_new_tokens=max_new_tokens - 1,
        **options,
    )
    return whole[:, input_ids.shape[1] :]
