"""Short chunks whose layers are recorded once as CUDA graphs: the host launches one a layer, and never holds up.

What stands between two attentions is one graph for each layer: the MLP of the layer before it, and up to queries,
keys and values of its own. Then keys and values are handed over, and attention of the chunk to itself is another
graph, one for all layers. A prefix is of any length, so that attention to it is not recorded. A chunk is padded to
the next of a few sizes; no row sees the rows of padding behind it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.fused import ops
from kvr_partition.runtime.fused.layers import FusedAttention, FusedLayer, FusedMLP
from kvr_partition.runtime.kernels import attend, planning
from kvr_partition.runtime.rows import Place

AddPrefix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], None]
"""Folds a prefix into output and log-sum-exp of a chunk's attention to itself, given queries and scale."""

LONGEST = 2048
"""Tokens of the longest chunk that is recorded. Longer ones keep a device busy for longer than the host takes."""

STEP = 128
"""Sizes are its multiples. Kernels compute so many rows at once: padding to them costs little."""


def sizes(most: int) -> list[int]:
    """The sizes that are recorded for chunks of up to ``most`` tokens."""
    return list(range(STEP, min(LONGEST, size_for(most)) + 1, STEP))


def size_for(tokens: int) -> int:
    """The size that a chunk is padded to."""
    return -(-tokens // STEP) * STEP


def recordable(layers: Sequence[FusedLayer], chained: bool) -> bool:
    """Whether all that happens between attentions is known and the same for every chunk.

    Args:
        chained: whether each layer reads what the one before it returned, and none is left out.
    """
    shapes = set()
    for layer in layers:
        attention, mlp = layer.attention, layer.mlp
        if not isinstance(attention, FusedAttention) or not isinstance(mlp, FusedMLP):
            return False
        linears = (attention.output, *attention.projections, mlp.gate, mlp.up, mlp.down)
        if not all(linear is None or linear.plain for linear in linears):
            return False
        shapes.add((_query_width(layer), attention.kv_heads, attention.dim, attention.constants.get("scaling")))
    return chained and len(shapes) == 1


@dataclass
class _Static:
    """What graphs read and write, as long as the longest of them."""

    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    query: torch.Tensor
    kv: torch.Tensor

    @classmethod
    def of(cls, layers: Sequence[FusedLayer], like: torch.Tensor, rows: int) -> _Static:
        attention = _attention(layers[0])

        def zeros(columns: int) -> torch.Tensor:
            # Padding must be finite from the beginning: a product with nothing is no number.
            return torch.zeros((rows, columns), dtype=like.dtype, device=like.device)

        query, dim = _query_width(layers[0]), attention.dim
        return cls(
            zeros(layers[0].norms[0].module.weight.shape[0]),
            zeros(dim),
            zeros(dim),
            zeros(query),
            zeros(2 * attention.kv_heads * dim),
        )

    def heads(self, rows: torch.Tensor, dim: int) -> torch.Tensor:
        """Rows as attention has them, ``[1, heads, tokens, dim]``."""
        heads: torch.Tensor = rows.unflatten(1, (-1, dim)).transpose(0, 1)[None]
        return heads


def _attention(layer: FusedLayer) -> FusedAttention:
    assert isinstance(layer.attention, FusedAttention)
    return layer.attention


def _query_width(layer: FusedLayer) -> int:
    return int(_attention(layer).output.module.in_features)


@dataclass(frozen=True)
class _Size:
    """What was recorded for one size.

    Attributes:
        layers: a graph for each layer up to its attention, and one behind the last.
        attention: of a chunk to itself.
        attended, lse: what that makes, and what is put in its place where attention is not recorded.
    """

    layers: list[torch.cuda.CUDAGraph]
    attention: torch.cuda.CUDAGraph
    attended: torch.Tensor
    lse: torch.Tensor


@dataclass
class RecordedLayers:
    """The recorded layers of one model on one GPU.

    Attributes:
        layers: what is recorded.
        sizes: what was recorded for each size.
        seconds: how long recording took.
        nbytes: how much memory it took.
    """

    layers: list[FusedLayer]
    sizes: dict[int, _Size] = field(default_factory=dict)
    seconds: float = 0.0
    nbytes: int = 0
    _static: _Static | None = None
    _weights: list[tuple[dict[str, Any], str, torch.Tensor, int]] = field(default_factory=list)
    """Parameters that were recorded: those of its module, its name there, itself, and its address."""
    _pools: tuple[Any, Any] = (None, None)
    _used: torch.cuda.Event | None = None
    _for_mlp: torch.Tensor | None = None
    _runs: dict[int, _Run] = field(default_factory=dict)

    @torch.no_grad()
    def record(self, wanted: Sequence[int]) -> int:
        """Record those of `sizes` that are not there yet, in ascending order.

        Returns:
            How many graphs were made.
        """
        self._moved()
        missing = [size for size in wanted if size not in self.sizes]
        weight = self.layers[0].norms[0].module.weight
        if self._static is None:
            self._static = _Static.of(self.layers, weight, LONGEST)
            # Attention runs while what a layer keeps for its MLP is there, so its memory is another.
            self._pools = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
            self._weights = [
                (module._parameters, name, weight, weight.data_ptr())
                for layer in self.layers
                for module in layer.module.modules()
                for name, weight in module._parameters.items()
                if weight is not None
            ]
        if not missing:
            return 0
        torch.cuda.synchronize(weight.device)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(weight.device)[0]
        reserved = torch.cuda.memory_reserved(weight.device)
        began = time.perf_counter()
        stream = torch.cuda.Stream(weight.device)
        with torch.cuda.stream(stream), planning():
            # Kernels load and workspaces and plans are made, which a graph cannot hold.
            for size in missing:
                attended, _ = self._attend(size)
                for index in range(len(self.layers) + 1) if size == missing[-1] else (0, 1):
                    self._segment(index, size, attended)
            # The longest first: what it needs is enough for all.
            for size in reversed(missing):
                self.sizes[size] = self._recorded_size(size)
        torch.cuda.synchronize(weight.device)
        # What was needed to make kernels ready is not needed again.
        torch.cuda.empty_cache()
        self.seconds += time.perf_counter() - began
        # The driver keeps graphs where torch does not count; others may take and give memory meanwhile.
        self.nbytes += max(
            torch.cuda.memory_reserved(weight.device) - reserved,
            free - torch.cuda.mem_get_info(weight.device)[0],
        )
        return len(missing) * (len(self.layers) + 2)

    def _recorded_size(self, size: int) -> _Size:
        made: list[tuple[torch.Tensor, torch.Tensor]] = []
        attention = self._recorded(self._pools[1], lambda: made.append(self._attend(size)))
        attended, lse = made[0]
        layers = [
            self._recorded(self._pools[0], functools.partial(self._segment, index, size, attended))
            for index in range(len(self.layers) + 1)
        ]
        return _Size(layers, attention, attended, lse)

    def _recorded(self, pool: Any, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return graph

    def _segment(self, index: int, size: int, attended: torch.Tensor) -> None:
        """Behind attention of the layer before, and up to attention of this one."""
        static = self._static
        assert static is not None
        hidden = static.hidden[:size]
        if index:
            self.layers[index - 1].behind(hidden, hidden[None].shape, self._for_mlp, attended)
        if index == len(self.layers):
            return
        layer = self.layers[index]
        normed, self._for_mlp = layer.before(hidden, hidden[None].shape)
        attention = _attention(layer)
        place = Place.of(0, static.kv[:size], attention.kv_heads * attention.dim)
        query = attention.project(normed, static.cos[:size], static.sin[:size], [place], static.query[:size])
        assert query.data_ptr() == static.query.data_ptr()

    def _attend(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of a chunk to itself: the same for every layer, since all read and write the same rows.

        Returns:
            ``[tokens, width]``, and the log-sum-exp ``[1, heads, tokens]``.
        """
        static = self._static
        assert static is not None
        dim = _attention(self.layers[0]).dim
        query, kv = static.heads(static.query[:size], dim), static.kv[:size]
        key, value = (static.heads(half, dim) for half in kv.chunk(2, dim=1))
        output, lse = attend(query, key, value, scale=self.scale, causal=True)
        return output.transpose(1, 2).reshape(size, -1), lse

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        attention = _attention(self.layers[0])
        return float(attention.constants.get("scaling") or attention.dim**-0.5)

    def fit(self, tokens: int) -> int | None:
        """The recorded size for a chunk; None where there is none, or where weights have moved since."""
        size = size_for(tokens)
        return None if size not in self.sizes or self._moved() else size

    def _moved(self) -> bool:
        """Whether weights are elsewhere than when they were recorded; then nothing that was is kept."""
        if self._static is None or all(
            of.get(name) is weight and weight.data_ptr() == address for of, name, weight, address in self._weights
        ):
            return False
        torch.cuda.synchronize(self._static.hidden.device)  # a run may be under way
        self.sizes.clear()
        self._runs.clear()
        self._weights.clear()
        self._static = None
        return True

    def forwards(self, size: int, add_prefix: AddPrefix | None) -> list[tuple[Any, Callable[..., Any]]]:
        """What stands in for the ``forward`` of each layer in a run over a chunk padded to ``size``.

        Args:
            add_prefix: as in `running`.
        """
        run = self._runs.get(size)
        if run is None:
            assert self._static is not None
            run = self._runs[size] = _Run(self, size, self._static)
            run.forwards = [(layer.module, _bound(run, index, layer)) for index, layer in enumerate(self.layers)]
        run.add_prefix = add_prefix
        return run.forwards

    def finished(self, size: int) -> None:
        """A run over a chunk of this size has ended, well or not; what it was given is let go of."""
        run = self._runs.get(size)
        if run is not None:
            run.add_prefix = None
            # Whoever comes next waits for what was enqueued, on whatever stream.
            self._used = torch.cuda.current_stream().record_event()


def _bound(run: _Run, index: int, layer: FusedLayer) -> Callable[..., Any]:
    def forward(hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        hidden = run.layer(index, layer, hidden_states, layer.named(args, given))
        return (hidden, None) if layer.returns_tuple else hidden

    return forward


@dataclass
class _Run:
    """One chunk through the graphs."""

    by: RecordedLayers
    size: int
    static: _Static
    add_prefix: AddPrefix | None = None
    hidden: torch.Tensor | None = None
    _views: tuple[torch.Tensor, ...] = ()
    """Queries, what attention makes of them, and its log-sum-exp: of every layer the same, and made once."""
    forwards: list[tuple[Any, Callable[..., Any]]] = field(default_factory=list)

    def layer(self, index: int, layer: FusedLayer, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        static, recorded = self.static, self.by.sizes[self.size]
        tokens = hidden.shape[1]
        if index == 0:
            self._begin(hidden, given["position_embeddings"])
        else:
            assert hidden is self.hidden, "a layer reads something else than the one before it returned"
        recorded.layers[index].replay()
        attention = _attention(layer)
        cache: RunaheadCache = given[layer.cache]
        for place in cache.place(attention.index, tokens):
            place.rows.copy_(static.kv[place.first : place.last])
        window = cache.layers[attention.index].kv.window  # type: ignore[union-attr]
        query, attended, lse = self._views
        if self.add_prefix is not None and (window is None or self.size <= window):
            cache.put(attention.index)
            recorded.attention.replay()
            self.add_prefix(attended, lse, query, self.by.scale)
        else:
            keys, values = cache.placed(attention.index)
            mask = given.get("attention_mask")
            recorded.attended[:tokens].copy_(attention.attend(query, keys, values, mask, given))
        if index == len(self.by.layers) - 1:
            recorded.layers[-1].replay()
        assert self.hidden is not None
        return self.hidden

    def _begin(self, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> None:
        static, tokens = self.static, hidden.shape[1]
        if self.by._used is not None:
            # A run on another stream may not be through.
            torch.cuda.current_stream().wait_event(self.by._used)
        static.hidden[:tokens].copy_(hidden[0])
        static.cos[:tokens].copy_(angles[0].reshape(-1, angles[0].shape[-1]))
        static.sin[:tokens].copy_(angles[1].reshape(-1, angles[1].shape[-1]))
        self.hidden = static.hidden[:tokens][None]
        recorded, dim = self.by.sizes[self.size], _attention(self.by.layers[0]).dim
        self._views = (
            static.heads(static.query[:tokens], dim),
            static.heads(recorded.attended[:tokens], dim),
            recorded.lse[:, :, :tokens],
        )


def can_record(device: torch.device) -> bool:
    """Whether launches can be recorded on a device at all."""
    return device.type == "cuda" and not ops.missing_kernels(device)
