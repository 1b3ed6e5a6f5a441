"""SM-partition ranks: one GPU as many ranks, each on SMs of its own, recorded once and replayed.

All ranks live in one process and share the weights. What a rank computes is recorded as CUDA graphs, cut
wherever it meets a link, so that a prefill costs two launches a layer and rank. With eager launches, eight
ranks would wait for the host and not for each other. What happens between graphs (events, copies from one
rank's rows to another's, holding a link to its bandwidth) is ordinary stream work that a single thread
enqueues. One graph over all ranks would not do: it runs on the SMs of one rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from typing import Any

import msgspec
import torch

from kvr_partition.measurement import RankTimes
from kvr_partition.methods import GATHERING, ONE_RANK
from kvr_partition.partition import Partition
from kvr_partition.runtime import probe
from kvr_partition.runtime.baselines import gathered
from kvr_partition.runtime.decoding import top_is_finite
from kvr_partition.runtime.execution import Execution
from kvr_partition.runtime.kernels import planning
from kvr_partition.runtime.links.plan import LinkLimits, NoLinks, Topology
from kvr_partition.runtime.prefill import PrefillResult, chunk_cache, not_finite, run_chunk
from kvr_partition.runtime.verify import run_reference, run_single
from profiler import messages
from profiler.green import split_sms
from profiler.layers import run_layers
from profiler.matmul import GroupProducts, chosen_products
from profiler.recording import (
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
from profiler.replay import Replayer
from profiler.worker import Worker, chunk_done, verified


class SMWorker(Worker):
    """All ranks of one GPU, each on its own SMs."""

    _KEPT = 32
    """Recordings kept at once; graphs take little memory, and the rows are shared."""

    def __init__(self, setup: messages.Setup) -> None:
        groups, spare = split_sms(setup.ranks) if setup.ranks > 1 else ([], None)
        super().__init__(setup)
        streams = [group.stream() for group in groups] or [torch.cuda.Stream()]
        # One rank is the whole GPU, which torch's own choices are made for.
        self._products = GroupProducts(groups[0].sms, streams) if groups else None
        self._replayer = Replayer(streams, spare)
        self._pool = torch.cuda.graph_pool_handle()
        # A pool ends with the last graph in it, and would then be refused; this one keeps it.
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.stream(streams[0]):
            self._keeper.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            self._kept = torch.zeros(1, device=self._device)
            self._keeper.capture_end()
        self._arena = Arena(torch.empty(0, dtype=torch.uint8, device=self._device))
        self._recordings: dict[tuple[str, Partition], Recording] = {}

    def ready(self) -> messages.Reply:
        ready = super().ready()
        assert isinstance(ready, messages.Ready)
        return messages.Many((ready,) * self._setup.ranks)

    def _timed_prefill(self, request: messages.Prefill) -> messages.Reply:
        if request.method in ONE_RANK:
            return self._timed_alone(request)
        recording = self._recorded(request)
        self._fill_past(recording, request.token_seed)
        limits = LinkLimits(request.bandwidth, request.noise, self._setup.noise_seed)
        if request.method == "bound":
            # Its rows lie where KV-Runahead's of the same split do. A real prefill fills them with real KV:
            # random numbers take more power to multiply, and with it time.
            self._replayer.run(self._recorded_as("kvr-chain", request.partition), LinkLimits())
        gc.disable()
        try:
            times = self._replayer.run(recording, limits)
        finally:
            gc.enable()
        _check_finite(recording)
        replies = []
        for rank, recorded in enumerate(recording.ranks):
            timeline = recorded.result.timeline
            finishing = recorded.result.first_token is not None
            replies.append(
                messages.PrefillDone(
                    began=times.began,
                    ended=times.ended if finishing else times.done_at[rank],
                    times=RankTimes.of(timeline),
                    kv_bytes=_wire_bytes(recording, rank),
                    first_token=int(recording.host_token[0, 0]) if finishing else None,
                    host_s=times.enqueued - times.began,
                )
            )
        return messages.Many(tuple(replies))

    def _timed_alone(self, request: messages.Prefill) -> messages.Reply:
        """One rank with the whole GPU."""
        self._record_short(request.partition.context)
        run = self._alone(request)
        gc.disable()
        try:
            torch.cuda.synchronize()
            began = time.perf_counter()
            with self._attention(request.method), planning():
                result = run()
            ended = time.perf_counter()
        finally:
            gc.enable()
        assert result.first_token is not None
        times = RankTimes(result.timeline.compute_s, 0.0, 0.0)
        idle = messages.PrefillDone(began, ended, RankTimes(0.0, 0.0, 0.0), 0, None)
        done = messages.PrefillDone(began, ended, times, 0, int(result.first_token[0, 0]))
        return messages.Many((*(idle,) * (self._setup.ranks - 1), done))

    def _verify(self, request: messages.Verify) -> messages.Reply:
        partition = request.partition
        ids = self._tokens(partition.past + partition.context, request.token_seed)
        if request.method == "single":
            verdict = super()._verify(request)
            assert isinstance(verdict, messages.VerifyDone)
            return messages.Many((*(messages.VerifyDone((), None),) * (self._setup.ranks - 1), verdict))
        recording = self._recorded(request)
        # What an earlier replay left in the rows would hide a transfer that is missing.
        self._arena.buffer.fill_(255)
        self._fill_past(recording, request.token_seed)
        limits = LinkLimits(request.bandwidth, request.noise, self._setup.noise_seed)
        self._replayer.run(recording, limits)
        _check_finite(recording)
        alone, reference = run_single(self._model, ids), run_reference(self._model, ids)
        found = [
            verified(recorded.result, partition, request.method, alone, reference) for recorded in recording.ranks
        ]
        self._fill_rows()
        return messages.Many(tuple(found))

    def _timed_chunk(self, request: messages.TimeChunk) -> messages.Reply:
        chunks = Partition((request.chunk,) * self._setup.ranks)
        named = f"chunk behind {request.prefix}, {request.layers or 'all'} layers"
        recording = self._recorded_as(named, chunks, msgspec.structs.replace(request, alone=False))
        if request.alone:
            recording = dataclasses.replace(recording, ranks=recording.ranks[:1])
        self._replayer.run(recording, LinkLimits())
        return messages.Many(tuple(chunk_done(request, one.result) for one in recording.ranks))

    def _timed_link(self, request: messages.TimeLink) -> messages.Reply:
        """All links of the chain at once, as in a prefill: they share the memory."""
        limits = LinkLimits(request.bandwidth)
        links = self._setup.ranks - 1
        buffers = torch.zeros((links, 2, request.nbytes), dtype=torch.uint8, device=self._device)
        took: list[list[float]] = [[] for _ in range(links)]
        for _ in range(request.repeats):
            torch.cuda.synchronize()
            events = [self._replayer.time_copy(at, buffers[at, 0], buffers[at, 1], limits) for at in range(links)]
            torch.cuda.synchronize()
            for at, (begin, end) in enumerate(events):
                took[at].append(begin.elapsed_time(end) / 1e3)
        return messages.Many((*(messages.LinkDone(tuple(one)) for one in took), messages.LinkDone(())))

    def _plan_ahead(self, tokens: int) -> messages.Reply:
        return messages.Many((self._planned(tokens),) * self._setup.ranks)

    # ------------------------------------------------------------- recording

    def _recorded(self, request: messages.Prefill | messages.Verify) -> Recording:
        method = "kvr-" + self._setup.topology if request.method == "kvr" else request.method
        return self._recorded_as(method, request.partition)

    def _recorded_as(
        self, method: str, partition: Partition, timed: messages.TimeChunk | None = None
    ) -> Recording:
        known = self._recordings.pop((method, partition), None)
        if known is None:
            self._reserve(method, partition, timed)
            while len(self._recordings) >= self._KEPT:
                self._recordings.pop(next(iter(self._recordings)))
            known = self._record(method, partition, timed)
        self._recordings[method, partition] = known
        return known

    def _reserve(self, method: str, partition: Partition, timed: messages.TimeChunk | None) -> None:
        """Make room for the rows of a recording; growing drops all recordings, whose rows lie there."""
        entry = self._entry_bytes()
        if method in GATHERING:
            need = partition.ranks * GATHERED_LAYERS * self._place(partition.context)
        elif timed is not None:
            need = sum(partition.ranks * aligned((timed.prefix + timed.chunk) * one) for one in entry)
        else:
            need = sum(aligned(end * one) for one in entry for end in partition.ends)
        if need > self._arena.buffer.numel():
            self._recordings.clear()
            gc.collect()
            self._arena.buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
            torch.cuda.empty_cache()
            self._arena.buffer = torch.empty(need, dtype=torch.uint8, device=self._device)
            self._fill_rows()

    def _entry_bytes(self) -> list[int]:
        """Bytes of KV that one token keeps, of each layer that keeps any."""
        layers = [layer for layer in probe(self._model).layers if layer is not None]
        return [layer.entry(self._setup.batch) * self._model.dtype.itemsize for layer in layers]

    def _place(self, context: int) -> int:
        """Bytes of the largest layer's rows of a whole context."""
        return aligned(context * max(self._entry_bytes()))

    def _fill_past(self, recording: Recording, token_seed: int) -> None:
        """Put the KV of the tokens before the prompt where every rank has it; other recordings used the place."""
        partition = recording.partition
        if not partition.past:
            return
        before = self._tokens(partition.past + partition.context, token_seed)[:, : partition.past]
        past = self._past_cache(before)
        for recorded in recording.ranks:
            for index, layer in recorded.result.cache.kv_layers:
                kept, start = layer.kept_prefix, partition.starts[recorded.result.rank % partition.ranks]
                seen = partition.past - (start - kept)
                if seen > 0:
                    known = past.layers[index]
                    layer.store.write(0, known.keys[:, :, -seen:], known.values[:, :, -seen:])

    def _fill_rows(self) -> None:
        """Random numbers in rows that nothing fills: zeros or NaN would take another time to multiply."""
        buffer, dtype = self._arena.buffer, self._model.dtype
        buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype).normal_()

    def _record(self, method: str, partition: Partition, timed: messages.TimeChunk | None) -> Recording:
        ids = self._tokens(partition.context, seed=1)
        with self._attention(method if timed is None else "kvr"), planning(), torch.no_grad():
            self._rehearse(method, partition, ids, timed)
            self._arena.begin()
            recorded = [self._record_rank(rank, method, partition, ids, timed) for rank in range(partition.ranks)]
        topology: Topology = "fanout" if method == "kvr-fanout" else "chain"
        host_token = torch.empty((self._setup.batch, 1), dtype=torch.long, pin_memory=True)
        return Recording(method, partition, recorded, topology, ids, host_token)

    def _rehearse(
        self, method: str, partition: Partition, ids: torch.Tensor, timed: messages.TimeChunk | None
    ) -> None:
        """Run all ranks once for real, at once and each by itself, with whatever prefix is in the rows.

        Kernels load, plans and workspaces are made, none of which a graph can hold.
        """
        self._arena.begin()
        for rank in range(partition.ranks):
            with torch.cuda.stream(self._replayer.streams[rank]), self._chosen_products(choosing=True):
                execution = Execution(to_host=False, empty=self._empty, at_once=False)
                self._run_rank(rank, method, partition, ids, timed, None, execution)
        torch.cuda.synchronize()

    def _record_rank(
        self, rank: int, method: str, partition: Partition, ids: torch.Tensor, timed: messages.TimeChunk | None
    ) -> RecordedRank:
        stream = self._replayer.streams[rank]
        with torch.cuda.stream(stream), self._chosen_products(choosing=False):
            recorder = Recorder(stream, self._pool)
            clock = RecordedClock(recorder)
            execution = Execution(clock=lambda _: clock, to_host=False, empty=self._empty, at_once=False)
            recorder.begin()
            try:
                result, links, gather = self._run_rank(rank, method, partition, ids, timed, recorder, execution)
            except BaseException:
                recorder.abandon()
                raise
            recorder.end()
        return RecordedRank(recorder.steps, result, clock, links, gather)

    def _run_rank(
        self,
        rank: int,
        method: str,
        partition: Partition,
        ids: torch.Tensor,
        timed: messages.TimeChunk | None,
        recorder: Recorder | None,
        execution: Execution,
    ) -> tuple[PrefillResult, RecordedLinks | None, RecordedGather | None]:
        ranks = partition.ranks
        if method in GATHERING:
            self._arena.begin_gathering(self._place(partition.context))
            gather = RecordedGather(recorder, rank, ranks)
            result = gathered(self._model, ids, method, gather, self._layers, execution)
            return result, None, gather
        start, end = partition.starts[rank], partition.ends[rank]
        chunk = ids[:, start - partition.past : end - partition.past]
        prefix = start if timed is None else timed.prefix
        cache = chunk_cache(self._model, chunk, prefix=prefix, execution=execution)
        if timed is not None and timed.layers is not None:
            result = run_layers(
                self._model,
                chunk,
                cache,
                timed.layers,
                depth=self._depth,
                model_layers=self._layers,
                execution=execution,
            )
            return result, None, None
        links = None if recorder is None or method == "bound" or timed is not None else RecordedLinks(recorder)
        result = run_chunk(
            self._model,
            chunk,
            cache,
            rank=rank,
            # A timed chunk ends with logits on every rank, as the last chunk of a prefill does.
            ranks=ranks if timed is None else rank + 1,
            links=NoLinks() if links is None else links,
            depth=self._depth,
            layers=self._layers,
            execution=execution,
        )
        return result, links, None

    def _chosen_products(self, choosing: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._products is None else chosen_products(self._products, choosing)

    def _empty(self, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._arena.empty(shape, dtype=dtype, device=device)


def _check_finite(recording: Recording) -> None:
    """Refuse a first token of NaN.

    Raises:
        NotFiniteError: the logits are not finite.
    """
    for recorded in recording.ranks:
        logits = recorded.result.logits
        if logits is not None and not top_is_finite(logits.max(-1).values):
            raise not_finite(recorded.result.cache, recording.partition)


def _wire_bytes(recording: Recording, rank: int) -> int:
    """Bytes of KV that a rank puts on links in one replay."""
    recorded = recording.ranks[rank]
    if recorded.gather is not None:
        return recorded.gather.sent_bytes
    if recorded.links is None:
        return 0
    return sum(
        slot.at(hop.piece).nbytes
        for slot in recorded.links.slots
        for hops in recording.sends(rank, slot.window).values()
        for hop in hops
    )
