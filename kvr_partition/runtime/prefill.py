"""prefill(): one rank's part of a KV-Runahead prefill."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers.cache_utils import Cache

from kvr_partition.errors import NotFiniteError, PartitionError
from kvr_partition.partition import Partition, whole
from kvr_partition.predictor import PartitionPredictor
from kvr_partition.runtime import attention
from kvr_partition.runtime.agreement import Turn, agreement_of
from kvr_partition.runtime.cache import RunaheadCache, RunaheadLayer, check_past, held_states
from kvr_partition.runtime.decoding import Greedy, top_is_finite
from kvr_partition.runtime.digests import past_fingerprint, prompt_digest
from kvr_partition.runtime.execution import AT_ONCE, Execution, on_device
from kvr_partition.runtime.fused import FusedModel, Layers, chosen_layers, running
from kvr_partition.runtime.kernels import CudnnPlans
from kvr_partition.runtime.links.group import link_setup
from kvr_partition.runtime.links.plan import NO_LIMITS, AnyTopology, LinkLimits, Links, NoLinks, check_topology
from kvr_partition.runtime.padding import Padding, read_padding
from kvr_partition.runtime.support import (
    Depth,
    check_context,
    check_model,
    check_tokens,
    exclusively,
    first_token,
    forward,
    probe,
    replaced_attention,
    vocabulary,
)
from kvr_partition.table import PartitionTable
from kvr_partition.timeline import RankTimeline


@dataclass(frozen=True)
class PrefillResult:
    """What a rank has after a prefill.

    Attributes:
        rank, ranks: which rank this is, of how many.
        first_token: greedy first token of each prompt under ``model.generation_config``, ``[batch, 1]`` int64 on
            the host; None except on the last rank.
        logits: logits of the prompt's last position, ``[batch, vocabulary]``; None except on the last rank.
        cache: this rank's KV; on the last rank that of the whole prompt, for `decode`.
        kv_bytes: bytes of KV this rank put on the wire.
        context, past: tokens of the prompt, and of the cache before it.
        attention_mask: of prompts that were padded, ``[batch, past + context]``; else None.
    """

    rank: int
    ranks: int
    first_token: torch.Tensor | None
    logits: torch.Tensor | None
    cache: Any
    kv_bytes: int
    _timeline: Callable[[], RankTimeline]
    context: int = 0
    past: int = 0
    attention_mask: torch.Tensor | None = None

    @property
    def is_last(self) -> bool:
        """Whether this is the rank that decodes on."""
        return self.rank == self.ranks - 1

    @property
    def timeline(self) -> RankTimeline:
        """Where this rank's time went, layer by layer."""
        return self._timeline()


