"""How each method is run on a rank that is a process of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from kvr_partition.methods import check_complete, method_of
from kvr_partition.runtime import prefill, single, stock, tsp, zigzag
from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.fused import chosen_layers
from kvr_partition.runtime.links.plan import AnyTopology, NoLinks
from kvr_partition.runtime.result import PrefillResult
from profiler import messages
from profiler.rank import Rank, random_prefix

Run = Callable[[], PrefillResult | None]
"""One prefill, ready to run; None on ranks that have no part in it."""

Ask = messages.Prefill | messages.Verify


def runner(rank: Rank, request: Ask) -> Run:
    """This rank's part of a method, ready to run: what it needs that is no prefill is made here.

    Raises:
        UnsupportedError: there is no such method.
    """
    return RUNNERS[method_of(request.method).name](rank, request)


def _prompt(rank: Rank, request: Ask) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens before the prompt, and the prompt."""
    partition = request.partition
    ids = rank.tokens(partition.past + partition.context, request.token_seed)
    return ids[:, : partition.past], ids[:, partition.past :]


def _kvr(rank: Rank, request: Ask) -> Run:
    before, ids = _prompt(rank, request)
    partition = request.partition
    topology: AnyTopology = method_of(request.method).topology or rank.setup.topology  # type: ignore[assignment]
    past, limits = rank.past_rows(before, ids, partition.ends[rank.setup.rank]), rank.limits(request)
    return lambda: prefill(
        rank.model,
        ids,
        partition,
        group=rank.group,
        depth=rank.depth,
        layers=rank.layers,
        topology=topology,
        limits=limits,
        past=past,
    )


def _bound(rank: Rank, request: Ask) -> Run:
    _, ids = _prompt(rank, request)
    partition, setup = request.partition, rank.setup
    start, end = partition.starts[setup.rank], partition.ends[setup.rank]
    chunk = ids[:, start - partition.past : end - partition.past]
    # Its prefix is there before the clock starts.
    cache = random_prefix(chunk_cache(rank.model, chunk, prefix=start))
    return lambda: run_chunk(
        rank.model,
        chunk,
        cache,
        rank=setup.rank,
        ranks=setup.ranks,
        links=NoLinks(),
        depth=rank.depth,
        layers=rank.layers,
    )


def _tsp(rank: Rank, request: Ask) -> Run:
    ids, limits = _prompt(rank, request)[1], rank.limits(request)
    causal = not method_of(request.method).attends_densely(rank.depth)
    return lambda: tsp(rank.model, ids, layers=rank.layers, limits=limits, causal=causal)


def _zigzag(rank: Rank, request: Ask) -> Run:
    ids, limits = _prompt(rank, request)[1], rank.limits(request)
    return lambda: zigzag(rank.model, ids, layers=rank.layers, limits=limits)


def _tensor_parallel(rank: Rank, request: Ask) -> Run:
    """With the layers that everyone has: what is known of a model holds for its parts."""
    _, ids = _prompt(rank, request)
    model = rank.tensor_parallel()

    def run() -> PrefillResult:
        fused = chosen_layers(rank.model, rank.layers).of_parts(rank.model, model)
        with fused.replaced():
            return stock(model, ids, rank=rank.setup.rank, ranks=rank.setup.ranks)

    return run


def _stock(rank: Rank, request: Ask) -> Run:
    before, ids = _prompt(rank, request)
    kept = copy.deepcopy(rank.past_cache(before)) if before.shape[1] else None
    return lambda: stock(rank.model, ids, rank=rank.setup.rank, ranks=rank.setup.ranks, past=kept)


def _single(rank: Rank, request: Ask) -> Run:
    before, ids = _prompt(rank, request)
    past = rank.past_rows(before, ids, before.shape[1] + ids.shape[1])
    return lambda: single(
        rank.model,
        ids,
        rank=rank.setup.rank,
        ranks=rank.setup.ranks,
        depth=rank.depth,
        layers=rank.layers,
        past=past,
    )


def _on_the_last(run: Callable[[Rank, Ask], Run]) -> Callable[[Rank, Ask], Run]:
    """A method of one rank, which is the last."""
    return lambda rank, request: run(rank, request) if rank.is_last else lambda: None


RUNNERS: dict[str, Callable[[Rank, Ask], Run]] = {
    "stock": _on_the_last(_stock),
    "single": _on_the_last(_single),
    "tsp": _tsp,
    "tsp-causal": _tsp,
    "zigzag": _zigzag,
    "tp": _tensor_parallel,
    "kvr": _kvr,
    "kvr-chain": _kvr,
    "kvr-fanout": _kvr,
    "bound": _bound,
}
check_complete(__name__, RUNNERS)
