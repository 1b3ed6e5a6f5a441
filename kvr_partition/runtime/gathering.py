"""What KV-Runahead is compared with: one rank alone, and methods that gather the KV of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kvr_partition.errors import PartitionError, UnsupportedError
from kvr_partition.methods import GatheringMethod
from kvr_partition.partition import Partition
from kvr_partition.runtime.agreement import agreement_of, is_link_error
from kvr_partition.runtime.attention import attend_chunk
from kvr_partition.runtime.cache import RunaheadCache, RunaheadLayer
from kvr_partition.runtime.chunk import not_finite
from kvr_partition.runtime.decoding import Greedy, check_generation, top_is_finite
from kvr_partition.runtime.execution import EAGER, Execution
from kvr_partition.runtime.fused import Layers, chosen_layers, running
from kvr_partition.runtime.gather import Gather, GroupGather, Runs
from kvr_partition.runtime.links.plan import NO_LIMITS, LinkLimits, visible_prefix
from kvr_partition.runtime.positions import check_context, text_config
from kvr_partition.runtime.prefill import check_ids, read_prompt
from kvr_partition.runtime.replacing import exclusively, own_attention, replaced_attention
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.rows import LayerKV, Place
from kvr_partition.runtime.support import ModelSupport, first_token, forward, probe
from kvr_partition.timeline import LayerTimes, RankTimeline


def tsp(
    model: Any,
    input_ids: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    causal: bool = False,
    layers: Layers = "auto",
    limits: LinkLimits = NO_LIMITS,
    agree: bool = True,
) -> PrefillResult:
    """Tensor-and-sequence-parallel prefill, the paper's baseline, on all ranks of a group.

    Even chunks; in every layer each rank gathers the keys and values of all ranks, then attends its
    chunk to the whole context under a dense causal mask, through the model's stock attention.

    Args:
        input_ids: the whole prompt on every rank, ``[batch, context]``.
        causal: attend to what a token can see only, through the same kernels as KV-Runahead, rather than
            to everything under a mask. Not in the paper.
        layers: as in `prefill`.
        limits: what the links are held to.
        agree: as in `prefill`.

    Raises:
        RankError: ranks disagree, or one failed.
        PartitionError: a context shorter than the group has ranks, or beyond the model's positions.
        UnsupportedError: ``causal`` for a model whose attention cannot be replaced.
    """
    method: GatheringMethod = "tsp-causal" if causal else "tsp"
    return _together(model, input_ids, method, group, layers, limits, agree)


def zigzag(
    model: Any,
    input_ids: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    layers: Layers = "auto",
    limits: LinkLimits = NO_LIMITS,
    agree: bool = True,
) -> PrefillResult:
    """Zigzag context parallelism on all ranks of a group: what serving engines do today.

    The prompt is cut into twice as many even chunks as there are ranks; rank i takes the i-th chunk from
    the front and the i-th from the back, so all have equal work. In every layer each rank gathers the
    keys and values of all ranks, then attends to what its tokens can see. Rank 0 has the prompt's last
    token and so the first new one.

    Args:
        input_ids: the whole prompt on every rank, ``[batch, context]``.
        layers: as in `prefill`.
        limits: what the links are held to.
        agree: as in `prefill`.

    Raises:
        RankError: ranks disagree, or one failed.
        PartitionError: fewer tokens than twice the ranks, or more than the model has positions.
        UnsupportedError: a model whose attention cannot be replaced, or with a sliding window.
    """
    return _together(model, input_ids, "zigzag", group, layers, limits, agree)


def _together(
    model: Any,
    input_ids: torch.Tensor,
    method: GatheringMethod,
    group: dist.ProcessGroup | None,
    layers: Layers,
    limits: LinkLimits,
    agree: bool,
) -> PrefillResult:
    """A gathering method on all ranks of a group, in one turn."""
    with ExitStack() as stack:
        turn = stack.enter_context(agreement_of(group, agree).turn(agree))
        assert turn.of is not None
        turn.checked(lambda: stack.enter_context(exclusively(model)))
        ranks = turn.of.ranks
        fused = turn.checked(lambda: chosen_layers(model, layers))
        prompt = turn.checked(lambda: _checked_prompt(model, input_ids, method, ranks))
        turn.agree(method, model, input_ids, prompt, limits=limits)
        gather = GroupGather(turn.of.collectives(input_ids.device), limits)
        try:
            return gathered(model, input_ids, method, gather, fused)
        except RuntimeError as error:
            if is_link_error(error):
                raise turn.explain(None, error) from error
            raise


def _checked_prompt(model: Any, input_ids: torch.Tensor, method: GatheringMethod, ranks: int) -> int:
    """The digest of a prompt that can be read so."""
    _check(model, input_ids, method, ranks)
    return read_prompt(model, input_ids)


def _check(model: Any, input_ids: torch.Tensor, method: GatheringMethod, ranks: int) -> None:
    check_ids(model, input_ids)
    check_context(model.config, input_ids.shape[1])
    support = probe(model)
    support.check_tokens(input_ids.shape[1])
    check_gathering(support, method)
    parts_of(method, input_ids.shape[1], ranks)
    check_generation(model.generation_config)


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive tokens that a rank computes, and where KV lies in the gathered rows.

    Attributes:
        start, end: absolute positions of the tokens.
        rows: where their own KV goes, the first row.
        prefix: rows of everything before them.
    """

    start: int
    end: int
    rows: int
    prefix: tuple[int, int]

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return self.end - self.start