def prefill(
    model: Any,
    input_ids: torch.Tensor,
    partition: Partition | PartitionTable | PartitionPredictor,
    *,
    group: dist.ProcessGroup | None = None,
    depth: Depth = "auto",
    layers: Layers = "auto",
    reserve: int = 0,
    topology: AnyTopology = "auto",
    limits: LinkLimits = NO_LIMITS,
    past: Cache | None = None,
    attention_mask: torch.Tensor | None = None,
    agree: bool = True,
) -> PrefillResult:
    """Read a prompt on all ranks of an initialised ``torch.distributed`` world.

    Every rank calls it with the same model weights, the same token ids and the same partition. Ranks compare
    these before any KV is sent. A rank that fails makes the group unusable, on all its ranks, until `renew`.

    Args:
        model: a Hugging Face causal LM, in eval mode, on this rank's device.
        input_ids: the whole prompt, ``[batch, context]``; shorter prompts of a batch are padded on the left. With
            a past and a partition, past tokens may stand in front, which settings that penalise them need.
        partition: one chunk per rank of the group; or a table or predictor, which is asked for the prompt's
            length, the group's ranks and what ``past`` holds.
        group: the process group; the default group when None. A single-chunk partition needs none.
        depth: how far to reach into the model; ``"auto"`` takes attention depth where it is exact.
        layers: whose norms, rotary embedding, activations and KV rows run: ``"fused"``: those of this project
            where a probe has shown that they are as exact as the model's own; ``"stock"``: the model's own;
            ``"auto"``: fused on a GPU.
        reserve: tokens of room for decoding to allocate at once on the last rank.
        topology: ``"chain"``: each rank hands on everything to the next, as published; ``"fanout"``: each
            sends its own chunk to all later ones; ``"auto"``: what suits the links, see `link_setup`.
        limits: what links are held to, for experiments.
        past: on every rank, a cache that holds the partition's ``past`` tokens before this prompt (a
            prefix-cache hit): a ``DynamicCache`` or ``StaticCache``, which is copied, or a `RunaheadCache` with
            rows to spare, which is gone on with in place, so that it serves the latest prefill only.
        attention_mask: ``[batch, context]``, or ``[batch, past + context]``, with 0 for padding on the left.
        agree: whether ranks compare what they are about to run. Without it, ranks that disagree go unnoticed.

    Raises:
        OutOfRangeError: the table or predictor has no partition for this prompt.
        PartitionError: the partition does not fit the prompt or the group, or the model's positions.
        UnsupportedError: the model cannot be split exactly, is in training mode, or has generation settings that
            cannot be followed.
        NotFiniteError: the logits are NaN or infinite; on the last rank.
        RankError: ranks disagree, or one failed, died or did not come. It names the rank and the phase.
    """
    alone = isinstance(partition, Partition) and partition.ranks == 1
    with contextlib.ExitStack() as stack:
        turn = Turn(None)
        if not alone and _world_size(group) > 1:
            turn = stack.enter_context(agreement_of(group, agree).turn(agree))
        turn.checked(lambda: stack.enter_context(exclusively(model)))
        plan = turn.checked(
            lambda: _planned(
                model, input_ids, partition, turn, depth, layers, reserve, topology, limits, past, attention_mask
            )
        )
        split, rank, input_ids = plan.partition, plan.rank, plan.input_ids
        # Links go by the current stream, which is that of the model only on the model's device.
        stack.enter_context(on_device(input_ids.device))
        turn.agree(
            "kvr",
            model,
            input_ids,
            plan.prompt,
            sizes=split.sizes,
            past=split.past,
            past_held=plan.past_held,
            topology=topology,
            limits=limits,
        )
        start, end = split.starts[rank] - split.past, split.ends[rank] - split.past
        chunk_ids = input_ids[:, start:end]
        room = reserve if rank == split.ranks - 1 else 0
        # Connecting takes all ranks: before anything that may fail on one of them.
        setup = link_setup(turn, input_ids.device)
        chosen = setup.topology(topology)
        setup.connect(turn, input_ids.device, chosen)
        cache = chunk_cache(
            model, chunk_ids, prefix=split.starts[rank], reserve=room, past=past, execution=setup.execution
        )
        links = setup.links(split, cache, input_ids.device, turn, chosen, limits)
        try:
            return run_chunk(
                model,
                chunk_ids,
                cache,
                rank=rank,
                ranks=split.ranks,
                links=links,
                depth=depth,
                layers=plan.layers,
                partition=split,
                choose=plan.greedy.first,
                padding=plan.padding,
                turn=turn,
            )
        except BaseException:
            links.abort()
            raise


@dataclass(frozen=True)
class _Plan:
    """What a prefill needs, checked."""

    partition: Partition
    rank: int
    greedy: Greedy
    padding: Padding | None
    layers: FusedModel
    input_ids: torch.Tensor
    prompt: int
    """Digest of the prompt and its mask."""
    past_held: tuple[float, ...]


