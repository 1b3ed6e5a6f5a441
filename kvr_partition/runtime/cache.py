"""RunaheadCache: the Hugging Face cache whose layers receive, hold and forward KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from kvr_partition.errors import PartitionError, UnsupportedError
from kvr_partition.runtime.execution import EAGER, Execution
from kvr_partition.runtime.links.plan import Slot, visible_prefix
from kvr_partition.runtime.rows import LayerKV, Place, TokenRows

# Newer transformers have a placeholder in the cache for a layer without KV of its own; older ones have
# no place for it at all, so that there none is ever needed.
DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)


class RunaheadLayer(CacheLayerMixin):
    """One layer's KV on one rank.

    Until the prefill has run it reports the prefix as already present: that is what makes positions and
    masks right while the prefix is still on its way. Afterwards it is an ordinary growing cache layer.
    """

    is_compileable = False

    def __init__(
        self,
        kv: LayerKV,
        *,
        batch: int,
        prefix: int,
        chunk: int,
        reserve: int,
        dtype: torch.dtype,
        device: torch.device,
        empty: Callable[..., torch.Tensor] = torch.empty,
        past: Any = None,
        in_place: bool = True,
    ) -> None:
        self.kv = kv
        self.is_sliding = kv.window is not None
        self.is_croppable = not self.is_sliding
        self.is_initialized = True
        self.kept_prefix = visible_prefix(prefix, kv.window)
        rows = self.kept_prefix + chunk + reserve
        if in_place and fits_in_place(past, rows):
            # Its rows are where they belong, and there is room behind them.
            self.store: TokenRows = past.store
            self.store.taken_from.append(self.kept_prefix)
        else:
            self.store = TokenRows(kv, batch, rows, dtype, device, empty)
            if past is not None:
                self._take_over(past, prefix)
        self._taken = len(self.store.taken_from)
        self._placed = 0
        self._length = prefix
        self._filled = self.kept_prefix
        self._visible = self.kept_prefix + chunk

    def _take_over(self, past: Any, prefix: int) -> None:
        """Copy what a chunk behind ``prefix`` tokens can see of an earlier cache's layer."""
        keys, values = held_states(past)
        seen = int(past.get_seq_length()) - (prefix - self.kept_prefix)
        if seen > 0:
            self.store.write(0, keys[:, :, -seen:], values[:, :, -seen:])

    def check_rows(self, writing: bool = False) -> None:
        """Refuse rows that another cache has gone on with in place since.

        Args:
            writing: whether rows behind those in use are about to be written.

        Raises:
            PartitionError: they hold another prompt's tokens, or are about to be taken from it.
        """
        later = self.store.taken_from[self._taken :]
        if later and (writing or min(later) < self._filled):
            raise PartitionError(
                "another prefill went on with the same past cache and has these rows now; decode from the latest "
                "result only, or give each prefill a past cache of its own"
            )

    @property
    def batch_size(self) -> int:
        """Prompts in the batch."""
        return self.store.batch

    @property
    def slot(self) -> Slot:
        """The rows that links fill and read during the prefill."""
        first, rows = self._length - self._filled, self.store.rows
        return Slot(rows if rows.shape[0] == self._visible else rows[: self._visible], first, self.kv.window)

    @property
    def filled(self) -> int:
        """Rows in use, from row 0."""
        return self._filled

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """Keys the next token can see, ``[batch, heads, tokens, dim]``, no copy."""
        return self.store.keys(self._filled - self._lookback(), self._filled)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """Values the next token can see, ``[batch, heads, tokens, dim]``, no copy."""
        return self.store.values(self._filled - self._lookback(), self._filled)

    def append(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> tuple[int, int]:
        """Store new tokens; returns the rows that these tokens can see, themselves included.

        Args:
            keys, values: ``[batch, heads, tokens, dim]``; None when they are in their `place` already.
        """
        lookback = self._lookback()
        start = self._filled
        if keys is None or values is None:
            new, self._placed = self._placed, 0
        else:
            new = keys.shape[-2]
            self._make_room(new)
            start = self._filled
            self.store.write(start, keys, values)
        self._filled += new
        self._length += new
        return start - lookback, self._filled

    def place(self, tokens: int) -> list[Place]:
        """Where keys and values of the next tokens are to be put, before they are appended."""
        self._make_room(tokens)
        self._placed = tokens
        return [self.store.place(self._filled, self._filled + tokens)]

    def _make_room(self, new: int) -> None:
        self.check_rows(writing=True)
        if self._filled + new > self.store.rows.shape[0]:
            self._grow(new, self._lookback())

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = self.append(key_states, value_states)
        return self.store.keys(start, end), self.store.values(start, end)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        lookback = self._lookback()
        return lookback + query_length, self._length - lookback

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self.kv.window if self.kv.window is not None else -1

    def reset(self) -> None:
        self._length = self._filled = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0 or -tokens_to_remove > self._length:
            raise ValueError(
                f"crop takes minus the tokens to remove, at most {self._length}; got {tokens_to_remove}"
            )
        if self.is_sliding and tokens_to_remove:
            raise RuntimeError("a sliding-window layer no longer has the tokens that a crop would bring back")
        self._length += tokens_to_remove
        self._filled += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._replace(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._replace(lambda states: states[indices, ...])

    def _lookback(self) -> int:
        """Stored tokens that the next token can see."""
        return min(self._filled, visible_prefix(self._length, self.kv.window))

    def _grow(self, new: int, lookback: int) -> None:
        """Make room for decoding, an eighth at a time, dropping rows that no query sees any more."""
        tokens = lookback + new + max(256, lookback // 8)
        keys, values = self.keys, self.values
        self.store = TokenRows(self.kv, self.store.batch, tokens, keys.dtype, keys.device)
        self._taken = 0
        self._filled = self.store.write(0, keys, values)

    def _replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        keys, values = change(self.keys), change(self.values)
        self.store = TokenRows(self.kv, keys.shape[0], self.store.rows.shape[0], keys.dtype, keys.device)
        self._taken = 0
        self._filled = self.store.write(0, keys, values)


def fits_in_place(past: Any, rows: int) -> bool:
    """Whether a layer of a past cache has room for so many rows, the first of which are where they belong."""
    return isinstance(past, RunaheadLayer) and not past.is_sliding and past.store.rows.shape[0] >= rows


def held_states(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that a cache layer holds, ``[batch, heads, tokens, dim]``, latest token last.

    Raises:
        UnsupportedError: a kind of layer that keeps them otherwise, or something else besides.
    """
    if isinstance(layer, RunaheadLayer):
        layer.check_rows()
    elif type(layer) in (StaticLayer, StaticSlidingWindowLayer):
        # Its tensors are as long as they may ever get; of a window they are turned once they are full.
        length = min(int(layer.get_seq_length()), layer.keys.shape[2])
        return layer.keys[:, :, :length], layer.values[:, :, :length]
    elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise UnsupportedError(
            f"a past cache with layers of type {type(layer).__name__} cannot be gone on with; "
            "use a DynamicCache, a StaticCache or the cache of an earlier prefill"
        )
    return layer.keys, layer.values


def check_past(past: Any, layers: Sequence[LayerKV | None], batch: int, dtype: torch.dtype) -> int:
    """Refuse a past cache that does not belong to a model, or cannot be read.

    Args:
        layers: what each layer of the model keeps, see `probe`.

    Returns:
        Tokens it holds.

    Raises:
        UnsupportedError: a kind of cache that cannot be read.
        PartitionError: another number of layers, heads, prompts or tokens than the model and the others have.
    """
    if not isinstance(past, Cache) or not isinstance(getattr(past, "layers", None), list):
        raise UnsupportedError(
            f"past must be a cache of transformers, with layers; got {type(past).__name__}; use a DynamicCache"
        )
    if getattr(past, "offloading", False):
        raise UnsupportedError("past keeps its layers on the host (offloading); use a DynamicCache without")
    if len(past.layers) < len(layers):
        raise PartitionError(f"past has {len(past.layers)} layers, and the model {len(layers)}")
    length = int(past.get_seq_length())
    if length == 0:
        return 0
    kept: list[Any] = past.layers
    for index, (layer, kv) in enumerate(zip(kept, layers, strict=False)):
        if kv is None:
            continue
        if int(layer.get_seq_length()) != length:
            raise PartitionError(
                f"layer {index} of past holds {int(layer.get_seq_length())} tokens, and layer 0 {length}"
            )
        keys, values = held_states(layer)
        found = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])
        wanted = (batch, kv.key_heads, kv.key_dim, kv.value_heads, kv.value_dim)
        if found != wanted:
            raise PartitionError(
                f"layer {index} of past has batch, heads and sizes {found}, and model and prompt {wanted}"
            )
        if keys.dtype != dtype:
            raise PartitionError(
                f"layer {index} of past is {keys.dtype}, and the model {dtype}; give both one dtype"
            )
        if keys.shape[2] < visible_prefix(length, kv.window):
            raise PartitionError(
                f"layer {index} of past has the last {keys.shape[2]} tokens only, and the model sees "
                f"{visible_prefix(length, kv.window)}"
            )
    return length


class RunaheadCache(Cache):
    """The KV of one rank, one `RunaheadLayer` for each layer of the model that keeps KV.

    Args:
        layers: one for each layer of the model, None for layers without KV of their own.

    Attributes:
        prefilling: while a prefill runs, called as ``(layer, index, keys, values)`` in place of the
            layer's own `RunaheadLayer.append`, with the same result; keys and values are None when they are in
            their place.
    """

    def __init__(self, layers: Sequence[RunaheadLayer | None]) -> None:
        self.prefilling: Callable[[Any, int, torch.Tensor | None, torch.Tensor | None], tuple[int, int]] | None = (
            None
        )
        super().__init__(layers=[DummyLayer() if layer is None else layer for layer in layers])

    @classmethod
    def allocate(
        cls,
        kv: Sequence[LayerKV | None],
        *,
        batch: int,
        prefix: int,
        chunk: int,
        reserve: int = 0,
        dtype: torch.dtype,
        device: torch.device,
        execution: Execution = EAGER,
        past: Cache | None = None,
    ) -> RunaheadCache:
        """Rows for exactly the tokens a rank can see, and for ``reserve`` tokens to decode.

        Args:
            execution: allocates the rows.
            past: a cache with the first tokens of the prefix. Their KV is copied from it; where it is a
                `RunaheadCache` with room for all that follows, its rows are gone on with in place.
        """
        before: Sequence[Any] = past.layers if past is not None and past.get_seq_length() else [None] * len(kv)
        in_place, sizes = [], []
        for one, layer in zip(kv, before, strict=False):
            rows = 0 if one is None else visible_prefix(prefix, one.window) + chunk + reserve
            stays = one is not None and fits_in_place(layer, rows) and execution.owns(layer.store.rows)
            in_place.append(stays)
            if one is not None and not stays:
                sizes.append(rows * one.entry(batch) * dtype.itemsize)
        empty = execution.empty if execution.room is None else execution.room(sizes)
        return cls(
            [
                None
                if one is None
                else RunaheadLayer(
                    one,
                    batch=batch,
                    prefix=prefix,
                    chunk=chunk,
                    reserve=reserve,
                    dtype=dtype,
                    device=device,
                    empty=empty,
                    past=before[index],
                    in_place=in_place[index],
                )
                for index, one in enumerate(kv)
            ]
        )

    @property
    def kv_layers(self) -> list[tuple[int, RunaheadLayer]]:
        """The layers that keep KV, with their index in the model."""
        return [(index, layer) for index, layer in enumerate(self.layers) if isinstance(layer, RunaheadLayer)]

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for KV on this rank."""
        return sum(layer.store.rows.nbytes for _, layer in self.kv_layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._seen(layer_idx, *self._stored(layer_idx, key_states, value_states))

    def place(self, layer_idx: int, tokens: int) -> list[Place]:
        """Where a layer's keys and values of the next tokens are to be put; of one prompt."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, RunaheadLayer)
        return layer.place(tokens)

    def placed(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What `update` returns, when keys and values have been put in their `place`."""
        return self._seen(layer_idx, *self.put(layer_idx))

    def put(self, layer_idx: int) -> tuple[int, int]:
        """The same as rows, for attention that needs no views of them."""
        return self._stored(layer_idx, None, None)

    def _seen(self, index: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        store = self.layers[index].store  # type: ignore[union-attr]
        return store.keys(start, end), store.values(start, end)

    def _stored(self, index: int, keys: torch.Tensor | None, values: torch.Tensor | None) -> tuple[int, int]:
        layer: Any = self.layers[index]
        if self.prefilling is not None:
            return self.prefilling(layer, index, keys, values)
        rows: tuple[int, int] = layer.append(keys, values)
        return rows
