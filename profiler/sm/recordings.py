"""Recordings of what the ranks of one GPU do, made once each and kept; their rows share one memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from kvr_partition.methods import METHODS, method_of
from kvr_partition.partition import Partition
from kvr_partition.runtime import probe
from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.execution import Execution
from kvr_partition.runtime.gathering import gathered
from kvr_partition.runtime.kernels import planning
from kvr_partition.runtime.links.plan import NoLinks, Topology
from kvr_partition.runtime.result import PrefillResult
from profiler import messages
from profiler.experiments.sm_products import GroupProducts, chosen_products
from profiler.layers import run_layers
from profiler.rank import Rank
from profiler.sm.recording import (
    GATHERED_LAYERS,
    Arena,
    RecordedClock,
    RecordedGather,
    RecordedLinks,
    RecordedRank,
    Recorder,
    Recording,
    aligned,
)

_KEPT = 32
"""Recordings kept at once; graphs take little memory, and the rows are shared."""


@dataclass(frozen=True)
class Work:
    """What all ranks do at once.

    Attributes:
        method: a key of `METHODS`.
        partition: what each of them computes.
        timed: a chunk that each rank runs by itself, behind a prefix, without links; None for a prefill.
    """

    method: str
    partition: Partition
    timed: messages.TimeChunk | None = None

    @classmethod
    def of_chunk(cls, request: messages.TimeChunk, ranks: int) -> Work:
        """A chunk by itself, on all ranks."""
        same = msgspec.structs.replace(request, alone=False)
        return cls("kvr", Partition((request.chunk,) * ranks), same)

    @property
    def gathers(self) -> bool:
        """Whether ranks gather the KV of all."""
        return method_of(self.method).gathers


class Recordings:
    """What was recorded of a model, on one stream for each rank.

    Args:
        rank: the model.
        streams: of the ranks.
        products: matrix products chosen for a rank's SMs; None for torch's own.
    """

    def __init__(self, rank: Rank, streams: list[torch.cuda.Stream], products: GroupProducts | None) -> None:
        self._rank, self._streams, self._products = rank, streams, products
        self._pool = torch.cuda.graph_pool_handle()
        # A pool ends with the last graph in it, and would then be refused; this one keeps it.
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.stream(streams[0]):
            self._keeper.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            self._kept = torch.zeros(1, device=rank.device)
            self._keeper.capture_end()
        self._arena = Arena(torch.empty(0, dtype=torch.uint8, device=rank.device))
        self._made: dict[Work, Recording] = {}

    def of(self, work: Work) -> Recording:
        """The recording of some work, made now where there is none.

        Raises:
            torch.OutOfMemoryError: there is no room for its rows.
        """
        known = self._made.pop(work, None)
        if known is None:
            self._reserve(work)
            while len(self._made) >= _KEPT:
                self._made.pop(next(iter(self._made)))
            known = self._record(work)
        self._made[work] = known
        return known

    def forget_rows(self) -> None:
        """Make rows unreadable: what an earlier replay left there would hide a transfer that is missing."""
        self._arena.buffer.fill_(255)

    def fill_rows(self) -> None:
        """Random numbers in rows that nothing fills: zeros or NaN would take another time to multiply."""
        buffer, dtype = self._arena.buffer, self._rank.model.dtype
        buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype).normal_()

    def fill_past(self, recording: Recording, token_seed: int) -> None:
        """Put the KV of the tokens before the prompt where every rank has it; other recordings used the place."""
        partition = recording.partition
        if not partition.past:
            return
        before = self._rank.tokens(partition.past + partition.context, token_seed)[:, : partition.past]
        past = self._rank.past_cache(before)
        for recorded in recording.ranks:
            for index, layer in recorded.result.cache.kv_layers:
                kept, start = layer.kept_prefix, partition.starts[recorded.result.rank % partition.ranks]
                seen = partition.past - (start - kept)
                if seen > 0:
                    known = past.layers[index]
                    layer.store.write(0, known.keys[:, :, -seen:], known.values[:, :, -seen:])

    # ------------------------------------------------------------------------------------------------- room

    def _reserve(self, work: Work) -> None:
        """Make room for the rows of a recording; growing drops all recordings, whose rows lie there."""
        entry, partition = self._entry_bytes(), work.partition
        if work.gathers:
            need = partition.ranks * GATHERED_LAYERS * self._place(partition.context)
        elif work.timed is not None:
            need = sum(
                partition.ranks * aligned((work.timed.prefix + work.timed.chunk) * width) for width in entry
            )
        else:
            need = sum(aligned(end * width) for width in entry for end in partition.ends)
        if need > self._arena.buffer.numel():
            self._made.clear()
            gc.collect()
            self._arena.buffer = torch.empty(0, dtype=torch.uint8, device=self._rank.device)
            torch.cuda.empty_cache()
            self._arena.buffer = torch.empty(need, dtype=torch.uint8, device=self._rank.device)
            self.fill_rows()

    def _entry_bytes(self) -> list[int]:
        """Bytes of KV that one token keeps, of each layer that keeps any."""
        model = self._rank.model
        layers = [layer for layer in probe(model).layers if layer is not None]
        return [layer.entry(self._rank.setup.batch) * model.dtype.itemsize for layer in layers]

    def _place(self, context: int) -> int:
        """Bytes of the largest layer's rows of a whole context."""
        return aligned(context * max(self._entry_bytes()))

    # --------------------------------------------------------------------------------------------- recording

    def _record(self, work: Work) -> Recording:
        ids = self._rank.tokens(work.partition.context, seed=1)
        with self._rank.attention(METHODS[work.method]), planning(), torch.no_grad():
            self._rehearse(work, ids)
            self._arena.begin()
            ranks = [self._record_rank(rank, work, ids) for rank in range(work.partition.ranks)]
        topology: Topology = METHODS[work.method].topology or "chain"
        host_token = torch.empty((self._rank.setup.batch, 1), dtype=torch.long, pin_memory=True)
        return Recording(work.method, work.partition, ranks, topology, ids, host_token)

    def _rehearse(self, work: Work, ids: torch.Tensor) -> None:
        """Run all ranks once for real, at once and each by itself, with whatever prefix is in the rows.

        Kernels load, plans and workspaces are made, none of which a graph can hold.
        """
        self._arena.begin()
        for rank in range(work.partition.ranks):
            with torch.cuda.stream(self._streams[rank]), self._chosen_products(choosing=True):
                execution = Execution(to_host=False, empty=self._arena.empty, eager=False)
                self._run_rank(rank, work, ids, None, execution)
        torch.cuda.synchronize()

    def _record_rank(self, rank: int, work: Work, ids: torch.Tensor) -> RecordedRank:
        stream = self._streams[rank]
        with torch.cuda.stream(stream), self._chosen_products(choosing=False):
            recorder = Recorder(stream, self._pool)
            clock = RecordedClock(recorder)
            execution = Execution(clock=lambda _: clock, to_host=False, empty=self._arena.empty, eager=False)
            recorder.begin()
            try:
                result, links, gather = self._run_rank(rank, work, ids, recorder, execution)
            except BaseException:
                recorder.abandon()
                raise
            recorder.end()
        return RecordedRank(recorder.steps, result, clock, links, gather)

    def _run_rank(
        self, rank: int, work: Work, ids: torch.Tensor, recorder: Recorder | None, execution: Execution
    ) -> tuple[PrefillResult, RecordedLinks | None, RecordedGather | None]:
        run: Callable[..., Any] = self._gathering if work.gathers else self._chunk
        found: tuple[PrefillResult, RecordedLinks | None, RecordedGather | None]
        found = run(rank, work, ids, recorder, execution)
        return found

    def _gathering(
        self, rank: int, work: Work, ids: torch.Tensor, recorder: Recorder | None, execution: Execution
    ) -> tuple[PrefillResult, None, RecordedGather]:
        self._arena.begin_gathering(self._place(work.partition.context))
        gather = RecordedGather(recorder, rank, work.partition.ranks)
        method: Any = work.method
        result = gathered(self._rank.model, ids, method, gather, self._rank.layers, execution)
        return result, None, gather

    def _chunk(
        self, rank: int, work: Work, ids: torch.Tensor, recorder: Recorder | None, execution: Execution
    ) -> tuple[PrefillResult, RecordedLinks | None, None]:
        of, partition, timed = self._rank, work.partition, work.timed
        start, end = partition.starts[rank], partition.ends[rank]
        chunk = ids[:, start - partition.past : end - partition.past]
        prefix = start if timed is None else timed.prefix
        cache = chunk_cache(of.model, chunk, prefix=prefix, execution=execution)
        if timed is not None and timed.layers is not None:
            result = run_layers(
                of.model,
                chunk,
                cache,
                timed.layers,
                depth=of.depth,
                model_layers=of.layers,
                execution=execution,
            )
            return result, None, None
        moves = recorder is not None and timed is None and method_of(work.method).limited
        links = RecordedLinks(recorder) if moves and recorder is not None else None
        result = run_chunk(
            of.model,
            chunk,
            cache,
            rank=rank,
            # A timed chunk ends with logits on every rank, as the last chunk of a prefill does.
            ranks=partition.ranks if timed is None else rank + 1,
            links=NoLinks() if links is None else links,
            depth=of.depth,
            layers=of.layers,
            execution=execution,
        )
        return result, links, None

    def _chosen_products(self, choosing: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._products is None else chosen_products(self._products, choosing)
