"""SM-partition ranks: one GPU as many ranks, each on SMs of its own, recorded once and replayed.

All ranks live in one process and share the weights. What a rank computes is recorded as CUDA graphs, cut
wherever it meets a link, so that a prefill costs two launches a layer and rank. With eager launches, eight
ranks would wait for the host and not for each other. What happens between graphs (events, copies from one
rank's rows to another's, holding a link to its bandwidth) is ordinary stream work that a single thread
enqueues. One graph over all ranks would not do: it runs on the SMs of one rank.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kvr_partition.errors import KVRError
from kvr_partition.measurement import RankTimes
from kvr_partition.methods import GATHERING
from kvr_partition.partition import Partition
from kvr_partition.runtime import probe, single
from kvr_partition.runtime.baselines import gathered
from kvr_partition.runtime.execution import Execution
from kvr_partition.runtime.gather import Runs
from kvr_partition.runtime.kernels import planning
from kvr_partition.runtime.links import Hop, LinkLimits, NoLinks, Slot, Topology, receives, sends
from kvr_partition.runtime.prefill import PrefillResult, chunk_cache, run_chunk
from kvr_partition.runtime.verify import run_reference, run_single
from profiler import messages
from profiler.green import SMGroup, split_sms
from profiler.worker import Worker, verified


@dataclass(frozen=True, slots=True)
class Step:
    """One thing a rank does in a replay."""

    kind: Literal["graph", "stamp", "own", "wait", "gather"]
    layer: int = 0
    graph: Any = None


class Recorder:
    """Records what one rank enqueues on its stream: graphs, and the steps between them."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self.steps: list[Step] = []
        self._stream = stream
        self._pool = pool
        self._graph: Any = None

    def begin(self) -> None:
        """Start a graph."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graph = graph

    def end(self) -> None:
        """End the graph, and keep it if there is anything in it."""
        graph, self._graph = self._graph, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a graph is empty is no news here
            graph.capture_end()
        if _nodes(graph):
            graph.instantiate()
            self.steps.append(Step("graph", graph=graph))

    def abandon(self) -> None:
        """Leave capture mode after an error."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with contextlib.suppress(RuntimeError):  # the error that led here is the one to tell
                graph.capture_end()

    def cut(self, step: Step) -> None:
        """Put a step between two graphs."""
        self.end()
        self.steps.append(step)
        self.begin()


def _nodes(graph: Any) -> int:
    from cuda.bindings import driver

    error, _, count = driver.cuGraphGetNodes(driver.CUgraph(graph.raw_cuda_graph()), 0)
    if int(error) != 0:
        raise KVRError(f"a recorded graph cannot be read: {error.name}")
    return int(count)


