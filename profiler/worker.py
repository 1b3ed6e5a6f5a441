"""A rank as a process of its own: its place in the world, and what it answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers.generation.streamers import BaseStreamer

from kvr_partition.errors import RankError
from kvr_partition.measurement import RankTimes
from kvr_partition.methods import METHODS, method_of
from kvr_partition.partition import Partition
from kvr_partition.runtime import decode, link_group, prefill
from kvr_partition.runtime.agreement import agreement_of, is_link_error
from kvr_partition.runtime.channel import IDLE, Doing
from kvr_partition.runtime.decoding import configured
from kvr_partition.runtime.execution import EAGER
from kvr_partition.runtime.kernels import planning
from kvr_partition.runtime.links.group import links_of
from kvr_partition.runtime.links.plan import AnyTopology, LinkLimits
from kvr_partition.runtime.links.probe import time_pairs
from kvr_partition.runtime.verify import run_reference, run_single
from profiler import messages
from profiler.rank import Rank, no_garbage_collection
from profiler.runners import runner
from profiler.serving import Server, Stream, chunk_done, verified

_KVR = METHODS["kvr"]


class Worker:
    """One rank of a world, in this process."""

    def __init__(self, setup: messages.Setup) -> None:
        self._setup = setup
        self._device = torch.device(setup.device)
        self._server = Server(
            setup.rank,
            self._device,
            {
                messages.Prefill: lambda request, _: self._timed_prefill(request),
                messages.Verify: lambda request, _: self._verify(request),
                messages.PlanAhead: lambda request, _: self._plan_ahead(request),
                messages.TimeChunk: lambda request, _: self._timed_chunk(request),
                messages.TimeLink: lambda request, _: self._timed_link(request),
                messages.Generate: self._generate,
                messages.Renew: lambda _, __: self._renew(),
            },
            self._explained,
            self._tell_of_failure,
        )
        self._server.phase = "start"
        torch.set_num_threads(setup.threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._made_world = (setup.ranks > 1 and not dist.is_initialized()) or setup.backend == "cuda"
        if self._made_world and not dist.is_initialized():
            self._join(setup)
        # Baselines keep the world's own group, which may take all the SMs it likes.
        on_gpus = setup.backend == "cuda" and setup.ranks > 1
        links = link_group(links=setup.links) if on_gpus else None  # type: ignore[arg-type]
        self.agreement = agreement_of(links) if setup.ranks > 1 else None
        self._link_setup = links_of(links, self._device) if setup.ranks > 1 else None
        execution = EAGER if self._link_setup is None else self._link_setup.execution
        self._rank = Rank(setup, self._device, links, execution, self._barrier)
        self._barrier()

    def _join(self, setup: messages.Setup) -> None:
        on_cuda = self._device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            init_method=setup.rendezvous,
            rank=setup.rank,
            world_size=setup.ranks,
            timeout=timedelta(seconds=setup.timeout_s),
            device_id=self._device if on_cuda else None,
        )

    def ready(self) -> messages.Reply:
        """What the driver wants to know of a rank that has started."""
        if self._link_setup is None:
            return self._rank.ready()
        wanted: AnyTopology = self._setup.topology  # type: ignore[assignment]
        return self._rank.ready(self._link_setup.link, self._link_setup.topology(wanted))

    @property
    def doing(self) -> Doing:
        """What this rank is at; asked by another thread."""
        if self.agreement is not None and self.agreement.channel is not None:
            doing = self.agreement.channel.doing
            if doing is not IDLE:
                return doing
        return Doing(f"in its {self._server.phase}")

    def serve(self, request: messages.Request, stream: Stream) -> messages.Reply:
        """Answer one request; an error is an answer too. ``stream`` takes what comes before the answer."""
        return self._server.serve(request, stream)

    def leave(self) -> None:
        """Take down what joining the world set up.

        A process group that is still there when the interpreter ends can abort the process: its threads
        ask for an interpreter that no longer answers.
        """
        with contextlib.suppress(Exception):  # peers that are gone cannot be told
            if self._made_world:
                dist.destroy_process_group()

    # -------------------------------------------------------------------------------------- among other ranks

    def _explained(self, error: Exception, phase: str) -> BaseException:
        """The error, or what is known of it: who broke a link, or in which layer a prefill failed."""
        agreement = self.agreement
        if agreement is None or isinstance(error, RankError):
            return error
        if agreement.failure is not None:
            known = agreement.failure.with_traceback(error.__traceback__)
            known.__cause__ = error
            return known
        return agreement.explain(None, error, phase) if is_link_error(error) else error

    def _tell_of_failure(self, error: BaseException, phase: str) -> None:
        if self.agreement is not None:
            # Others may be waiting for this rank, in a prefill that it has not even begun.
            self.agreement.fail(error, phase)

    def _renew(self) -> messages.Reply:
        if self.agreement is not None:
            self.agreement.renew()
        return messages.Renewed()

    def _barrier(self) -> None:
        self._synchronize()
        if self.agreement is not None:
            self.agreement.barrier()
        self._synchronize()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    # ------------------------------------------------------------------------------------------------- prefill

    def _timed_prefill(self, request: messages.Prefill) -> messages.Reply:
        method = method_of(request.method)
        self._rank.record_short(self._own_tokens(request))
        run = runner(self._rank, request)
        with self._rank.attention(method), _planning(request), no_garbage_collection():
            self._barrier()
            began = time.perf_counter()
            result = run()
            if request.method == "bound":
                # Ranks do not wait for each other here: TTFT(p) is the time of the slowest one.
                self._synchronize()
            ended = time.perf_counter()
        if result is None:
            return messages.PrefillDone(began, ended, RankTimes(0.0, 0.0, 0.0), 0, None)
        return messages.PrefillDone(
            began=began,
            ended=ended,
            times=RankTimes.of(result.timeline),
            kv_bytes=result.kv_bytes,
            first_token=None if result.first_token is None else int(result.first_token[0, 0]),
        )

    def _verify(self, request: messages.Verify) -> messages.Reply:
        rank, partition = self._rank, request.partition
        rank.record_short(self._own_tokens(request))
        run = runner(rank, request)
        with rank.attention(method_of(request.method)):
            self._barrier()
            result = run()
        if result is None:
            return messages.VerifyDone((), None)
        ids = rank.tokens(partition.past + partition.context, request.token_seed)
        alone, reference = run_single(rank.model, ids), run_reference(rank.model, ids)
        return verified(result, partition, request.method, alone, reference)

    def _own_tokens(self, request: messages.Prefill | messages.Verify) -> int:
        """Tokens that this rank computes of a prompt."""
        return request.sizes[self._setup.rank] if len(request.sizes) > 1 else request.sizes[0]

    # --------------------------------------------------------------------------------------- chunks and links

    def _plan_ahead(self, request: messages.PlanAhead) -> messages.Reply:
        began = time.perf_counter()
        with self._rank.attention(_KVR):
            built = self._rank.warm_up(request.tokens)
        return messages.PlanDone(built, time.perf_counter() - began)

    def _timed_chunk(self, request: messages.TimeChunk) -> messages.Reply:
        rank = self._rank
        rank.record_short(request.chunk)
        with rank.attention(_KVR), _planning(request), no_garbage_collection():
            self._barrier()
            if request.alone and self._setup.rank:
                return messages.Idle()
            ids = rank.tokens(request.chunk, seed=0)
            return chunk_done(request, rank.chunk(ids, request.prefix, request.layers))

    def _timed_link(self, request: messages.TimeLink) -> messages.Reply:
        """Seconds one way: half the round trip, and all that a limit adds, since it holds one direction only."""
        if self._device.type == "cuda":
            return messages.LinkDone(tuple(self._links_between_gpus(request)))
        return messages.LinkDone(tuple(self._links_between_hosts(request)))

    def _links_between_gpus(self, request: messages.TimeLink) -> list[float]:
        """One clock is enough: a stream is busy with a message until that is there."""
        assert self.agreement is not None
        held, took = LinkLimits(request.bandwidth).throttled_s(request.nbytes), []
        for low in range(self._setup.ranks - 1):
            pairs = [(low, low + 1)]
            for times in time_pairs(self.agreement, self._device, pairs, request.nbytes, request.repeats).values():
                took += [held + seconds for seconds in times]
        return took

    def _links_between_hosts(self, request: messages.TimeLink) -> list[float]:
        """There and back again, halved: clocks of two ranks need not agree to a microsecond."""
        rank, limits = self._setup.rank, LinkLimits(request.bandwidth)
        took = []
        message = torch.zeros(request.nbytes, dtype=torch.uint8)
        for source in range(self._setup.ranks - 1):
            self._barrier()
            for _ in range(request.repeats if rank in (source, source + 1) else 0):
                if rank == source:
                    began = time.perf_counter()
                    time.sleep(limits.throttled_s(request.nbytes))
                    held = time.perf_counter() - began
                    began = time.perf_counter()
                    dist.send(message, dst=source + 1)
                    dist.recv(message, src=source + 1)
                    took.append(held + (time.perf_counter() - began) / 2)
                else:
                    dist.recv(message, src=source)
                    dist.send(message, dst=source)
        return took

    # -------------------------------------------------------------------------------------------------- tokens

    def _generate(self, request: messages.Generate, stream: Stream) -> messages.Reply:
        rank = self._rank
        input_ids = torch.tensor([request.input_ids], device=self._device)
        with configured(rank.model, rank.settings):
            with rank.attention(_KVR):
                self._barrier()
                began = time.perf_counter()
                result = prefill(
                    rank.model,
                    input_ids,
                    Partition(request.sizes),
                    group=rank.group,
                    depth=rank.depth,
                    layers=rank.layers,
                    reserve=request.max_new_tokens,
                    topology=self._setup.topology,  # type: ignore[arg-type]
                )
            if result.first_token is not None:
                self._server.phase = "decode"
                with self._decoding():
                    self._decode(input_ids, result, request.max_new_tokens, began, stream)
        return messages.GenerateDone()

    def _decode(self, input_ids: torch.Tensor, result: Any, wanted: int, began: float, stream: Stream) -> None:
        first = result.first_token
        if wanted == 1:
            # The only token may be one that settings force at the end.
            first = decode(self._rank.model, input_ids, result, 1)
        stream(messages.Token(int(first[0, 0]), time.perf_counter() - began))
        if wanted > 1:
            streamer = _TokenStreamer(lambda token: stream(messages.Token(token, time.perf_counter() - began)))
            decode(self._rank.model, input_ids, result, wanted, streamer=streamer)

    @contextlib.contextmanager
    def _decoding(self) -> Any:
        channel = None if self.agreement is None else self.agreement.channel
        if channel is not None:
            channel.doing = Doing("decoding")
        yield
        if channel is not None:
            channel.doing = IDLE


def _planning(request: messages.Prefill | messages.TimeChunk) -> contextlib.AbstractContextManager[None]:
    """Build plans of exactly these shapes in an untimed run, so that the timed one does not."""
    return contextlib.nullcontext() if request.cold else planning()


class _TokenStreamer(BaseStreamer):
    """Hands on each new token that ``generate`` makes; its first call is the prompt, and is left out."""

    def __init__(self, send: Callable[[int], None]) -> None:
        self._send = send
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self._send(int(value.reshape(-1)[0]))
        self._prompt_seen = True

    def end(self) -> None:
        pass
