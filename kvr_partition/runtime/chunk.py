"""One chunk of a prompt through a model: rows for its KV, links to other ranks, attention to what came before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from kvr_partition.errors import NotFiniteError
from kvr_partition.partition import Partition
from kvr_partition.runtime import attention
from kvr_partition.runtime.agreement import Turn
from kvr_partition.runtime.cache import RunaheadCache, RunaheadLayer
from kvr_partition.runtime.decoding import top_is_finite
from kvr_partition.runtime.execution import EAGER, Execution
from kvr_partition.runtime.fused import FusedModel, Layers, running
from kvr_partition.runtime.links.plan import Links
from kvr_partition.runtime.padding import Padding
from kvr_partition.runtime.replacing import replaced_attention
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.support import Depth, first_token, forward, probe
from kvr_partition.timeline import RankTimeline


@torch.no_grad()
def chunk_cache(
    model: Any,
    chunk_ids: torch.Tensor,
    *,
    prefix: int,
    reserve: int = 0,
    past: Cache | None = None,
    execution: Execution = EAGER,
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
        execution=execution,
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
    layers: Layers | FusedModel = "auto",
    execution: Execution = EAGER,
    partition: Partition | None = None,
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
    padding: Padding | None = None,
    turn: Turn | None = None,
) -> PrefillResult:
    """Run a model over one chunk behind a prefix that ``links`` deliver, or that is in the cache already.

    Args:
        chunk_ids: the chunk's tokens, ``[batch, tokens]``.
        cache: of `chunk_cache`, not used before.
        layers: as in `prefill`, or what `chosen_layers` found.
        execution: at once, or to be recorded.
        partition: the split it is part of; the chunk alone when None.
        choose: takes the first token from logits; the largest one when None.
        padding: of padded prompts.
        turn: of the group; its ``phase`` follows what is under way, for messages about failures.

    Raises:
        NotFiniteError: the logits are NaN or infinite.
    """
    support = probe(model)
    chosen = support.choose("cache" if padding is not None else depth)
    turn = Turn(None) if turn is None else turn
    start = cache.get_seq_length()
    clock = execution.clock(chunk_ids.device)
    run = _ChunkRun(cache, links, clock.stamp, turn)
    clock.stamp()
    links.start([layer.slot for _, layer in cache.kv_layers])
    cache.prefilling = run.store_own if chosen == "attention" else run.store_and_wait
    route = support.route if chosen == "attention" else None
    # What is recorded here is recorded whole; recordings of layers are for runs that are carried out at once.
    eager = execution.eager and chunk_ids.shape[0] == 1
    tokens = chunk_ids.shape[1] if eager else None
    own = run.add_prefix_ if chosen == "attention" else None
    with running(model, layers, tokens, own), replaced_attention(model, route, run.attend) as extra:
        if padding is not None:
            extra.update(padding.of_chunk(start, start + chunk_ids.shape[1]))
        output = forward(model, chunk_ids, cache, **extra)
    cache.prefilling = None
    logits, token, top = None, None, None
    if rank == ranks - 1:
        turn.now("the first token")
        settled = partial(turn.settle, chunk_ids.device, rank - 1)
        logits, token, top = first_token(output, choose, execution.to_host, settled)
    clock.stamp()
    transfer_s = links.finish()
    split = Partition((chunk_ids.shape[1],), start) if partition is None else partition
    if top is not None and execution.to_host and not top_is_finite(top):
        raise not_finite(cache, split)
    return PrefillResult(
        rank=rank,
        ranks=ranks,
        first_token=token,
        logits=logits,
        cache=cache,
        kv_bytes=links.sent_bytes,
        _timeline=lambda: RankTimeline.of_stamps(clock.seconds(), transfer_s),
        context=split.context,
        past=split.past,
        attention_mask=None if padding is None else padding.mask,
    )


def not_finite(cache: Any, partition: Partition) -> NotFiniteError:
    """The error of logits that are not finite: it names the first layer whose keys or values are not."""
    advice = "use another dtype, or look at the weights"
    for index, layer in enumerate(cache.layers):
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if not isinstance(states, torch.Tensor) or not states.numel():
                continue
            wrong = ~torch.isfinite(states).all(dim=-1).all(dim=1).all(dim=0)
            if bool(wrong.any()):
                # Windows keep the last tokens only.
                last = partition.past + partition.context
                position = last - wrong.shape[0] + int(wrong.nonzero()[0])
                rank = next(
                    (rank for rank, end in enumerate(partition.ends) if position < end), partition.ranks - 1
                )
                return NotFiniteError(
                    f"the logits of this prompt are not finite: keys or values of layer {index} are not, from "
                    f"token {position} on, which rank {rank} computed; {advice}",
                    rank=rank,
                    layer=index,
                )
    return NotFiniteError(
        "the logits of this prompt are not finite, and all keys and values are: they overflow behind those of the "
        f"last layer, on rank {partition.ranks - 1}; {advice}",
        rank=partition.ranks - 1,
    )


class _ChunkRun:
    """What happens in each layer while a chunk runs. Stamps as in `RankTimeline.of_stamps`."""

    def __init__(self, cache: RunaheadCache, links: Links, stamp: Callable[[], int], turn: Turn) -> None:
        self._position = {index: position for position, (index, _) in enumerate(cache.kv_layers)}
        self._links = links
        self._stamp = stamp
        self._turn = turn
        self._current: tuple[RunaheadLayer, int] | None = None

    def store_and_wait(
        self, layer: RunaheadLayer, index: int, keys: torch.Tensor | None, values: torch.Tensor | None
    ) -> tuple[int, int]:
        """Cache depth: the model's attention gets everything the chunk can see, once it is there."""
        start, end = layer.append(keys, values)
        self._hand_over(index)
        self._wait(layer, index)
        return start, end

    def store_own(
        self, layer: RunaheadLayer, index: int, keys: torch.Tensor | None, values: torch.Tensor | None
    ) -> tuple[int, int]:
        """Attention depth: the model's attention gets the chunk itself; `attend` fetches the prefix."""
        before = layer.get_seq_length()
        _, end = layer.append(keys, values)
        own = end - (layer.get_seq_length() - before)
        self._hand_over(index)
        self._current = (layer, index)
        return own, end

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
        window = self._current[0].kv.window
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = attention.attend_chunk(query, key, value, self._prefix, scale=scale, window=window)
        return output.transpose(1, 2).contiguous()

    def add_prefix_(self, output: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, scale: float) -> None:
        """The same, where the chunk's attention to itself has been computed."""
        assert self._current is not None
        window = self._current[0].kv.window
        attention.add_prefix_(output, lse, query, self._prefix(), scale=scale, window=window)

    def _prefix(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        assert self._current is not None
        layer, index = self._current
        self._current = None
        self._wait(layer, index)
        if layer.kept_prefix == 0:
            return None
        return layer.store.keys(0, layer.kept_prefix), layer.store.values(0, layer.kept_prefix)

    def _hand_over(self, index: int) -> None:
        self._turn.now(f"layer {index}")
        self._stamp()
        self._links.kv_ready(self._position[index])

    def _wait(self, layer: RunaheadLayer, index: int) -> None:
        self._stamp()
        if layer.kept_prefix:
            self._links.wait_prefix(self._position[index])
        self._stamp()
