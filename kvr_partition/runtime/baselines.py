"""What KV-Runahead is compared with: the whole prompt on one rank, and TSP as the paper describes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers.cache_utils import DynamicCache

from kvr_partition.errors import PartitionError
from kvr_partition.partition import Partition
from kvr_partition.runtime.cache import LayerKV, RunaheadCache, RunaheadLayer
from kvr_partition.runtime.clock import clock_for
from kvr_partition.runtime.prefill import PrefillResult
from kvr_partition.runtime.support import check_context, first_token, forward, probe, text_config
from kvr_partition.timeline import LayerTimes, RankTimeline


@torch.no_grad()
def single(model: Any, input_ids: torch.Tensor, *, rank: int = 0, ranks: int = 1) -> PrefillResult:
    """The whole prompt on this rank, through the model's stock attention and cache.

    Args:
        input_ids: the prompt, ``[batch, context]``.
        rank, ranks: what the result says of itself; the last rank keeps the logits.
    """
    check_context(model.config, input_ids.shape[1])
    clock = clock_for(input_ids.device)
    clock.stamp()
    cache = DynamicCache(config=model.config)
    logits, token = first_token(forward(model, input_ids, cache))
    clock.stamp()
    return PrefillResult(
        rank=rank,
        ranks=ranks,
        first_token=token,
        logits=logits,
        cache=cache,
        kv_bytes=0,
        _timeline=lambda: RankTimeline((), clock.seconds()[-1]),
    )


@torch.no_grad()
def tsp(model: Any, input_ids: torch.Tensor, *, group: dist.ProcessGroup | None = None) -> PrefillResult:
    """Tensor-and-sequence-parallel prefill, the paper's baseline, on all ranks of a group.

    Even chunks; in every layer each rank gathers the keys and values of all ranks, then attends its
    chunk to the whole context under a dense causal mask, through the model's stock attention.

    Args:
        input_ids: the whole prompt on every rank, ``[batch, context]``.

    Raises:
        PartitionError: a context shorter than the group has ranks, or beyond the model's positions.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if input_ids.dim() != 2:
        raise PartitionError(f"input_ids must be [batch, context]; got {list(input_ids.shape)}")
    check_context(model.config, input_ids.shape[1])
    partition = Partition.even(input_ids.shape[1], ranks)
    clock = clock_for(input_ids.device)
    clock.stamp()
    cache = _GatherCache(model, input_ids, partition, rank, group, clock.stamp)
    chunk_ids = input_ids[:, partition.starts[rank] : partition.ends[rank]]
    # Models with ALiBi take the number of keys from the attention mask, or else assume that none come later.
    extra = {"attention_mask": torch.ones_like(input_ids)} if _has_alibi(model) else {}
    output = forward(model, chunk_ids, cache, **extra)
    cache.prefilling = None
    logits, token = first_token(output) if rank == ranks - 1 else (None, None)
    clock.stamp()
    layers = len(cache.kv_layers)
    return PrefillResult(
        rank=rank,
        ranks=ranks,
        first_token=token,
        logits=logits,
        cache=cache,
        kv_bytes=cache.sent_bytes,
        _timeline=lambda: _timeline(clock.seconds(), layers),
    )


def _has_alibi(model: Any) -> bool:
    config = text_config(model)
    return bool(getattr(config, "alibi", False)) or config.model_type == "bloom"


class _GatherLayer(RunaheadLayer):
    """A layer with room for the whole context, which the model sees from its chunk's position on."""

    def __init__(
        self, kv: LayerKV, partition: Partition, rank: int, input_ids: torch.Tensor, dtype: torch.dtype
    ) -> None:
        context = partition.context
        super().__init__(
            kv,
            batch=input_ids.shape[0],
            prefix=0,
            chunk=context,
            reserve=0,
            dtype=dtype,
            device=input_ids.device,
        )
        self.start = partition.starts[rank]
        self.context = context
        self.gathered = False

    def complete(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' rows are in place: an ordinary layer from here on. Returns keys and values of all."""
        self._length = self._filled = self.context
        self.gathered = True
        return self.store.keys(0, self.context), self.store.values(0, self.context)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Dense: the chunk is masked against the whole context, later tokens included.
        return super().get_mask_sizes(query_length) if self.gathered else (self.context, 0)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.gathered else self.start


class _GatherCache(RunaheadCache):
    """Gathers every layer's KV from all ranks, in place."""

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        partition: Partition,
        rank: int,
        group: dist.ProcessGroup | None,
        stamp: Callable[[], int],
    ) -> None:
        super().__init__(
            [
                None if kv is None else _GatherLayer(kv, partition, rank, input_ids, model.dtype)
                for kv in probe(model).layers
            ]
        )
        self.sent_bytes = 0
        self._partition = partition
        self._rank = rank
        self._group = group
        self._stamp = stamp
        self.prefilling = self._gather

    def _gather(
        self, layer: _GatherLayer, index: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, sizes, starts = layer.store.rows, self._partition.sizes, self._partition.starts
        layer.store.write(layer.start, keys, values)
        own = rows[starts[self._rank] : starts[self._rank] + sizes[self._rank]]
        self.sent_bytes += own.nbytes * (self._partition.ranks - 1)
        self._stamp()
        if len(set(sizes)) == 1:
            dist.all_gather_into_tensor(rows, own, group=self._group)
        else:
            # A collective wants equal parts. One broadcast from each rank moves the same bytes without
            # padding them to the longest chunk.
            for source, (start, size) in enumerate(zip(starts, sizes, strict=True)):
                dist.broadcast(rows[start : start + size], group=self._group, group_src=source)
        self._stamp()
        return layer.complete()


def _timeline(seconds: list[float], layers: int) -> RankTimeline:
    times = []
    last = seconds[0]
    for position in range(layers):
        begins, ends = seconds[1 + 2 * position], seconds[2 + 2 * position]
        # Everyone gathers at once and nobody computes meanwhile: waiting and transfer are one.
        times.append(LayerTimes(begins - last, ends - begins, ends - begins))
        last = ends
    return RankTimeline(tuple(times), seconds[-1] - last)