def _planned(
    model: Any,
    input_ids: torch.Tensor,
    partition: Partition | PartitionTable | PartitionPredictor,
    turn: Turn,
    depth: Depth,
    layers: Layers,
    reserve: int,
    topology: AnyTopology,
    limits: LinkLimits,
    past: Cache | None,
    attention_mask: torch.Tensor | None,
) -> _Plan:
    """Everything that can be refused without asking another rank."""
    rank, world = (0, 1) if turn.of is None else (turn.of.rank, turn.of.ranks)
    check_topology(topology)
    check_ids(model, input_ids)
    reserve = whole(reserve, "reserve", 0)
    support = probe(model)
    held = 0 if past is None else check_past(past, support.layers, input_ids.shape[0], model.dtype)
    whole_ids = input_ids
    if held and isinstance(partition, Partition) and input_ids.shape[1] == held + partition.context:
        input_ids = input_ids[:, held:]
    if isinstance(partition, PartitionTable | PartitionPredictor):
        partition = chosen_partition(partition, input_ids.shape[1], world, held)
    if not isinstance(partition, Partition):
        raise PartitionError(
            f"partition must be a Partition, a table or a predictor; got {type(partition).__name__}; "
            "write Partition((9728, 6656))"
        )
    if partition.ranks != world:
        raise PartitionError(f"the partition has {partition.ranks} chunks, but the group has {world} ranks")
    if input_ids.shape[1] != partition.context:
        raise PartitionError(
            f"input_ids must be [batch, {partition.context}] for this partition; got {list(input_ids.shape)}"
        )
    if held != partition.past:
        raise PartitionError(f"the partition has {partition.past} past tokens, but the cache given holds {held}")
    check_context(model.config, partition.past + partition.context + reserve)
    support.check_tokens(partition.past + partition.context)
    padding = read_padding(model, attention_mask, input_ids.shape[0], held, partition.context, depth)
    mask = None if padding is None else padding.mask
    support.choose("cache" if padding is not None and depth == "auto" else depth)
    fused = chosen_layers(model, layers)
    unknown = held + input_ids.shape[1] - whole_ids.shape[1]
    greedy = Greedy.under(model.generation_config, whole_ids, past=unknown, attention_mask=mask)
    fingerprint: tuple[float, ...] = ()
    if past is not None and held and turn.compare:
        # What the last layer keeps depends on all that the others do.
        fingerprint = past_fingerprint(*held_states(past.layers[support.last_kv_layer]))
    prompt = read_prompt(model, input_ids, mask)
    return _Plan(partition, rank, greedy, padding, fused, input_ids, prompt, fingerprint)


