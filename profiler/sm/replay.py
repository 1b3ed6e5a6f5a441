"""Replays recordings: each rank's graphs on its stream; events, copies and limits of links in between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvr_partition.runtime.links.plan import LinkLimits
from profiler.sm.groups import SMGroup
from profiler.sm.recording import Recording


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
class Link:
    """One directed link: the stream of its copies, and when the message on it began."""

    stream: torch.cuda.Stream
    mark: torch.Tensor


@contextlib.contextmanager
def message(link: Link, nbytes: int, limits: LinkLimits) -> Iterator[None]:
    """What is enqueued within is so many bytes on a link: it takes at least as long as the limit says."""
    with torch.cuda.stream(link.stream):
        if limits.bandwidth is None:
            yield
            return
        from kvr_partition.runtime.triton_kernels import hold_since, note_time

        note_time(link.mark)
        yield
        hold_since(link.mark, limits.throttled_s(nbytes))


class Replayer:
    """Replays recordings: graphs on each rank's stream, links and events in between."""

    def __init__(self, streams: Sequence[torch.cuda.Stream], spare: SMGroup | None) -> None:
        self.streams = streams
        self._spare = spare
        self._links: dict[tuple[int, int, bool], Link] = {}
        self._background: torch.Tensor | None = None

    def run(self, recording: Recording, limits: LinkLimits) -> ReplayTimes:
        """One replay; of some layers only, whose ranks have no token, it ends when all work is done."""
        replay = _Replay(self, recording, limits)
        torch.cuda.synchronize()
        began = time.perf_counter()
        replay.enqueue()
        enqueued = time.perf_counter()
        for stream, rank in zip(self.streams, recording.ranks, strict=False):
            token = rank.result.first_token
            if token is not None:
                with torch.cuda.stream(stream):
                    recording.host_token.copy_(token, non_blocking=True)
                    torch.cuda.current_stream().record_event().synchronize()
                break
        ended = time.perf_counter()
        done_at = []
        for stream in self.streams[: len(recording.ranks)]:
            stream.synchronize()
            done_at.append(time.perf_counter())
        torch.cuda.synchronize()
        replay.tell_times()
        return ReplayTimes(began, enqueued, ended, done_at)

    def link(self, source: int, target: int, limited: bool) -> Link:
        """One directed link.

        Links held to a bandwidth have the SMs that no rank has, so that holding them disturbs nobody.
        Others must be able to use the memory's full speed, which takes more SMs than are left over.
        """
        key = (source, target, limited)
        if key not in self._links:
            spare = self._spare if limited else None
            stream = torch.cuda.Stream() if spare is None else spare.stream()
            self._links[key] = Link(stream, torch.zeros(1, dtype=torch.int64, device="cuda"))
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

    def background(self, nbytes: int) -> torch.Tensor:
        """Two buffers for background traffic, ``[2, nbytes]``."""
        if self._background is None or self._background.shape[1] != nbytes:
            self._background = torch.zeros((2, nbytes), dtype=torch.uint8, device="cuda")
        return self._background


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
            self.by.background(self.limits.noise)

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
                self._background_traffic()
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
        # The slowest link of the ring, the one with background traffic, holds all ranks up.
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
                self._background_traffic()
            for target, from_ in pulls:
                target.copy_(from_, non_blocking=True)
        torch.cuda.current_stream().wait_event(link.stream.record_event())

    def _background_traffic(self) -> None:
        background = self.by.background(self.limits.noise)
        background[1].copy_(background[0], non_blocking=True)
