"""What runs on a rank: a model that is built once, and the requests it serves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import platform
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from kvr_partition.errors import KVRError, RankError
from kvr_partition.measurement import RankTimes
from kvr_partition.partition import Partition
from kvr_partition.runtime import decode, link_group, prefill, probe, single, stock, tsp, warm_up, zigzag
from kvr_partition.runtime.agreement import agreement_of, as_rank_error, is_link_error
from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.channel import IDLE, Doing
from kvr_partition.runtime.decoding import configured
from kvr_partition.runtime.execution import AT_ONCE
from kvr_partition.runtime.fused import Layers, chosen_layers
from kvr_partition.runtime.fused.recorded import LONGEST
from kvr_partition.runtime.kernels import planning
from kvr_partition.runtime.links.group import links_of
from kvr_partition.runtime.links.plan import AnyTopology, LinkLimits, NoLinks
from kvr_partition.runtime.links.probe import time_pairs
from kvr_partition.runtime.prefill import PrefillResult, chunk_cache, run_chunk
from kvr_partition.runtime.support import Depth, runahead_attention
from kvr_partition.runtime.verify import SingleRun, compare, run_reference, run_single
from profiler import messages
from profiler.layers import run_layers
from profiler.models import build_model, build_tensor_parallel, open_model


class Worker:
    """One rank: its model and its place in the group."""

    def __init__(self, setup: messages.Setup) -> None:
        self._setup = setup
        self._device = torch.device(setup.device)
        torch.set_num_threads(setup.threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        # Ranks that share a process meet in it.
        self._world = setup.ranks if setup.backend != "sm" else 1
        self._made_world = (self._world > 1 and not dist.is_initialized()) or setup.backend == "cuda"
        if self._made_world and not dist.is_initialized():
            backend = "nccl" if self._device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                init_method=setup.rendezvous,
                rank=setup.rank,
                world_size=setup.ranks,
                timeout=timedelta(seconds=setup.timeout_s),
                device_id=self._device if self._device.type == "cuda" else None,
            )
        # Baselines keep the world's own group, which may take all the SMs it likes.
        on_gpus = setup.backend == "cuda" and self._world > 1
        self._links = link_group(links=setup.links) if on_gpus else None  # type: ignore[arg-type]
        self.agreement = agreement_of(self._links) if self._world > 1 else None
        self._link_setup = links_of(self._links, self._device) if self._world > 1 else None
        self._phase = "start"
        folder = open_model(setup.model)
        self._model = build_model(folder, dtype=setup.dtype, device=setup.device, seed=setup.seed)
        # What is timed and verified is the model; a checkpoint's settings hold where tokens are decoded.
        self._settings, self._model.generation_config = self._model.generation_config, GenerationConfig()
        self._has_weights = folder.has_weights
        self._tensor_parallel_model: Any = None
        self._past: tuple[torch.Tensor | None, Any] = (None, None)
        self._vocab = folder.geometry.vocab_size
        self._depth: Depth = probe(self._model).choose(setup.depth)  # type: ignore[arg-type]
        self._layers: Layers = setup.layers  # type: ignore[assignment]
        self._chosen = chosen_layers(self._model, self._layers)
        # The model lives as long as this process; collecting garbage never needs to look at it again.
        gc.collect()
        gc.freeze()
        self._barrier()

    def ready(self) -> messages.Reply:
        """What the driver wants to know of a rank that has started."""
        on_cuda = self._device.type == "cuda"
        wanted: AnyTopology = self._setup.topology  # type: ignore[assignment]
        return messages.Ready(
            device_name=torch.cuda.get_device_name(self._device) if on_cuda else cpu_name(),
            host=platform.node(),
            depth=self._depth,
            torch=str(torch.__version__),
            transformers=transformers.__version__,
            cuda=torch.version.cuda if on_cuda else None,
            nccl=".".join(map(str, torch.cuda.nccl.version())) if on_cuda else None,
            driver=driver_version() if on_cuda else None,
            link="none" if self._link_setup is None else self._link_setup.link,
            topology="chain" if self._link_setup is None else self._link_setup.topology(wanted),
            layers=self._chosen.name,
            left=tuple(self._chosen.left_in_short),
            weights_bytes=sum(one.nbytes for one in self._model.parameters()) if on_cuda else 0,
            memory_bytes=torch.cuda.get_device_properties(self._device).total_memory if on_cuda else 0,
        )

    @property
    def doing(self) -> Doing:
        """What this rank is at; asked by another thread."""
        if self.agreement is not None and self.agreement.channel is not None:
            doing = self.agreement.channel.doing
            if doing is not IDLE:
                return doing
        return Doing(f"in its {self._phase}")

    def leave(self) -> None:
        """Take down what joining the world set up.

        A process group that is still there when the interpreter ends can abort the process: its threads
        ask for an interpreter that no longer answers.
        """
        with contextlib.suppress(Exception):  # peers that are gone cannot be told
            if self._made_world:
                dist.destroy_process_group()

    def serve(self, request: messages.Request, stream: Callable[[messages.Reply], None]) -> messages.Reply:
        """Answer one request; an error is an answer too. ``stream`` takes what comes before the answer."""
        self._phase = messages.PHASES.get(type(request), "request")
        try:
            match request:
                case messages.Prefill():
                    return self._timed_prefill(request)
                case messages.Verify():
                    return self._verify(request)
                case messages.PlanAhead():
                    return self._plan_ahead(request.tokens)
                case messages.TimeChunk():
                    return self._timed_chunk(request)
                case messages.TimeLink():
                    return self._timed_link(request)
                case messages.Generate():
                    return self._generate(request, stream)
                case messages.Renew():
                    if self.agreement is not None:
                        self.agreement.renew()
                    return messages.Renewed()
                case _:
                    raise TypeError(f"a rank has no answer to {type(request).__name__}")
        except Exception as error:
            explained = self._explained(error)
            answer = failed(explained, self._setup.rank, self._phase)
            if self.agreement is not None:
                # Others may be waiting for this rank, in a prefill that it has not even begun.
                self.agreement.fail(explained, self._phase)
        finally:
            self._phase = "wait for a request"
        if answer.kind == "out-of-memory" and self._device.type == "cuda":
            # Only now that nothing refers to the error any more, nothing refers to what it was raised among.
            gc.collect()
            torch.cuda.empty_cache()
        return answer

    def _explained(self, error: Exception) -> BaseException:
        """The error, or what is known of it: who broke a link, or in which layer a prefill failed."""
        agreement = self.agreement
        if agreement is None or isinstance(error, RankError):
            return error
        if agreement.failure is not None:
            known = agreement.failure.with_traceback(error.__traceback__)
            known.__cause__ = error
            return known
        return agreement.explain(None, error, self._phase) if is_link_error(error) else error

    def _record_short(self, tokens: int) -> None:
        """Have launches of short chunks recorded, as serving code has after `warm_up`; no part of a prefill."""
        if self._device.type == "cuda" and tokens <= LONGEST:
            chosen_layers(self._model, self._layers).record(tokens, least=tokens)

    def _own_tokens(self, request: messages.Prefill | messages.Verify) -> int:
        """Tokens that this rank computes of a prompt."""
        sizes = request.partition.sizes
        return sizes[self._setup.rank] if len(sizes) > 1 else sizes[0]

    def _timed_prefill(self, request: messages.Prefill) -> messages.Reply:
        self._record_short(self._own_tokens(request))
        run = self._runner(request)
        if request.method == "tp":
            self._tensor_parallel()
        # Switching the attention walks over all modules; that is set-up, not prefill.
        with self._attention(request.method), self._planning(request), _no_garbage_collection():
            self._barrier()
            began = time.perf_counter()
            result = run()
            if request.method == "bound":
                # The slowest rank counts, whichever it is, and only the last one has waited for its token.
                self._synchronize()
            ended = time.perf_counter()
        if result is None:
            return messages.PrefillDone(began, ended, RankTimes(0.0, 0.0, 0.0), 0, None)
        timeline = result.timeline
        return messages.PrefillDone(
            began=began,
            ended=ended,
            times=RankTimes.of(timeline),
            kv_bytes=result.kv_bytes,
            first_token=None if result.first_token is None else int(result.first_token[0, 0]),
        )

    def _runner(self, request: messages.Prefill | messages.Verify) -> Callable[[], PrefillResult | None]:
        """This rank's part of a method, ready to run."""
        partition = request.partition
        ids = self._tokens(partition.past + partition.context, request.token_seed)
        before, ids = ids[:, : partition.past], ids[:, partition.past :]
        setup, model, depth, layers = self._setup, self._model, self._depth, self._layers
        limits = LinkLimits(request.bandwidth, request.noise, setup.noise_seed)
        last = setup.rank == setup.ranks - 1
        match request.method:
            case "kvr" | "kvr-chain" | "kvr-fanout":
                topology: AnyTopology = "fanout" if request.method == "kvr-fanout" else "chain"
                if request.method == "kvr":
                    topology = setup.topology  # type: ignore[assignment]
                past = self._past_rows(before, ids, partition.ends[setup.rank])
                return lambda: prefill(
                    model,
                    ids,
                    partition,
                    group=self._links,
                    depth=depth,
                    layers=layers,
                    topology=topology,
                    limits=limits,
                    past=past,
                )
            case "bound":
                # Its prefix is there before the clock starts.
                start, end = partition.starts[setup.rank], partition.ends[setup.rank]
                chunk = ids[:, start - partition.past : end - partition.past]
                cache = random_prefix(chunk_cache(model, chunk, prefix=start))
                return lambda: run_chunk(
                    model,
                    chunk,
                    cache,
                    rank=setup.rank,
                    ranks=setup.ranks,
                    links=NoLinks(),
                    depth=depth,
                    layers=layers,
                )
            case "tsp":
                return lambda: tsp(model, ids, layers=layers, limits=limits)
            case "tsp-causal":
                return lambda: tsp(model, ids, layers=layers, limits=limits, causal=True)
            case "zigzag":
                return lambda: zigzag(model, ids, layers=layers, limits=limits)
            case "tp":
                return self._run_tensor_parallel(ids)
            case "stock" | "single":
                return self._alone(request) if last else lambda: None
            case _:
                raise KVRError(f"unknown method {request.method!r}")

    def _verify(self, request: messages.Verify) -> messages.Reply:
        self._record_short(self._own_tokens(request))
        run = self._runner(request)
        if request.method == "tp":
            self._tensor_parallel()
        with self._attention(request.method):
            self._barrier()
            result = run()
        if result is None:
            return messages.VerifyDone((), None)
        partition = request.partition
        ids = self._tokens(partition.past + partition.context, request.token_seed)
        alone, reference = run_single(self._model, ids), run_reference(self._model, ids)
        return verified(result, partition, request.method, alone, reference)

    def _past_cache(self, before: torch.Tensor) -> Any:
        """The KV of the tokens before a prompt, from one rank; kept until other tokens are asked for."""
        known, cache = self._past
        if known is None or not torch.equal(known, before):
            cache = stock(self._model, before).cache
            self._past = (before, cache)
        return cache

    def _past_rows(self, before: torch.Tensor, ids: torch.Tensor, end: int) -> RunaheadCache | None:
        """The same as rows with room for everything up to position ``end``: nothing is copied on the clock."""
        past = before.shape[1]
        if not past:
            return None
        room, kept = end - past, self._past_cache(before)
        execution = AT_ONCE if self._link_setup is None else self._link_setup.execution
        return chunk_cache(self._model, ids[:, :0], prefix=past, reserve=room, past=kept, execution=execution)

    def _tensor_parallel(self) -> Any:
        """The same model, its layers cut across all ranks by transformers; built at the first call."""
        if self._tensor_parallel_model is None:
            setup = self._setup
            folder = Path(setup.model)
            if not self._has_weights:
                folder = Path(setup.scratch) / "checkpoint"
                if setup.rank == 0:
                    self._model.save_pretrained(folder)
                self._barrier()
            self._tensor_parallel_model = build_tensor_parallel(
                folder, dtype=setup.dtype, rank=setup.rank, ranks=setup.ranks
            )
            self._barrier()
        return self._tensor_parallel_model

    def _alone(self, request: messages.Prefill | messages.Verify) -> Callable[[], PrefillResult]:
        """A method of one rank, ready to run."""
        partition, setup = request.partition, self._setup
        ids = self._tokens(partition.past + partition.context, request.token_seed)
        before, ids = ids[:, : partition.past], ids[:, partition.past :]
        if request.method == "stock":
            kept = copy.deepcopy(self._past_cache(before)) if partition.past else None
            return lambda: stock(self._model, ids, rank=setup.rank, ranks=setup.ranks, past=kept)
        past = self._past_rows(before, ids, partition.past + partition.context)
        return lambda: single(
            self._model,
            ids,
            rank=setup.rank,
            ranks=setup.ranks,
            depth=self._depth,
            layers=self._layers,
            past=past,
        )

    def _run_tensor_parallel(self, ids: torch.Tensor) -> Callable[[], PrefillResult | None]:
        """Tensor parallelism with the layers that everyone has: what is known of a model holds for its parts."""
        setup = self._setup

        def run() -> PrefillResult:
            model = self._tensor_parallel()
            fused = chosen_layers(self._model, self._layers).of_parts(self._model, model)
            with fused.replaced():
                return stock(model, ids, rank=setup.rank, ranks=setup.ranks)

        return run

    def _plan_ahead(self, tokens: int) -> messages.Reply:
        return self._planned(tokens)

    def _planned(self, tokens: int) -> messages.PlanDone:
        began = time.perf_counter()
        with self._attention("kvr"):
            built = warm_up(self._model, tokens, self._depth, self._layers)
        return messages.PlanDone(built.plans, time.perf_counter() - began)

    def _planning(self, request: messages.Prefill | messages.TimeChunk) -> contextlib.AbstractContextManager[None]:
        """Plans of the very shapes are wanted; a run of its own builds them, so the timed one does not."""
        return contextlib.nullcontext() if request.cold else planning()

    def _timed_chunk(self, request: messages.TimeChunk) -> messages.Reply:
        self._record_short(request.chunk)
        with self._attention("kvr"), self._planning(request), _no_garbage_collection():
            self._barrier()
            if request.alone and self._setup.rank:
                return messages.Idle()
            result = self._chunk(request)
        return chunk_done(request, result)

    def _timed_link(self, request: messages.TimeLink) -> messages.Reply:
        """There and back again, halved: clocks of two ranks need not agree to a microsecond.

        Between GPUs one clock is enough: a stream is busy with a message until that is there.
        """
        rank, took = self._setup.rank, []
        limits = LinkLimits(request.bandwidth)
        if self._device.type == "cuda":
            assert self.agreement is not None
            held = limits.held_s(request.nbytes)
            for low in range(self._world - 1):
                for times in time_pairs(
                    self.agreement, self._device, [(low, low + 1)], request.nbytes, request.repeats
                ).values():
                    took += [held + seconds for seconds in times]
            return messages.LinkDone(tuple(took))
        message = torch.zeros(request.nbytes, dtype=torch.uint8)
        for source in range(self._world - 1):
            self._barrier()
            for _ in range(request.repeats if rank in (source, source + 1) else 0):
                if rank == source:
                    began = time.perf_counter()
                    # What a limited link adds, it adds to one way.
                    time.sleep(limits.held_s(request.nbytes))
                    held = time.perf_counter() - began
                    began = time.perf_counter()
                    dist.send(message, dst=source + 1)
                    dist.recv(message, src=source + 1)
                    took.append(held + (time.perf_counter() - began) / 2)
                else:
                    dist.recv(message, src=source)
                    dist.send(message, dst=source)
        return messages.LinkDone(tuple(took))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _chunk(self, request: messages.TimeChunk) -> PrefillResult:
        ids = self._tokens(request.chunk, seed=0)
        cache = random_prefix(chunk_cache(self._model, ids, prefix=request.prefix))
        if request.layers is not None:
            return run_layers(
                self._model, ids, cache, request.layers, depth=self._depth, model_layers=self._layers
            )
        return run_chunk(
            self._model, ids, cache, rank=0, ranks=1, links=NoLinks(), depth=self._depth, layers=self._layers
        )

    def _generate(self, request: messages.Generate, stream: Callable[[messages.Reply], None]) -> messages.Reply:
        input_ids = torch.tensor([request.input_ids], device=self._device)
        with configured(self._model, self._settings):
            return self._generated(input_ids, request, stream)

    def _generated(
        self, input_ids: torch.Tensor, request: messages.Generate, stream: Callable[[messages.Reply], None]
    ) -> messages.Reply:
        with self._attention("kvr"):
            self._barrier()
            began = time.perf_counter()
            result = prefill(
                self._model,
                input_ids,
                Partition(request.sizes),
                group=self._links,
                depth=self._depth,
                layers=self._layers,
                reserve=request.max_new_tokens,
                topology=self._setup.topology,  # type: ignore[arg-type]
            )
        if result.first_token is not None:
            self._phase = "decode"
            if self.agreement is not None and self.agreement.channel is not None:
                self.agreement.channel.doing = Doing("decoding")
            first = result.first_token
            if request.max_new_tokens == 1:
                # The only token may be one that settings force at the end.
                first = decode(self._model, input_ids, result, 1)
            stream(messages.Token(int(first[0, 0]), time.perf_counter() - began))
            streamer = _TokenStreamer(lambda token: stream(messages.Token(token, time.perf_counter() - began)))
            if request.max_new_tokens > 1:
                decode(self._model, input_ids, result, request.max_new_tokens, streamer=streamer)
            if self.agreement is not None and self.agreement.channel is not None:
                self.agreement.channel.doing = IDLE
        return messages.GenerateDone()

    def _tokens(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self._vocab, (self._setup.batch, count), generator=generator)
        return ids.to(self._device)

    def _attention(self, method: str) -> contextlib.AbstractContextManager[None]:
        ours = method.startswith("kvr") or method in ("single", "bound", "tsp-causal", "zigzag")
        if ours and self._depth == "attention" and probe(self._model).route == "interface":
            return runahead_attention(self._model)
        return contextlib.nullcontext()

    def _barrier(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        if self.agreement is not None:
            self.agreement.barrier()
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def chunk_done(request: messages.TimeChunk, result: PrefillResult) -> messages.ChunkDone:
    """The answer that a timed chunk makes."""
    timeline = result.timeline
    first_kv_s = timeline.first_kv_s or 0.0
    seconds = timeline.compute_s if request.layers is None else timeline.compute_s - first_kv_s
    return messages.ChunkDone(seconds, first_kv_s)


def random_prefix(cache: RunaheadCache) -> RunaheadCache:
    """Fill in a prefix that no link brings: zeros would be faster to multiply than real data."""
    for _, layer in cache.kv_layers:
        layer.store.rows[: layer.kept_prefix].normal_()
    return cache


def verified(
    result: PrefillResult, partition: Partition, method: str, alone: SingleRun, reference: SingleRun
) -> messages.VerifyDone:
    """Compare one rank's result with the single run."""
    if not method.startswith("kvr") and method != "single":
        # Their rows are in an order of their own; the logits depend on all of them.
        result = dataclasses.replace(result, cache=None)
    deviations = compare(result, partition.ends[result.rank % partition.ranks], alone, reference)
    token = result.first_token
    same = None if token is None else bool((token.cpu() == alone.token.cpu()).all())
    return messages.VerifyDone(tuple(deviations), same)


def failed(error: BaseException, rank: int, phase: str) -> messages.Failed:
    """The answer that an error makes."""
    told = as_rank_error(error, rank, phase)
    kind = "start" if phase == "start" and told.kind in ("error", "lost") else told.kind
    return messages.Failed(
        kind, str(told), "".join(traceback.format_exception(error)), told.phase or phase, told.rank
    )


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The NVIDIA driver's version, where the system tells it."""
    with contextlib.suppress(OSError), Path("/proc/driver/nvidia/version").open(encoding="utf-8") as lines:
        words = lines.readline().split()
        return next((word for word in words if word[0].isdigit() and "." in word), None)
    return None


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


@contextlib.contextmanager
def _no_garbage_collection() -> Any:
    """A collection in the middle of a sample would be measured as prefill."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
