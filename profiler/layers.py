"""The first layers of a chunk by themselves: enough to compare chunk sizes, in a fraction of the time."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch

from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.chunk import run_chunk
from kvr_partition.runtime.execution import EAGER, Execution
from kvr_partition.runtime.fused import Layers
from kvr_partition.runtime.links.plan import NoLinks
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.support import Depth
from kvr_partition.timeline import RankTimeline


class _EnoughError(Exception):
    """The layers that were wanted are done."""


class _FirstLayers(NoLinks):
    """Breaks a run off where the KV of a layer is handed over: the one place that any model passes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self._wanted = layers

    def kv_ready(self, layer: int) -> None:
        if layer == self._wanted:
            raise _EnoughError


def run_layers(
    model: Any,
    chunk_ids: torch.Tensor,
    cache: RunaheadCache,
    layers: int,
    *,
    depth: Depth = "auto",
    model_layers: Layers = "auto",
    execution: Execution = EAGER,
) -> PrefillResult:
    """Run no more than the first layers of a model over one chunk, whose prefix is in the cache already.

    Args:
        chunk_ids: the chunk's tokens, ``[batch, tokens]``.
        cache: of `chunk_cache`, not used before.
        layers: how many, less than keep KV.
        model_layers: whose they are, as ``layers`` of `kvr_partition.runtime.prefill`.
        execution: at once, or to be recorded.

    Returns:
        A result without a first token; its timeline ends when the KV of the layer after those is ready.
    """
    clock = execution.clock(chunk_ids.device)
    same_clock = dataclasses.replace(execution, clock=lambda _: clock)
    with contextlib.suppress(_EnoughError):
        run_chunk(
            model,
            chunk_ids,
            cache,
            rank=0,
            ranks=2,
            links=_FirstLayers(layers),
            depth=depth,
            layers=model_layers,
            execution=same_clock,
        )
    cache.prefilling = None
    return PrefillResult(
        rank=0,
        ranks=2,
        first_token=None,
        logits=None,
        cache=cache,
        kv_bytes=0,
        _timeline=lambda: RankTimeline.of_stamps(clock.seconds(), [0.0] * layers),
    )