def parts_of(method: GatheringMethod, context: int, ranks: int) -> list[list[Part]]:
    """The parts of each rank, in the order in which the rank reads them.

    Zigzag's rows hold the chunks from the back first, then those from the front, each in the order of
    ranks: so one contiguous run of rows is what one collective fills, and everything a chunk sees before
    it is one contiguous run as well. Attention does not mind the order.

    Raises:
        PartitionError: too few tokens.
    """
    if method != "zigzag":
        even = Partition.even(context, ranks)
        return [[Part(start, end, start, (0, start))] for start, end in zip(even.starts, even.ends, strict=True)]
    if context < 2 * ranks:
        raise PartitionError(f"zigzag on {ranks} ranks needs at least {2 * ranks} tokens; got {context}")
    even = Partition.even(context, 2 * ranks)
    back = [2 * ranks - 1 - rank for rank in range(ranks)]
    behind = sum(even.sizes[chunk] for chunk in back)
    parts, at = [], 0
    for rank in range(ranks):
        front = Part(
            even.starts[rank], even.ends[rank], behind + even.starts[rank], (behind, behind + even.starts[rank])
        )
        size = even.sizes[back[rank]]
        # What the chunk from the back sees: the chunks of later ranks from the back, and all from the front.
        tail = Part(even.starts[back[rank]], even.ends[back[rank]], at, (at + size, context))
        parts.append([front, tail])
        at += size
    return parts


@torch.no_grad()
def gathered(
    model: Any,
    input_ids: torch.Tensor,
    method: GatheringMethod,
    gather: Gather,
    layers: Layers = "auto",
    execution: Execution = EAGER,
) -> PrefillResult:
    """One rank's part of a prefill that gathers the KV of all ranks in every layer.

    Args:
        input_ids: the whole prompt, ``[batch, context]``.
        gather: brings the other ranks' rows.
        layers: as in `prefill`.
        execution: at once, or to be recorded.

    Raises:
        PartitionError: too few tokens for so many ranks, or too many for the model.
        UnsupportedError: the method needs attention that this model does not have.
    """
    _check(model, input_ids, method, gather.ranks)
    support = probe(model)
    parts = parts_of(method, input_ids.shape[1], gather.ranks)
    clock = execution.clock(input_ids.device)
    clock.stamp()
    run = _GatherRun(model, input_ids, parts, gather, clock.stamp, execution)
    own = parts[gather.rank]
    chunk_ids = torch.cat([input_ids[:, part.start : part.end] for part in own], dim=1)
    extra: dict[str, Any] = {}
    if method == "zigzag":
        positions = [torch.arange(part.start, part.end, device=input_ids.device) for part in own]
        extra["position_ids"] = torch.cat(positions)[None].expand(input_ids.shape[0], -1)
    if method == "tsp" and _has_alibi(model):
        # Models with ALiBi take the number of keys from the attention mask, or else assume none come later.
        extra["attention_mask"] = torch.ones_like(input_ids)
    eager = execution.eager and input_ids.shape[0] == 1
    with ExitStack() as stack:
        stack.enter_context(running(model, layers, chunk_ids.shape[1] if eager else None))
        if method == "tsp":
            stack.enter_context(own_attention(model))
        else:
            extra.update(stack.enter_context(replaced_attention(model, support.route, run.attend)))
        output = forward(model, chunk_ids, run.cache, **extra)
    run.cache.prefilling = None
    has_token = own[-1].end == input_ids.shape[1]
    logits, token, top = None, None, None
    if has_token:
        greedy = Greedy.under(model.generation_config, input_ids)
        logits, token, top = first_token(output, greedy.choose, execution.to_host)
    clock.stamp()
    if top is not None and execution.to_host and not top_is_finite(top):
        raise not_finite(run.cache, _computed_in_order(parts))
    kv_layers = len(run.cache.kv_layers)
    return PrefillResult(
        rank=gather.rank,
        ranks=gather.ranks,
        first_token=token,
        logits=logits,
        cache=run.cache,
        kv_bytes=gather.sent_bytes,
        _timeline=lambda: _timeline(clock.seconds(), kv_layers),
        context=input_ids.shape[1],
    )


