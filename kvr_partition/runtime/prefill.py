"""prefill(): one rank's part of a KV-Runahead prefill."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers.cache_utils import Cache

from kvr_partition.errors import PartitionError
from kvr_partition.partition import Partition, whole
from kvr_partition.predictor import PartitionPredictor
from kvr_partition.runtime.agreement import Turn, agreement_of
from kvr_partition.runtime.cache import check_past, held_states
from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.decoding import Greedy
from kvr_partition.runtime.digests import past_fingerprint, prompt_digest
from kvr_partition.runtime.execution import on_device
from kvr_partition.runtime.fused import FusedModel, Layers, chosen_layers
from kvr_partition.runtime.links.group import link_setup
from kvr_partition.runtime.links.plan import NO_LIMITS, AnyTopology, LinkLimits, check_topology
from kvr_partition.runtime.padding import Padding, read_padding
from kvr_partition.runtime.positions import check_context
from kvr_partition.runtime.replacing import exclusively
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.support import Depth, check_model, check_tokens, probe, vocabulary
from kvr_partition.table import PartitionTable


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
        # Links go by the current stream, which is that of the model only on the model's device.
        stack.enter_context(on_device(plan.input_ids.device))
        turn.agree(
            "kvr",
            model,
            plan.input_ids,
            plan.prompt,
            sizes=plan.partition.sizes,
            past=plan.partition.past,
            past_held=plan.past_held,
            topology=topology,
            limits=limits,
        )
        return _carried_out(model, plan, turn, depth, reserve, topology, limits, past)


def _carried_out(
    model: Any,
    plan: _Plan,
    turn: Turn,
    depth: Depth,
    reserve: int,
    topology: AnyTopology,
    limits: LinkLimits,
    past: Cache | None,
) -> PrefillResult:
    """This rank's part of what all ranks have agreed on."""
    split, rank, device = plan.partition, plan.rank, plan.input_ids.device
    chunk_ids = plan.input_ids[:, split.starts[rank] - split.past : split.ends[rank] - split.past]
    room = reserve if rank == split.ranks - 1 else 0
    # Connecting takes all ranks: before anything that may fail on one of them.
    setup = link_setup(turn, device)
    chosen = setup.topology(topology)
    setup.connect(turn, device, chosen)
    cache = chunk_cache(
        model, chunk_ids, prefix=split.starts[rank], reserve=room, past=past, execution=setup.execution
    )
    links = setup.links(split, cache, device, turn, chosen, limits)
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
            choose=plan.greedy.choose,
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
    """The digest of a prompt whose tokens a model planner.

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
    planner: PartitionTable | PartitionPredictor, context: int, ranks: int, past: int = 0
) -> Partition:
    """What a table or predictor says about a prompt; the whole prompt where there is one rank.

    Raises:
        OutOfRangeError: it does not know.
    """
    if ranks == 1:
        return Partition((context,), past)
    if isinstance(planner, PartitionTable):
        return planner.lookup(context, ranks=ranks, past=past).partition
    return planner.predict(context, ranks=ranks, past=past).partition


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
