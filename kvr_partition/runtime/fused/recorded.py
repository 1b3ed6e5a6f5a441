"""Short chunks whose layers are recorded once as CUDA graphs: the host launches one a layer, and never holds up.

What stands between two attentions is one graph for each layer: the MLP of the layer before it, and up to queries,
keys and values of its own. Attention and its output projection stay outside: attention depends on lengths, and
links are served there. A chunk is padded to the next of a few sizes; rows of padding compute what nobody reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvr_partition.runtime.cache import Place, RunaheadCache
from kvr_partition.runtime.fused import ops
from kvr_partition.runtime.fused.layers import FusedAttention, FusedLayer, FusedMLP

LONGEST = 2048
"""Tokens of the longest chunk that is recorded. Longer ones keep any device busy for longer than the host takes."""

STEP = 128
"""Sizes are its multiples. Kernels compute so many rows at once: padding to them costs little."""


def sizes(most: int) -> list[int]:
    """The sizes that are recorded for chunks of up to ``most`` tokens."""
    return list(range(STEP, min(LONGEST, -(-most // STEP) * STEP) + 1, STEP))


def recordable(layers: Sequence[FusedLayer], chained: bool) -> bool:
    """Whether all that happens between attentions is known, and nothing of it depends on data."""
    return (
        chained
        and bool(layers)
        and all(
            isinstance(layer.attention, FusedAttention)
            and isinstance(layer.mlp, FusedMLP)
            and layer.attention.output.plain
            and all(linear.plain for linear in layer.attention.projections)
            and all(one is None or one.plain for one in (layer.mlp.gate, layer.mlp.up, layer.mlp.down))
            for layer in layers
        )
    )


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
        attention = layers[0].attention
        assert isinstance(attention, FusedAttention)
        width = max(_query_width(layer) for layer in layers)
        entry = max(2 * one.kv_heads * one.dim for one in map(_attention, layers))

        def zeros(columns: int) -> torch.Tensor:
            # Padding must be finite from the beginning: a product with nothing is no number.
            return torch.zeros((rows, columns), dtype=like.dtype, device=like.device)

        hidden = layers[0].norms[0].module.weight.shape[0]
        return cls(zeros(hidden), zeros(attention.dim), zeros(attention.dim), zeros(width), zeros(entry))


def _attention(layer: FusedLayer) -> FusedAttention:
    assert isinstance(layer.attention, FusedAttention)
    return layer.attention


def _query_width(layer: FusedLayer) -> int:
    return int(_attention(layer).output.module.in_features)


@dataclass
class RecordedLayers:
    """The recorded layers of one model on one GPU.

    Attributes:
        layers: what is recorded.
        graphs: by size, one for each layer and one behind the last.
        seconds: how long recording took.
        nbytes: how much memory it took.
    """

    layers: list[FusedLayer]
    graphs: dict[int, list[torch.cuda.CUDAGraph]] = field(default_factory=dict)
    seconds: float = 0.0
    nbytes: int = 0
    _static: _Static | None = None
    _weights: tuple[int, ...] = ()
    _pool: Any = None
    _used: torch.cuda.Event | None = None
    _for_mlp: torch.Tensor | None = None
    _owners: list[tuple[Any, str]] = field(default_factory=list)

    @torch.no_grad()
    def record(self, most: int) -> int:
        """Record all `sizes` that are not there yet.

        Returns:
            How many graphs were made.
        """
        missing = [size for size in sizes(most) if size not in self.graphs]
        weight = self.layers[0].norms[0].module.weight
        if self._static is None:
            self._static = _Static.of(self.layers, weight, LONGEST)
            self._pool = torch.cuda.graph_pool_handle()
            self._weights = self._addresses()
        if not missing:
            return 0
        torch.cuda.synchronize(weight.device)
        free = torch.cuda.mem_get_info(weight.device)[0]
        began = time.perf_counter()
        stream = torch.cuda.Stream(weight.device)
        with torch.cuda.stream(stream):
            # Kernels load and workspaces are made, which a graph cannot hold; the longest size needs the most.
            for size in (missing[-1], missing[0]):
                for index in range(len(self.layers) + 1):
                    self._segment(index, size)
            for size in reversed(missing):
                self.graphs[size] = [self._recorded(index, size) for index in range(len(self.layers) + 1)]
        torch.cuda.synchronize(weight.device)
        self.seconds += time.perf_counter() - began
        self.nbytes += max(0, free - torch.cuda.mem_get_info(weight.device)[0])
        return len(missing) * (len(self.layers) + 1)

    def _recorded(self, index: int, size: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._segment(index, size)
        finally:
            graph.capture_end()
        return graph

    def _segment(self, index: int, size: int) -> None:
        """Behind attention's output projection of the layer before, and up to attention of this one."""
        static = self._static
        assert static is not None
        hidden = static.hidden[:size]
        if index:
            before = self.layers[index - 1]
            before.mlp_of(hidden, self._for_mlp)
        if index == len(self.layers):
            return
        layer = self.layers[index]
        normed, self._for_mlp = layer.before(hidden)
        attention = _attention(layer)
        width = attention.kv_heads * attention.dim
        place = Place.of(0, static.kv[:size, : 2 * width], width)
        query = attention.project(
            normed, static.cos[:size], static.sin[:size], [place], static.query[:size, : _query_width(layer)]
        )
        assert query.data_ptr() == static.query.data_ptr()

    def fit(self, tokens: int) -> int | None:
        """The recorded size for a chunk; None where there is none, or where weights have moved since."""
        size = -(-tokens // STEP) * STEP
        if size not in self.graphs:
            return None
        if self._weights != self._addresses():
            self.graphs.clear()
            self._static = None
            return None
        return size

    def _addresses(self) -> tuple[int, ...]:
        if not self._owners:
            self._owners = [
                (module._parameters, name)
                for layer in self.layers
                for module in layer.module.modules()
                for name in module._parameters
            ]
        return tuple(0 if of[name] is None else of[name].data_ptr() for of, name in self._owners)

    def forwards(self, size: int) -> list[tuple[Any, Callable[..., Any]]]:
        """What stands in for the ``forward`` of each layer in a run over a chunk padded to ``size``."""
        assert self._static is not None
        run = _Run(self, self.graphs[size], self._static)
        return [(layer.module, _bound(run, index, layer)) for index, layer in enumerate(self.layers)]


def _bound(run: _Run, index: int, layer: FusedLayer) -> Callable[..., Any]:
    def forward(hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        hidden = run.layer(index, layer, hidden_states, layer.named(args, given))
        return (hidden, None) if layer.returns_tuple else hidden

    return forward


@dataclass
class _Run:
    """One chunk through the graphs."""

    by: RecordedLayers
    graphs: list[torch.cuda.CUDAGraph]
    static: _Static
    hidden: torch.Tensor | None = None

    def layer(self, index: int, layer: FusedLayer, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        static = self.static
        tokens = hidden.shape[1]
        if index == 0:
            self._begin(hidden, given["position_embeddings"])
        else:
            assert hidden is self.hidden, "a layer reads something else than the one before it returned"
        self.graphs[index].replay()
        attention = _attention(layer)
        cache: RunaheadCache = given[layer.cache]
        width = 2 * attention.kv_heads * attention.dim
        for place in cache.place(attention.index, tokens):
            place.rows.copy_(static.kv[place.first : place.last, :width])
        keys, values = cache.placed(attention.index)
        query = static.query[:tokens, : _query_width(layer)].unflatten(1, (-1, attention.dim))
        attended = attention.attend(query.transpose(0, 1)[None], keys, values, given.get("attention_mask"), given)
        attention.output.add_to_(static.hidden[:tokens], attended)
        if index == len(self.by.layers) - 1:
            self.graphs[-1].replay()
            self.by._used = torch.cuda.current_stream().record_event()
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


def can_record(device: torch.device) -> bool:
    """Whether launches can be recorded on a device at all."""
    return device.type == "cuda" and not ops.missing_kernels(device)