class _RecordedClock:
    """Stamps become steps; their times are those of the latest replay."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._taken = 0
        self.events: list[torch.cuda.Event] = []

    def stamp(self) -> int:
        self._recorder.cut(Step("stamp"))
        self._taken += 1
        return self._taken - 1

    def seconds(self) -> list[float]:
        return [self.events[0].elapsed_time(event) / 1e3 for event in self.events]


class _RecordedLinks:
    """Meetings with links become steps."""

    def __init__(self, recorder: Recorder) -> None:
        self.sent_bytes = 0
        self.slots: Sequence[Slot] = ()
        self.transfer_s: list[float] = []
        self._recorder = recorder

    def start(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.transfer_s = [0.0] * len(slots)

    def own_ready(self, layer: int) -> None:
        self._recorder.cut(Step("own", layer))

    def wait_prefix(self, layer: int) -> None:
        self._recorder.cut(Step("wait", layer))

    def finish(self) -> list[float]:
        return self.transfer_s

    def abort(self) -> None:
        pass


class _RecordedGather:
    """Meetings for an all-gather become steps."""

    def __init__(self, recorder: Recorder | None, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self.sent_bytes = 0
        self.rows: list[torch.Tensor] = []
        self.owned: list[Sequence[Runs]] = []
        self._recorder = recorder

    def gather(self, layer: int, rows: torch.Tensor, owned: Sequence[Runs]) -> None:
        own = sum(end - start for start, end in owned[self.rank])
        self.sent_bytes += own * rows[0].nbytes * (self.ranks - 1)
        self.rows.append(rows)
        self.owned.append(owned)
        if self._recorder is not None:
            self._recorder.cut(Step("gather", layer))


@dataclass
class RecordedRank:
    """One rank of a recorded prefill."""

    steps: list[Step]
    result: PrefillResult
    clock: _RecordedClock
    links: _RecordedLinks | None
    gather: _RecordedGather | None


@dataclass
class Recording:
    """A recorded prefill: all ranks of one method on one split."""

    method: str
    partition: Partition
    ranks: list[RecordedRank]
    topology: Topology
    input_ids: torch.Tensor
    """Read by the graphs; they do not keep what they read."""
    host_token: torch.Tensor
    _hops: dict[tuple[int, int | None], tuple[list[Hop], dict[int, list[Hop]]]] = field(default_factory=dict)

    def receives(self, rank: int, window: int | None) -> list[Hop]:
        """`links.receives` of this prefill."""
        return self._plan(rank, window)[0]

    def sends(self, rank: int, window: int | None) -> dict[int, list[Hop]]:
        """`links.sends` of this prefill."""
        return self._plan(rank, window)[1]

    def _plan(self, rank: int, window: int | None) -> tuple[list[Hop], dict[int, list[Hop]]]:
        # Layers share their plans, and working one out takes as long as enqueueing it.
        if (rank, window) not in self._hops:
            self._hops[rank, window] = (
                receives(self.partition, rank, window, self.topology),
                sends(self.partition, rank, window, self.topology),
            )
        return self._hops[rank, window]


GATHERED_LAYERS = 2
"""Layers whose rows a rank of a gathering method keeps.