def _computed_in_order(parts: list[list[Part]]) -> Partition:
    """Where the rows of each rank end, for naming a row's rank. Zigzag's rows do not lie in order of ranks."""
    sizes = [sum(part.tokens for part in of_rank) for of_rank in parts]
    return Partition(sizes)


def check_gathering(support: ModelSupport, method: GatheringMethod) -> None:
    """Refuse a method that cannot be exact for a model.

    Raises:
        UnsupportedError: it cannot.
    """
    if method == "tsp":
        return
    if not support.attention_depth:
        raise UnsupportedError(f"{method} needs the model's attention replaced: {support.reason}")
    if method == "zigzag" and any(layer is not None and layer.window is not None for layer in support.layers):
        raise UnsupportedError("zigzag is there for full attention only; this model has a sliding window")


def _has_alibi(model: Any) -> bool:
    config = text_config(model)
    return bool(getattr(config, "alibi", False)) or config.model_type == "bloom"


class _GatherLayer(RunaheadLayer):
    """A layer with room for the whole context, which the model sees from its chunk's position on."""

    def __init__(
        self,
        kv: LayerKV,
        context: int,
        start: int,
        input_ids: torch.Tensor,
        dtype: torch.dtype,
        empty: Callable[..., torch.Tensor],
    ) -> None:
        super().__init__(
            kv,
            batch=input_ids.shape[0],
            prefix=0,
            chunk=context,
            reserve=0,
            dtype=dtype,
            device=input_ids.device,
            empty=empty,
        )
        self.start = start
        self.context = context
        self.parts: Sequence[Part] = ()
        self.gathered = False

    def place(self, tokens: int) -> list[Place]:
        places, at = [], 0
        for part in self.parts:
            places.append(self.store.place(part.rows, part.rows + part.tokens, at))
            at += part.tokens
        return places

    def complete(self) -> tuple[int, int]:
        """All ranks' rows are in place: an ordinary layer from here on. Returns which rows those are."""
        self._length = self._filled = self.context
        self.gathered = True
        return 0, self.context

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Dense: the chunk is masked against the whole context, later tokens included.
        return super().get_mask_sizes(query_length) if self.gathered else (self.context, 0)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.gathered else self.start


class _GatherRun:
    """Gathers every layer's KV from all ranks, in place, and attends to what each part can see."""

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        parts: list[list[Part]],
        gather: Gather,
        stamp: Callable[[], int],
        execution: Execution,
    ) -> None:
        self._parts = parts[gather.rank]
        context, start = input_ids.shape[1], self._parts[0].start
        self.cache = RunaheadCache(
            [
                None if kv is None else _GatherLayer(kv, context, start, input_ids, model.dtype, execution.empty)
                for kv in probe(model).layers
            ]
        )
        self.cache.prefilling = self._gather
        for _, layer in self.cache.kv_layers:
            assert isinstance(layer, _GatherLayer)
            layer.parts = self._parts
        self._position = {index: position for position, (index, _) in enumerate(self.cache.kv_layers)}
        self._owned: list[Runs] = [[(part.rows, part.rows + part.tokens) for part in of_rank] for of_rank in parts]
        self._by = gather
        self._stamp = stamp
        self._layer: _GatherLayer | None = None

    def _gather(
        self, layer: _GatherLayer, index: int, keys: torch.Tensor | None, values: torch.Tensor | None
    ) -> tuple[int, int]:
        at = 0
        for part in self._parts if keys is not None and values is not None else ():
            until = at + part.tokens
            assert keys is not None
            assert values is not None
            layer.store.write(part.rows, keys[:, :, at:until], values[:, :, at:until])
            at = until
        self._stamp()
        self._by.gather(self._position[index], layer.store.rows, self._owned)
        self._stamp()
        self._layer = layer
        return layer.complete()

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
        """Attention of each part to itself and to everything before it, nothing else."""
        assert self._layer is not None
        store, window = self._layer.store, self._layer.kv.window
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        outputs, at = [], 0
        for part in self._parts:
            low, high = part.prefix
            low = high - visible_prefix(high - low, window)
            prefix = (store.keys(low, high), store.values(low, high)) if low < high else None
            outputs.append(
                attend_chunk(
                    query[:, :, at : at + part.tokens],
                    store.keys(part.rows, part.rows + part.tokens),
                    store.values(part.rows, part.rows + part.tokens),
                    lambda prefix=prefix: prefix,  # type: ignore[misc]
                    scale=scale,
                    window=window,
                ).transpose(1, 2)
            )
            at += part.tokens
        return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _timeline(seconds: list[float], layers: int) -> RankTimeline:
    times = []
    last = seconds[0]
    for position in range(layers):
        begins, ends = seconds[1 + 2 * position], seconds[2 + 2 * position]
        # Everyone gathers at once and nobody computes meanwhile: waiting and transfer are one.
        times.append(LayerTimes(begins - last, ends - begins, ends - begins))
        last = ends
    return RankTimeline(tuple(times), seconds[-1] - last)
