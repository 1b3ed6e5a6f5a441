"""Making ready for prompts to come: plans, kernels and recordings, before the first of them."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import torch

from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.fused import FusedModel, Layers, chosen_layers
from kvr_partition.runtime.kernels import CudnnPlans
from kvr_partition.runtime.links.plan import NoLinks
from kvr_partition.runtime.support import Depth


@dataclass(frozen=True)
class WarmUp:
    """What `warm_up` made.

    Attributes:
        plans: cuDNN's plans; 0 where kernels need none.
        graphs: recorded layers of short chunks; 0 where nothing is recorded.
        seconds: how long all of it took.
        graph_bytes: device memory that recordings hold.
    """

    plans: int
    graphs: int
    seconds: float
    graph_bytes: int


def warm_up(model: Any, tokens: int, depth: Depth = "auto", layers: Layers = "auto") -> WarmUp:
    """Prepare this process for prompts of any length up to ``tokens``, so that a new length pays nothing extra.

    Serving code calls it once, after loading the model, on the thread that will run prefills: kernels load,
    and on CUDA the plans are built from which `prefill` puts unseen shapes together, the launches of short chunks
    are recorded, and the memory that a prefill takes is set aside.
    """
    began = time.perf_counter()
    device = next(model.parameters()).device
    # A chunk behind a prefix shows which kinds of calls the model makes.
    chunk = max(1, min(512, tokens // 2))
    _run_blank(model, chunk, chunk, depth, layers)
    if device.type != "cuda":
        return WarmUp(0, 0, time.perf_counter() - began, 0)
    built = CudnnPlans.here().build_ahead(tokens)
    fused = chosen_layers(model, layers)
    graphs = fused.record(tokens)
    # One token less is a length without a plan, so everything that such a length needs runs once: kernels for what
    # is left over, and memory for a whole prompt and for all parts of a prefix. Where the longest prompt fits only
    # when it is split, there is nothing to set aside.
    for chunk in dict.fromkeys((max(1, tokens - 1), max(1, tokens // 3))):
        with contextlib.suppress(torch.OutOfMemoryError):
            _run_blank(model, chunk, max(0, tokens - 1 - chunk), depth, fused)
    torch.cuda.synchronize(device)
    held = 0 if fused.recorded is None else fused.recorded.nbytes
    return WarmUp(built, graphs, time.perf_counter() - began, held)


def _run_blank(model: Any, tokens: int, prefix: int, depth: Depth, layers: Layers | FusedModel) -> None:
    """Run a chunk behind a prefix, both without meaning."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device=next(model.parameters()).device)
    cache = chunk_cache(model, ids, prefix=prefix)
    for _, layer in cache.kv_layers:
        layer.store.rows.zero_()
    run_chunk(model, ids, cache, rank=0, ranks=1, links=NoLinks(), depth=depth, layers=layers)
