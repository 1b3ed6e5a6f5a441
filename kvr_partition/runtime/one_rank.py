"""One rank alone: this runtime with one chunk, and transformers as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from kvr_partition.partition import Partition
from kvr_partition.runtime.chunk import not_finite
from kvr_partition.runtime.decoding import Greedy, top_is_finite
from kvr_partition.runtime.execution import EAGER, Execution
from kvr_partition.runtime.fused import Layers
from kvr_partition.runtime.padding import read_padding
from kvr_partition.runtime.positions import check_context
from kvr_partition.runtime.prefill import check_ids, prefill, read_prompt
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.support import Depth, first_token, forward
from kvr_partition.timeline import RankTimeline


def single(
    model: Any,
    input_ids: torch.Tensor,
    *,
    rank: int = 0,
    ranks: int = 1,
    depth: Depth = "auto",
    layers: Layers = "auto",
    past: Cache | None = None,
    attention_mask: torch.Tensor | None = None,
) -> PrefillResult:
    """The whole prompt on this rank alone: what KV-Runahead runs on each rank, with one chunk.

    Args:
        input_ids: the prompt, ``[batch, context]``.
        rank, ranks: what the result says of itself; the last rank keeps the logits.
        depth, layers, past, attention_mask: as in `prefill`.

    Raises:
        PartitionError, UnsupportedError, NotFiniteError: as `prefill`.
    """
    check_ids(model, input_ids)
    before = 0 if past is None else int(past.get_seq_length())
    whole = Partition((input_ids.shape[1],), before)
    found = prefill(model, input_ids, whole, depth=depth, layers=layers, past=past, attention_mask=attention_mask)
    return replace(found, rank=rank, ranks=ranks)


@torch.no_grad()
def stock(
    model: Any,
    input_ids: torch.Tensor,
    *,
    rank: int = 0,
    ranks: int = 1,
    past: Cache | None = None,
    attention_mask: torch.Tensor | None = None,
    execution: Execution = EAGER,
) -> PrefillResult:
    """The whole prompt on this rank as transformers reads it: its layers, its attention, its cache.

    Args:
        input_ids: the prompt, ``[batch, context]``.
        rank, ranks: what the result says of itself; the last rank keeps the logits.
        past: a cache of the tokens before the prompt, which is gone on with.
        attention_mask: as in `prefill`.
        execution: at once, or to be recorded.

    Raises:
        PartitionError, UnsupportedError, NotFiniteError: as `prefill`.
    """
    check_ids(model, input_ids)
    before = 0 if past is None else int(past.get_seq_length())
    context = input_ids.shape[1]
    check_context(model.config, before + context)
    padding = read_padding(model, attention_mask, input_ids.shape[0], before, context, "auto")
    mask = None if padding is None else padding.mask
    read_prompt(model, input_ids)
    greedy = Greedy.under(model.generation_config, input_ids, past=before, attention_mask=mask)
    clock = execution.clock(input_ids.device)
    clock.stamp()
    cache = DynamicCache(config=model.config) if past is None else past
    extra = {} if padding is None else padding.of_chunk(before, before + context)
    output = forward(model, input_ids, cache, **extra)
    logits, token, top = first_token(output, greedy.choose, execution.to_host)
    clock.stamp()
    if execution.to_host and not top_is_finite(top):
        raise not_finite(cache, Partition((context,), before))
    return PrefillResult(
        rank=rank,
        ranks=ranks,
        first_token=token,
        logits=logits,
        cache=cache,
        kv_bytes=0,
        _timeline=lambda: RankTimeline((), clock.seconds()[-1]),
        context=context,
        past=before,
        attention_mask=mask,
    )