Each has the whole context, and eight ranks with all their layers do not fit into one GPU. When a rank has
gathered a layer, everyone has read what it had of the layer before, so the next one may take that place.
"""


@dataclass
class _Arena:
    """KV rows of the recordings. They share the memory: no two of them are ever under way at once."""

    buffer: torch.Tensor
    _used: int = 0
    _ring: tuple[int, int] | None = None
    """Where the places of `GATHERED_LAYERS` begin, and how large one is."""
    _layer: int = 0

    def begin(self) -> None:
        """A recording begins: every row is free."""
        self._used, self._ring = 0, None

    def begin_gathering(self, place: int) -> None:
        """Rows from here on are of another rank that keeps `GATHERED_LAYERS` of at most so many bytes."""
        self._ring, self._layer = (self._used, place), 0
        self._used += GATHERED_LAYERS * place

    def empty(self, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = shape[0] * shape[1] * dtype.itemsize
        if self._ring is not None:
            first, place = self._ring
            start = first + self._layer % GATHERED_LAYERS * place
            self._layer += 1
        else:
            start = self._used
            self._used = start + _aligned(size)
        if max(self._used, start + size) > self.buffer.numel():
            raise torch.OutOfMemoryError("the rows of this method do not fit in the memory set aside for them")
        return self.buffer[start : start + size].view(dtype).view(shape)


def _aligned(size: int) -> int:
    return (size + 511) // 512 * 512


@dataclass(frozen=True, slots=True)
class ReplayTimes:
    """Moments of a replay, in seconds of ``time.perf_counter``.

    Attributes:
        began: all ranks were idle.
        enqueued: the host had nothing more to do.
        ended: the first token was on the host.
        done_at: when each rank was done, as the host saw it in order of rank.
    """

    began: float
    enqueued: float
    ended: float
    done_at: list[float]


@dataclass(frozen=True, slots=True)
class _Link:
    """One directed link: the stream of its copies, and when the message on it began."""

    stream: torch.cuda.Stream
    mark: torch.Tensor


@contextlib.contextmanager
def message(link: _Link, nbytes: int, limits: LinkLimits) -> Iterator[None]:
    """What is enqueued within is so many bytes on a link: it takes at least as long as the limit says."""
    with torch.cuda.stream(link.stream):
        if limits.bandwidth is None:
            yield
            return
        from kvr_partition.runtime.triton_kernels import hold_since, note_time

        note_time(link.mark)
        yield
        hold_since(link.mark, limits.held_s(nbytes))


class Replayer:
    """Replays recordings: graphs on each rank's stream, links and events in between."""

    def __init__(self, streams: Sequence[torch.cuda.Stream], spare: SMGroup | None) -> None:
        self.streams = streams
        self._spare = spare
        self._links: dict[tuple[int, int, bool], _Link] = {}
        self._foreign: torch.Tensor | None = None

    def run(self, recording: Recording, limits: LinkLimits) -> ReplayTimes:
        """One replay."""
        replay = _Replay(self, recording, limits)
        torch.cuda.synchronize()
        began = time.perf_counter()
        replay.enqueue()
        enqueued = time.perf_counter()
        finishing = next(at for at, rank in enumerate(recording.ranks) if rank.result.first_token is not None)
        token = recording.ranks[finishing].result.first_token
        assert token is not None
        with torch.cuda.stream(self.streams[finishing]):
            recording.host_token.copy_(token, non_blocking=True)
            done = torch.cuda.current_stream().record_event()
        done.synchronize()
        ended = time.perf_counter()
        done_at = []
        for stream in self.streams[: len(recording.ranks)]:
            stream.synchronize()
            done_at.append(time.perf_counter())
        torch.cuda.synchronize()
        replay.tell_times()
        return ReplayTimes(began, enqueued, ended, done_at)

    def link(self, source: int, target: int, limited: bool) -> _Link:
        """One directed link.

        Links held to a bandwidth have the SMs that no rank has, so that holding them disturbs nobody.
        Others must be able to use the memory's full speed, which takes more SMs than are left over.
        """
        key = (source, target, limited)
        if key not in self._links:
            spare = self._spare if limited else None
            stream = torch.cuda.Stream() if spare is None else spare.stream()
            self._links[key] = _Link(stream, torch.zeros(1, dtype=torch.int64, device="cuda"))
        return self._links[key]

    def time_copy(
        self, source: int, from_: torch.Tensor, to: torch.Tensor, limits: LinkLimits
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Copy between two buffers as a message to the next rank; its begin and end."""
        link = self.link(source, source + 1, limits.bandwidth is not None)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(link.stream)
        with message(link, from_.nbytes, limits):
            to.copy_(from_, non_blocking=True)
        end.record(link.stream)
        return begin, end

    def foreign(self, nbytes: int) -> torch.Tensor:
        """Two buffers for foreign traffic, ``[2, nbytes]``."""
        if self._foreign is None or self._foreign.shape[1] != nbytes:
            self._foreign = torch.zeros((2, nbytes), dtype=torch.uint8, device="cuda")
        return self._foreign


@dataclass
class _Replay:
    """The state of one replay."""

    by: Replayer
    recording: Recording
    limits: LinkLimits
    at: list[int] = field(init=False)
    arrived: dict[tuple[int, int, int], torch.cuda.Event] = field(default_factory=dict)
    stamps: list[list[torch.cuda.Event]] = field(init=False)
    spans: list[tuple[int, int, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    meeting: dict[int, dict[int, torch.cuda.Event]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.at = [0] * len(self.recording.ranks)
        self.stamps = [[] for _ in self.recording.ranks]
        if self.limits.noise:
            self.by.foreign(self.limits.noise)

    def enqueue(self) -> None:
        """Enqueue everything, a layer of each rank in turn, so that nobody runs out of work first."""
        ranks = range(len(self.recording.ranks))
        while any(self.at[rank] < len(self.recording.ranks[rank].steps) for rank in ranks):
            before = list(self.at)
            for rank in ranks:
                with torch.cuda.stream(self.by.streams[rank]):
                    self._advance(rank)
            assert self.at != before, "the recorded ranks wait for each other"

    def tell_times(self) -> None:
        """Hand the times of this replay to the recorded clocks and links."""
        for rank, recorded in enumerate(self.recording.ranks):
            recorded.clock.events = self.stamps[rank]
            if recorded.links is not None:
                recorded.links.transfer_s[:] = [0.0] * len(recorded.links.slots)
        for rank, layer, begin, end in self.spans:
            links = self.recording.ranks[rank].links
            assert links is not None
            links.transfer_s[layer] += begin.elapsed_time(end) / 1e3

    def _advance(self, rank: int) -> None:
        steps = self.recording.ranks[rank].steps
        handed_over, launched = False, 0
        while self.at[rank] < len(steps):
            step = steps[self.at[rank]]
            if step.kind == "graph":
                if launched == 2:
                    return  # two launches make a layer: the other ranks' turn
                launched += 1
                step.graph.replay()
            elif step.kind == "stamp":
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                self.stamps[rank].append(event)
            elif step.kind == "own":
                if handed_over:
                    return  # the next layer: the other ranks' turn
                handed_over = True
                self._own_ready(rank, step.layer)
            elif step.kind == "wait":
                if not self._wait_prefix(rank, step.layer):
                    return
            elif not self._gather(rank, step.layer):
                return
            self.at[rank] += 1

    def _own_ready(self, rank: int, layer: int) -> None:
        recording = self.recording
        links = recording.ranks[rank].links
        assert links is not None
        limited = self.limits.bandwidth is not None
        ready = torch.cuda.current_stream().record_event()
        if self.limits.noisy_link(layer, len(recording.ranks)) == rank:
            with message(self.by.link(rank, rank + 1, limited), self.limits.noise, self.limits):
                self._foreign_traffic()
        slot = links.slots[layer]
        outgoing = recording.sends(rank, slot.window)
        incoming = recording.receives(rank, slot.window)
        for chunk in (rank, *(hop.piece.chunk for hop in incoming)):
            for hop in outgoing.get(chunk, ()):
                to = recording.ranks[hop.peer].links
                assert to is not None
                source, target = slot.at(hop.piece), to.slots[layer].at(hop.piece)
                link = self.by.link(rank, hop.peer, limited)
                link.stream.wait_event(ready if chunk == rank else self.arrived[rank, layer, chunk])
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(link.stream)
                with message(link, source.nbytes, self.limits):
                    target.copy_(source, non_blocking=True)
                end.record(link.stream)
                self.arrived[hop.peer, layer, chunk] = end
                self.spans.append((rank, layer, begin, end))

    def _wait_prefix(self, rank: int, layer: int) -> bool:
        links = self.recording.ranks[rank].links
        assert links is not None
        hops = self.recording.receives(rank, links.slots[layer].window)
        events = [self.arrived.get((rank, layer, hop.piece.chunk)) for hop in hops]
        if any(event is None for event in events):
            return False
        for event in events:
            assert event is not None
            torch.cuda.current_stream().wait_event(event)
        return True

    def _gather(self, rank: int, layer: int) -> bool:
        meeting = self.meeting.setdefault(layer, {})
        if rank not in meeting:
            meeting[rank] = torch.cuda.current_stream().record_event()
        if len(meeting) < len(self.recording.ranks):
            return False
        self._exchange(rank, layer, list(meeting.values()))
        return True

    def _exchange(self, rank: int, layer: int, ready: list[torch.cuda.Event]) -> None:
        """Pull every other rank's rows; a ring's links would carry the same bytes."""
        gathers = [recorded.gather for recorded in self.recording.ranks]
        own = gathers[rank]
        assert own is not None
        limited = self.limits.bandwidth is not None
        link = self.by.link(-1, rank, limited)
        for event in ready:
            link.stream.wait_event(event)
        # The slowest link of the ring, the one with foreign traffic, holds all ranks up.
        noisy = self.limits.noisy_link(layer, len(gathers)) is not None
        rows = own.rows[layer]
        pulls = []
        for source, gather in enumerate(gathers):
            if source != rank:
                assert gather is not None
                runs = own.owned[layer][source]
                pulls += [(rows[start:end], gather.rows[layer][start:end]) for start, end in runs]
        carried = sum(target.nbytes for target, _ in pulls)
        with message(link, carried + (self.limits.noise if noisy else 0), self.limits):
            if noisy:
                self._foreign_traffic()
            for target, from_ in pulls:
                target.copy_(from_, non_blocking=True)
        torch.cuda.current_stream().wait_event(link.stream.record_event())

    def _foreign_traffic(self) -> None:
        foreign = self.by.foreign(self.limits.noise)
        foreign[1].copy_(foreign[0], non_blocking=True)


class SMWorker(Worker):
    """All ranks of one GPU, each on its own SMs."""

    _KEPT = 32
    """Recordings kept at once; graphs take little memory, and the rows are shared."""

    def __init__(self, setup: messages.Setup) -> None:
        groups, spare = split_sms(setup.ranks) if setup.ranks > 1 else ([], None)
        super().__init__(setup)
        streams = [group.stream() for group in groups] or [torch.cuda.Stream()]
        self._sms = [group.sms for group in groups]
        self._replayer = Replayer(streams, spare)
        self._pool = torch.cuda.graph_pool_handle()
        # A pool ends with the last graph in it, and would then be refused; this one keeps it.
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.stream(streams[0]):
            self._keeper.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            self._kept = torch.zeros(1, device=self._device)
            self._keeper.capture_end()
        self._arena = _Arena(torch.empty(0, dtype=torch.uint8, device=self._device))
        self._recordings: dict[tuple[str, Partition], Recording] = {}

    def ready(self) -> messages.Reply:
        ready = super().ready()
        assert isinstance(ready, messages.Ready)
        return messages.Many((ready,) * self._setup.ranks)

    def _timed_prefill(self, request: messages.Prefill) -> messages.Reply:
        if request.method == "single":
            return self._timed_single(request)
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
        replies = []
        for rank, recorded in enumerate(recording.ranks):
            timeline = recorded.result.timeline
            finishing = recorded.result.first_token is not None
            replies.append(
                messages.PrefillDone(
                    began=times.began,
                    ended=times.ended if finishing else times.done_at[rank],
                    times=RankTimes(timeline.compute_s, timeline.wait_s, timeline.transfer_s),
                    kv_bytes=_wire_bytes(recording, rank),
                    first_token=int(recording.host_token[0, 0]) if finishing else None,
                    host_s=times.enqueued - times.began,
                )
            )
        return messages.Many(tuple(replies))

    def _timed_single(self, request: messages.Prefill) -> messages.Reply:
        """One rank with the whole GPU, as stock transformers would run it."""
        ids = self._tokens(request.past + sum(request.sizes), request.token_seed)
        before, ids = ids[:, : request.past], ids[:, request.past :]
        past = copy.deepcopy(self._past_cache(before)) if request.past else None
        gc.disable()
        try:
            torch.cuda.synchronize()
            began = time.perf_counter()
            result = single(self._model, ids, past=past)
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
            return messages.Many(tuple(messages.VerifyDone((), None) for _ in range(self._setup.ranks)))
        recording = self._recorded(request)
        # What an earlier replay left in the rows would hide a transfer that is missing.
        self._arena.buffer.fill_(255)
        self._fill_past(recording, request.token_seed)
        limits = LinkLimits(request.bandwidth, request.noise, self._setup.noise_seed)
        self._replayer.run(recording, limits)
        alone, reference = run_single(self._model, ids), run_reference(self._model, ids)
        found = [
            verified(recorded.result, partition, request.method, alone, reference) for recorded in recording.ranks
        ]
        self._fill_rows()
        return messages.Many(tuple(found))

    def _timed_chunk(self, request: messages.TimeChunk) -> messages.Reply:
        chunks = Partition((request.chunk,) * self._setup.ranks)
        recording = self._recorded_as(f"chunk behind {request.prefix}", chunks, prefix=request.prefix)
        self._replayer.run(recording, LinkLimits())
        timelines = [one.result.timeline for one in recording.ranks]
        return messages.Many(tuple(messages.ChunkDone(one.compute_s, one.first_kv_s or 0.0) for one in timelines))

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

    def _recorded_as(self, method: str, partition: Partition, prefix: int | None = None) -> Recording:
        known = self._recordings.pop((method, partition), None)
        if known is None:
            self._reserve(method, partition, prefix)
            while len(self._recordings) >= self._KEPT:
                self._recordings.pop(next(iter(self._recordings)))
            known = self._record(method, partition, prefix)
        self._recordings[method, partition] = known
        return known

    def _reserve(self, method: str, partition: Partition, prefix: int | None) -> None:
        """Make room for the rows of a recording; growing drops all recordings, whose rows lie there."""
        entry = self._entry_bytes()
        if method in GATHERING:
            need = partition.ranks * GATHERED_LAYERS * self._place(partition.context)
        elif prefix is not None:
            need = sum(partition.ranks * _aligned((prefix + partition.sizes[0]) * one) for one in entry)
        else:
            need = sum(_aligned(end * one) for one in entry for end in partition.ends)
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
        return _aligned(context * max(self._entry_bytes()))

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

    def _record(self, method: str, partition: Partition, prefix: int | None) -> Recording:
        ids = self._tokens(partition.context if prefix is None else sum(partition.sizes), seed=1)
        with self._attention(method if prefix is None else "kvr"), planning(), torch.no_grad():
            self._rehearse(method, partition, ids, prefix)
            self._arena.begin()
            recorded = [self._record_rank(rank, method, partition, ids, prefix) for rank in range(partition.ranks)]
        topology: Topology = "fanout" if method == "kvr-fanout" else "chain"
        host_token = torch.empty((self._setup.batch, 1), dtype=torch.long, pin_memory=True)
        return Recording(method, partition, recorded, topology, ids, host_token)

    def _rehearse(self, method: str, partition: Partition, ids: torch.Tensor, prefix: int | None) -> None:
        """Run all ranks once for real, at once and each by itself, with whatever prefix is in the rows.

        Kernels load, plans and workspaces are made, none of which a graph can hold.
        """
        self._arena.begin()
        for rank in range(partition.ranks):
            with torch.cuda.stream(self._replayer.streams[rank]):
                execution = Execution(to_host=False, empty=self._empty)
                self._run_rank(rank, method, partition, ids, prefix, None, execution)
        torch.cuda.synchronize()

    def _record_rank(
        self, rank: int, method: str, partition: Partition, ids: torch.Tensor, prefix: int | None
    ) -> RecordedRank:
        stream = self._replayer.streams[rank]
        with torch.cuda.stream(stream):
            recorder = Recorder(stream, self._pool)
            clock = _RecordedClock(recorder)
            execution = Execution(clock=lambda _: clock, to_host=False, empty=self._empty)
            recorder.begin()
            try:
                result, links, gather = self._run_rank(rank, method, partition, ids, prefix, recorder, execution)
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
        prefix: int | None,
        recorder: Recorder | None,
        execution: Execution,
    ) -> tuple[PrefillResult, _RecordedLinks | None, _RecordedGather | None]:
        ranks = partition.ranks
        if method in GATHERING:
            self._arena.begin_gathering(self._place(partition.context))
            gather = _RecordedGather(recorder, rank, ranks)
            result = gathered(self._model, ids, method, gather, execution)
            return result, None, gather
        start, end = partition.starts[rank], partition.ends[rank]
        links = None if recorder is None or method == "bound" or prefix is not None else _RecordedLinks(recorder)
        chunk = ids[:, start - partition.past : end - partition.past]
        cache = chunk_cache(self._model, chunk, prefix=start if prefix is None else prefix, execution=execution)
        result = run_chunk(
            self._model,
            chunk,
            cache,
            rank=rank,
            # A timed chunk ends with logits on every rank, as the last chunk of a prefill does.
            ranks=ranks if prefix is None else rank + 1,
            links=NoLinks() if links is None else links,
            depth=self._depth,
            execution=execution,
        )
        return result, links, None

    def _empty(self, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._arena.empty(shape, dtype=dtype, device=device)


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