def read_prompt(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> int:
    """The digest of a prompt whose tokens a model knows.

    Raises:
        PartitionError: a token id that the model has no embedding for.
    """
    digest, least, most = prompt_digest(input_ids, attention_mask)
    check_tokens((least, most), vocabulary(model))
    return digest


def check_ids(model: Any, input_ids: torch.Tensor) -> None:
    """Refuse what is no prompt, and models that would read it otherwise than they generate.

    Raises:
        PartitionError: not ``[batch, context]`` whole numbers.
        UnsupportedError: a model in training mode.
    """
    check_model(model)
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        got = list(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise PartitionError(f"input_ids must be a tensor [batch, context] of at least one token; got {got}")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise PartitionError(f"input_ids must be whole numbers; got {input_ids.dtype}")


def chosen_partition(
    knows: PartitionTable | PartitionPredictor, context: int, ranks: int, past: int = 0
) -> Partition:
    """What a table or predictor says about a prompt; the whole prompt where there is one rank.

    Raises:
        OutOfRangeError: it does not know.
    """
    if ranks == 1:
        return Partition((context,), past)
    if isinstance(knows, PartitionTable):
        return knows.lookup(context, ranks=ranks, past=past).partition
    return knows.predict(context, ranks=ranks, past=past).partition


def _world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of a group.

    Raises:
        PartitionError: something else than a process group, or one that this process is not in.
    """
    if not dist.is_initialized():
        return 1
    real: object = dist.group.WORLD if group is None else group
    if not isinstance(real, dist.ProcessGroup) or dist.get_rank(real) < 0:
        raise PartitionError(f"group must be a process group with this process in it; got {group!r}")
    return dist.get_world_size(real)


@torch.no_grad()
def chunk_cache(
    model: Any,
    chunk_ids: torch.Tensor,
    *,
    prefix: int,
    reserve: int = 0,
    past: Cache | None = None,
    execution: Execution = AT_ONCE,
) -> RunaheadCache:
    """The cache that `run_chunk` needs for one chunk.

    Args:
        chunk_ids: the chunk's tokens, ``[batch, tokens]``.
        prefix: tokens before the chunk, those in ``past`` included.
        reserve: tokens of room for decoding.
        past: a cache of the first tokens, see `RunaheadCache.allocate`.
        execution: allocates the rows.
    """
    return RunaheadCache.allocate(
        probe(model).layers,
        batch=chunk_ids.shape[0],
        prefix=prefix,
        chunk=chunk_ids.shape[1],
        reserve=reserve,
        dtype=model.dtype,
        device=chunk_ids.device,
        execution=execution,
        past=past,
    )


@torch.no_grad()
def run_chunk(
    model: Any,
    chunk_ids: torch.Tensor,
    cache: RunaheadCache,
    *,
    rank: int,
    ranks: int,
    links: Links,
    depth: Depth = "auto",
    layers: Layers | FusedModel = "auto",
    execution: Execution = AT_ONCE,
    partition: Partition | None = None,
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
    padding: Padding | None = None,
    turn: Turn | None = None,
) -> PrefillResult:
    """Run a model over one chunk behind a prefix that ``links`` deliver, or that is in the cache already.

    Args:
        chunk_ids: the chunk's tokens, ``[batch, tokens]``.
        cache: of `chunk_cache`, not used before.
        layers: as in `prefill`, or what `chosen_layers` found.
        execution: at once, or to be recorded.
        partition: the split it is part of; the chunk alone when None.
        choose: takes the first token from logits; the largest one when None.
        padding: of padded prompts.
        turn: the turn of the group, which is told what is under way.

    Raises:
        NotFiniteError: the logits are NaN or infinite.
    """
    support = probe(model)
    chosen = support.choose("cache" if padding is not None else depth)
    turn = Turn(None) if turn is None else turn
    start = cache.get_seq_length()
    clock = execution.clock(chunk_ids.device)
    run = _ChunkRun(cache, links, clock.stamp, turn)
    clock.stamp()
    links.start([layer.slot for _, layer in cache.kv_layers])
    cache.prefilling = run.store_own if chosen == "attention" else run.store_and_wait
    route = support.route if chosen == "attention" else None
    # What is recorded here is recorded whole; recordings of layers are for runs that are carried out at once.
    at_once = execution.at_once and chunk_ids.shape[0] == 1
    tokens = chunk_ids.shape[1] if at_once else None
    own = run.add_prefix_ if chosen == "attention" else None
    with running(model, layers, tokens, own), replaced_attention(model, route, run.attend) as extra:
        if padding is not None:
            extra.update(padding.of_chunk(start, start + chunk_ids.shape[1]))
        output = forward(model, chunk_ids, cache, **extra)
    cache.prefilling = None
    logits, token, top = None, None, None
    if rank == ranks - 1:
        turn.now("the first token")
        if execution.to_host and chunk_ids.device.type == "cuda":
            turn.wait_for_device(torch.cuda.current_stream().record_event(), rank - 1)
        logits, token, top = first_token(output, choose, execution.to_host)
    clock.stamp()
    transfer_s = links.finish()
    split = Partition((chunk_ids.shape[1],), start) if partition is None else partition
    if top is not None and execution.to_host and not top_is_finite(top):
        raise not_finite(cache, split)
    return PrefillResult(
        rank=rank,
        ranks=ranks,
        first_token=token,
        logits=logits,
        cache=cache,
        kv_bytes=links.sent_bytes,
        _timeline=lambda: RankTimeline.of_stamps(clock.seconds(), transfer_s),
        context=split.context,
        past=split.past,
        attention_mask=None if padding is None else padding.mask,
    )


def not_finite(cache: Any, partition: Partition) -> NotFiniteError:
    """Where the numbers behind logits that are not finite arose: the first layer with such keys or values."""
    advice = "use another dtype, or look at the weights"
    for index, layer in enumerate(cache.layers):
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if not isinstance(states, torch.Tensor) or not states.numel():
                continue
            wrong = ~torch.isfinite(states).all(dim=-1).all(dim=1).all(dim=0)
            if bool(wrong.any()):
                # Windows keep the last tokens only.
                last = partition.past + partition.context
                position = last - wrong.shape[0] + int(wrong.nonzero()[0])
                rank = next(
                    (rank for rank, end in enumerate(partition.ends) if position < end), partition.ranks - 1
                )
                return NotFiniteError(
                    f"the logits of this prompt are not finite: keys or values of layer {index} are not, from "
                    f"token {position} on, which rank {rank} computed; {advice}",
                    rank=rank,
                    layer=index,
                )
    return NotFiniteError(
        "the logits of this prompt are not finite, and all keys and values are: they overflow behind those of the "
        f"last layer, on rank {partition.ranks - 1}; {advice}",
        rank=partition.ranks - 1,
    )


class _ChunkRun:
    """What happens in each layer while a chunk runs. Stamps as in `RankTimeline.of_stamps`."""

    def __init__(self, cache: RunaheadCache, links: Links, stamp: Callable[[], int], turn: Turn) -> None:
        self._position = {index: position for position, (index, _) in enumerate(cache.kv_layers)}
        self._links = links
        self._stamp = stamp
        self._turn = turn
        self._current: tuple[RunaheadLayer, int] | None = None

    def store_and_wait(
        self, layer: RunaheadLayer, index: int, keys: torch.Tensor | None, values: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache depth: the model's attention gets everything the chunk can see, once it is there."""
        start, end = layer.append(keys, values)
        self._hand_over(index)
        self._wait(layer, index)
        return layer.store.keys(start, end), layer.store.values(start, end)

    def store_own(
        self, layer: RunaheadLayer, index: int, keys: torch.Tensor | None, values: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention depth: the model's attention gets the chunk itself; `attend` fetches the prefix."""
        before = layer.get_seq_length()
        _, end = layer.append(keys, values)
        own = end - (layer.get_seq_length() - before)
        self._hand_over(index)
        self._current = (layer, index)
        return layer.store.keys(own, end), layer.store.values(own, end)

    def attend(
        self,
        module: torch.nn.Module | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attention of the chunk, prefix last."""
        assert self._current is not None
        window = self._current[0].kv.window
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = attention.attend_chunk(query, key, value, self._prefix, scale=scale, window=window)
        return output.transpose(1, 2).contiguous()

    def add_prefix_(self, output: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, scale: float) -> None:
        """The same, where the chunk's attention to itself has been computed."""
        assert self._current is not None
        window = self._current[0].kv.window
        attention.add_prefix_(output, lse, query, self._prefix(), scale=scale, window=window)

    def _prefix(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        assert self._current is not None
        layer, index = self._current
        self._current = None
        self._wait(layer, index)
        if layer.kept_prefix == 0:
            return None
        return layer.store.keys(0, layer.kept_prefix), layer.store.values(0, layer.kept_prefix)

    def _hand_over(self, index: int) -> None:
        self._turn.now(f"layer {index}")
        self._stamp()
        self._links.own_ready(self._position[index])

    def _wait(self, layer: RunaheadLayer, index: int) -> None:
        self._stamp()
        if layer.kept_prefix:
            self._links.wait_prefix(self._position[index])
        self._stamp()


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
