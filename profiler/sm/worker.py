"""All ranks of one GPU, each on its own SMs, in this process: what they answer."""

from __future__ import annotations

import dataclasses
import time

import torch

from kvr_partition.errors import UnsupportedError
from kvr_partition.measurement import RankTimes
from kvr_partition.methods import METHODS, method_of
from kvr_partition.runtime.channel import Doing
from kvr_partition.runtime.chunk import not_finite
from kvr_partition.runtime.decoding import top_is_finite
from kvr_partition.runtime.kernels import planning
from kvr_partition.runtime.links.plan import LinkLimits
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.verify import run_reference, run_single
from profiler import messages
from profiler.experiments.sm_products import GroupProducts
from profiler.rank import Rank, no_garbage_collection
from profiler.runners import runner
from profiler.serving import Server, Stream, chunk_done, verified
from profiler.sm.groups import split_sms
from profiler.sm.recording import Recording
from profiler.sm.recordings import Recordings, Work
from profiler.sm.replay import Replayer

_IDLE = RankTimes(0.0, 0.0, 0.0)


class SMWorker:
    """All ranks of one GPU.

    Args:
        setup: what the driver wants.
        rank: the model that all of them share.
        recordings: of what they do.
        replayer: runs those.
    """

    def __init__(self, setup: messages.Setup, rank: Rank, recordings: Recordings, replayer: Replayer) -> None:
        self._setup, self._rank = setup, rank
        self._recordings, self._replayer = recordings, replayer
        self._server = Server(
            setup.rank,
            rank.device,
            {
                messages.Prefill: lambda request, _: self._timed_prefill(request),
                messages.Verify: lambda request, _: self._verify(request),
                messages.PlanAhead: lambda request, _: self._plan_ahead(request),
                messages.TimeChunk: lambda request, _: self._timed_chunk(request),
                messages.TimeLink: lambda request, _: self._timed_link(request),
                # Nothing of a failed request can arrive in another one.
                messages.Renew: lambda _, __: messages.Renewed(),
            },
        )

    def ready(self) -> messages.Reply:
        """What the driver wants to know once they have started."""
        return messages.Many((self._rank.ready(),) * self._setup.ranks)

    @property
    def doing(self) -> Doing:
        """What they are at; asked by another thread."""
        return Doing(f"in its {self._server.phase}")

    def serve(self, request: messages.Request, stream: Stream) -> messages.Reply:
        """Answer one request for all ranks; an error is an answer too."""
        return self._server.serve(request, stream)

    # ------------------------------------------------------------------------------------------------- prefill

    def _timed_prefill(self, request: messages.Prefill) -> messages.Reply:
        if method_of(request.method).alone:
            return self._timed_alone(request)
        recording = self._recorded(request)
        self._recordings.fill_past(recording, request.token_seed)
        if request.method == "bound":
            # Its rows lie where KV-Runahead's of the same split do. A real prefill fills them with real KV:
            # random numbers take more power to multiply, and with it time.
            self._replayer.run(self._recordings.of(Work("kvr-chain", request.partition)), LinkLimits())
        with no_garbage_collection():
            times = self._replayer.run(recording, self._rank.limits(request))
        _check_finite(recording)
        replies = []
        for rank, recorded in enumerate(recording.ranks):
            finishing = recorded.result.first_token is not None
            replies.append(
                messages.PrefillDone(
                    began=times.began,
                    ended=times.ended if finishing else times.done_at[rank],
                    times=RankTimes.of(recorded.result.timeline),
                    kv_bytes=_wire_bytes(recording, rank),
                    first_token=int(recording.host_token[0, 0]) if finishing else None,
                    host_s=times.enqueued - times.began,
                )
            )
        return messages.Many(tuple(replies))

    def _timed_alone(self, request: messages.Prefill) -> messages.Reply:
        """One rank with the whole GPU."""
        self._rank.record_short(request.partition.context)
        run = runner(self._rank, request)
        with no_garbage_collection():
            self._rank.synchronize()
            began = time.perf_counter()
            with self._rank.attention(method_of(request.method)), planning():
                result = run()
            ended = time.perf_counter()
        assert result is not None
        assert result.first_token is not None
        times = RankTimes(result.timeline.compute_s, 0.0, 0.0)
        idle = messages.PrefillDone(began, ended, _IDLE, 0, None)
        done = messages.PrefillDone(began, ended, times, 0, int(result.first_token[0, 0]))
        return messages.Many((*(idle,) * (self._setup.ranks - 1), done))

    def _verify(self, request: messages.Verify) -> messages.Reply:
        if method_of(request.method).alone:
            self._rank.record_short(request.partition.context)
            run = runner(self._rank, request)
            with self._rank.attention(method_of(request.method)):
                result = run()
            assert result is not None
            idle = messages.VerifyDone((), None)
            return messages.Many((*(idle,) * (self._setup.ranks - 1), *self._verdicts(request, [result])))
        recording = self._recorded(request)
        self._recordings.forget_rows()
        self._recordings.fill_past(recording, request.token_seed)
        self._replayer.run(recording, self._rank.limits(request))
        _check_finite(recording)
        verdicts = self._verdicts(request, [recorded.result for recorded in recording.ranks])
        self._recordings.fill_rows()
        return messages.Many(tuple(verdicts))

    def _verdicts(self, request: messages.Verify, results: list[PrefillResult]) -> list[messages.VerifyDone]:
        """What comparing results with one rank shows."""
        partition, model = request.partition, self._rank.model
        ids = self._rank.tokens(partition.past + partition.context, request.token_seed)
        alone, reference = run_single(model, ids), run_reference(model, ids)
        return [verified(result, partition, request.method, alone, reference) for result in results]

    def _recorded(self, request: messages.Prefill | messages.Verify) -> Recording:
        if request.method not in METHODS or request.method == "tp":
            raise UnsupportedError(f"ranks of one process cannot run {request.method}")
        by_topology = {"chain": "kvr-chain", "fanout": "kvr-fanout"}
        method = by_topology[self._setup.topology] if request.method == "kvr" else request.method
        return self._recordings.of(Work(method, request.partition))

    # --------------------------------------------------------------------------------------- chunks and links

    def _plan_ahead(self, request: messages.PlanAhead) -> messages.Reply:
        began = time.perf_counter()
        with self._rank.attention(METHODS["kvr"]):
            built = self._rank.warm_up(request.tokens)
        return messages.Many((messages.PlanDone(built, time.perf_counter() - began),) * self._setup.ranks)

    def _timed_chunk(self, request: messages.TimeChunk) -> messages.Reply:
        recording = self._recordings.of(Work.of_chunk(request, self._setup.ranks))
        if request.alone:
            recording = dataclasses.replace(recording, ranks=recording.ranks[:1])
        self._replayer.run(recording, LinkLimits())
        return messages.Many(tuple(chunk_done(request, rank.result) for rank in recording.ranks))

    def _timed_link(self, request: messages.TimeLink) -> messages.Reply:
        """All links of the chain at once, as in a prefill: they share the memory."""
        limits = LinkLimits(request.bandwidth)
        links = self._setup.ranks - 1
        buffers = torch.zeros((links, 2, request.nbytes), dtype=torch.uint8, device=self._rank.device)
        took: list[list[float]] = [[] for _ in range(links)]
        for _ in range(request.repeats):
            self._rank.synchronize()
            events = [self._replayer.time_copy(at, buffers[at, 0], buffers[at, 1], limits) for at in range(links)]
            self._rank.synchronize()
            for at, (begin, end) in enumerate(events):
                took[at].append(begin.elapsed_time(end) / 1e3)
        return messages.Many((*(messages.LinkDone(tuple(seconds)) for seconds in took), messages.LinkDone(())))


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


def sm_worker(setup: messages.Setup) -> SMWorker:
    """All ranks of the current machine's first GPU, each on SMs of its own."""
    groups, spare = split_sms(setup.ranks) if setup.ranks > 1 else ([], None)
    device = torch.device(setup.device)
    torch.set_num_threads(setup.threads)
    torch.cuda.set_device(device)
    rank = Rank(setup, device)
    streams = [group.stream() for group in groups] or [torch.cuda.Stream()]
    # One rank is the whole GPU, which torch's own choices are made for.
    products = GroupProducts(groups[0].sms, streams) if groups else None
    return SMWorker(setup, rank, Recordings(rank, streams, products), Replayer(streams, spare))
