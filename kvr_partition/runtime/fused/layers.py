"""A decoder layer put together from fused parts, and from the model's own where those are not known.

Rows are ``[tokens, width]``; the prompts of a batch stand one after the other. Residual sums are part of the
product before them, and keys and values are computed where the cache keeps them.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.fused import ops
from kvr_partition.runtime.kernels import query_rows
from kvr_partition.runtime.rows import Place

MLP_ROWS = 16384
"""Rows that go through an MLP together: its inner activations, several times as wide as a layer, never take more.

A slice whose tiles are no multiple of a GPU's SMs leaves some of them idle, and short slices do so more often:
on an H100, slices of up to 4,096 rows take 2% less to 12% more time for 4,224 rows and more
(`benchmarks/mlp_slices.py`, `data/h100-sxm/mlp-slices.json`)."""

_ROUNDING = 128
"""Kernels compute so many rows at once."""


def slices(rows: int) -> list[tuple[int, int]]:
    """Runs ``(start, end)`` of about equal length, of no more than `MLP_ROWS` rows each."""
    count = max(1, -(-rows // MLP_ROWS))
    step = math.ceil(rows / count / _ROUNDING) * _ROUNDING
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection: by its weight where it is nothing but a product, else by calling it.

    Attributes:
        module: the model's own.
        plain: whether calling it does nothing else than the product.
    """

    module: Any
    plain: bool

    def of(self, rows: torch.Tensor, to: torch.Tensor | None = None) -> torch.Tensor:
        """The projection of rows, written to ``to`` where that is given."""
        if self.plain:
            return ops.product(rows, self.module.weight, self.module.bias, to)
        found: torch.Tensor = self.module(rows[None])[0]
        return found if to is None else to.copy_(found)

    def of_queries(self, rows: torch.Tensor) -> torch.Tensor:
        """The same, with memory behind it for as many rows as attention may pad it to."""
        if not self.plain:
            return self.of(rows)
        width = self.module.weight.shape[0]
        return self.of(rows, rows.new_empty((query_rows(rows.shape[0]), width))[: rows.shape[0]])

    def add_to_(self, residual: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the projection of rows to a residual."""
        if self.plain:
            ops.add_product_(residual, rows, self.module.weight, self.module.bias)
        else:
            residual.add_(self.module(rows[None])[0])


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm: as one kernel where it is an RMS norm with this epsilon, else the model's own."""

    module: Any
    epsilon: float | None

    def __call__(self, rows: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
        """Normed rows; the model's own is given them as ``[batch, tokens, width]``, of this shape."""
        if self.epsilon is not None:
            return ops.rms_norm(rows, self.module.weight, self.epsilon)
        found: torch.Tensor = self.module(rows[None] if shape is None else rows.view(shape))
        # A norm that does nothing gives back the residual itself, which is written to.
        same = found.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
        return (found.clone() if same else found).view(rows.shape)


@dataclass(frozen=True, slots=True)
class FusedMLP:
    """An MLP whose activation is known.

    Attributes:
        gate: None where there is no gate.
        up, down: into the inner width and out of it.
        joined: whether ``up`` makes the gate as well, in its first half.
        activation: a key of `ops.ACTIVATIONS`.
    """

    gate: Linear | None
    up: Linear
    down: Linear
    joined: bool
    activation: str

    def add_to_(self, residual: torch.Tensor, rows: torch.Tensor) -> None:
        """Add what the MLP makes of rows to a residual."""
        if self.joined:
            gate, up = self.up.of(rows).chunk(2, dim=-1)
            inner = ops.gated(gate.contiguous(), up.contiguous(), self.activation)
        elif self.gate is None:
            inner = ops.ACTIVATIONS[self.activation](self.up.of(rows))
        else:
            inner = ops.gated(self.gate.of(rows), self.up.of(rows), self.activation)
        self.down.add_to_(residual, inner)


@dataclass(frozen=True, slots=True)
class OwnMLP:
    """The model's own MLP, or its experts."""

    module: Any

    def add_to_(self, residual: torch.Tensor, rows: torch.Tensor, shape: torch.Size) -> None:
        """Add what it makes of rows, as ``[batch, tokens, width]`` of this shape, to a residual."""
        residual.add_(self.module(rows.view(shape)).view(residual.shape))


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """Attention whose projections and rotary embedding are known, up to the attention itself and after it.

    Attributes:
        module: the model's own.
        index: which layer of the cache it has.
        projections: of queries, keys and values; or one that makes them all, in that order.
        output: what comes after attention.
        dim: size of a head.
        kv_heads: heads of keys and values.
        norms: RMS norms over heads of queries and keys before they are rotated, and their epsilon.
        route: how the module attends, see `ModelSupport`.
        constants: what it gives to transformers' attention interface, the same for every call.
        passed_on: names of what it passes on to it from what its layer was given.
    """

    module: Any
    index: int
    projections: tuple[Linear, ...]
    output: Linear
    dim: int
    kv_heads: int
    norms: tuple[Any, Any, float] | None
    route: Literal["interface", "calls"]
    constants: dict[str, Any]
    passed_on: tuple[str, ...]

    def project(
        self,
        rows: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        places: Sequence[Place],
        to_query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Put keys and values of all rows in their places.

        Returns:
            The queries, ``[rows, heads, dim]``, in ``to_query`` where that is given.
        """
        width = self.kv_heads * self.dim
        values: torch.Tensor | None = None
        if len(self.projections) == 1:
            joined = self.projections[0].of_queries(rows)
            query, key, values = joined[:, : -2 * width], joined[:, -2 * width : -width], joined[:, -width:]
            query = query if to_query is None else to_query.copy_(query)
        else:
            first = self.projections[0]
            query = first.of_queries(rows) if to_query is None else first.of(rows, to_query)
            key = self.projections[1].of(rows)
        heads: torch.Tensor = query.unflatten(1, (-1, self.dim))
        key = key.unflatten(1, (-1, self.dim))
        norms = None
        if self.norms is not None:
            norms = self.norms[0].weight, self.norms[1].weight, self.norms[2]
        for place in places:
            low, high = place.first, place.last
            if values is None:
                self.projections[2].of(rows[low:high], to=place.values)
            else:
                place.values.copy_(values[low:high])
            some = slice(low, high) if cos.shape[0] == rows.shape[0] else slice(None)
            ops.rotate_(
                heads[low:high],
                key[low:high],
                place.keys.unflatten(1, (-1, self.dim)),
                cos[some],
                sin[some],
                norms,
            )
        return heads

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, given: dict[str, Any]
    ) -> torch.Tensor:
        """What the module's own attention makes of queries ``[batch, heads, tokens, dim]``, as rows."""
        if self.route == "calls":
            output: torch.Tensor = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None and query.shape[2] > 1
            ).transpose(1, 2)
        else:
            name = self.module.config._attn_implementation
            # Eager attention is each family's own, and stands beside its modules.
            beside = sys.modules[type(self.module).__module__]
            attention = ALL_ATTENTION_FUNCTIONS.get(name) or beside.eager_attention_forward
            passed = {name: given[name] for name in self.passed_on if name in given}
            output = attention(self.module, query, key, value, mask, **self.constants, **passed)[0]
        rows: torch.Tensor = output.reshape(-1, query.shape[1] * value.shape[3])
        return rows


@dataclass(frozen=True, slots=True)
class OwnAttention:
    """The model's own attention, called as its layer calls it.

    Attributes:
        module: the model's own.
        hidden: name under which it takes the hidden states; None where they come first.
        names: what it is given besides, by names that its layer has them under.
    """

    module: Any
    hidden: str | None
    names: tuple[str, ...]

    def __call__(self, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        """Attention of hidden states ``[batch, tokens, width]``, behind its output projection."""
        passed = {name: given[name] for name in self.names if name in given}
        named = {} if self.hidden is None else {self.hidden: hidden}
        found = self.module(*([] if named else [hidden]), **named, **passed)
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return output


@dataclass(slots=True)
class FusedLayer:
    """A decoder layer whose order of norms, attention, MLP and residual sums is known.

    Attributes:
        module: the model's own.
        norms: before attention and before the MLP; one for both where they are the same.
        attention, mlp: its parts.
        own_attention: the model's own.
        parallel: whether the MLP reads what attention reads, and not what attention made.
        cache: name under which the layer is given the cache.
        returns_tuple: whether the layer returns its hidden states in a tuple.
        copies: whether its input is not written to, because others may keep it: the first layer's, which it has
            from the model itself, and those of layers whose outputs somebody keeps.
    """

    module: Any
    norms: tuple[Norm, Norm]
    attention: FusedAttention | OwnAttention
    own_attention: OwnAttention
    mlp: FusedMLP | OwnMLP
    parallel: bool
    cache: str
    returns_tuple: bool
    copies: bool
    _names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._names = tuple(inspect.signature(type(self.module).forward).parameters)[2:]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        """What stands in for the module's own ``forward``."""
        given = self.named(args, given)
        shape = hidden_states.shape
        rows = hidden_states.reshape(-1, shape[-1])
        if self.copies:
            rows = rows.clone()
        normed, for_mlp = self.before(rows, shape)
        self.behind(rows, shape, for_mlp, *self._attended(normed, shape, given))
        hidden = rows.view(shape)
        return (hidden, None) if self.returns_tuple else hidden

    def named(self, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
        """What the layer was given besides hidden states, by name."""
        return {**dict(zip(self._names, args, strict=False)), **given} if args else given

    def before(self, rows: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What attention reads; and what the MLP reads, where that is known before attention."""
        normed = self.norms[0](rows, shape)
        if not self.parallel:
            return normed, None
        return normed, normed if self.norms[1] is self.norms[0] else self.norms[1](rows, shape)

    def _attended(
        self, normed: torch.Tensor, shape: torch.Size, given: dict[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Attention of rows before its output projection; or after it, where that is the module's own."""
        attention = self.attention
        if isinstance(attention, OwnAttention):
            return None, attention(normed.view(shape), given)
        batch, tokens = shape[0], shape[1]
        cos, sin = (angle.reshape(-1, angle.shape[-1]) for angle in given["position_embeddings"])
        cache = given[self.cache]
        places = cache.place(attention.index, tokens) if isinstance(cache, RunaheadCache) and batch == 1 else None
        if places is not None:
            query = attention.project(normed, cos, sin, places)
            keys, values = cache.placed(attention.index)
        else:
            beside = normed.new_empty((normed.shape[0], 2 * attention.kv_heads * attention.dim))
            query = attention.project(normed, cos, sin, [Place.of(0, beside, beside.shape[1] // 2)])
            key, value = (
                half.unflatten(1, (-1, attention.dim)).unflatten(0, (batch, tokens)).transpose(1, 2)
                for half in beside.chunk(2, dim=1)
            )
            keys, values = cache.update(key, value, attention.index)
        query = query.unflatten(0, (batch, tokens)).transpose(1, 2)
        return attention.attend(query, keys, values, given.get("attention_mask"), given), None

    def behind(
        self,
        rows: torch.Tensor,
        shape: torch.Size,
        for_mlp: torch.Tensor | None,
        attended: torch.Tensor | None,
        output: torch.Tensor | None = None,
    ) -> None:
        """Everything behind attention, in place in the residual ``rows``.

        Args:
            shape: of the hidden states that the rows are of.
            for_mlp: what the MLP reads; None where it reads the norm of what attention made.
            attended: what attention's output projection is to read; or None.
            output: what came out of that.
        """
        if output is not None:
            rows.add_(output.view(rows.shape))
        else:
            assert isinstance(self.attention, FusedAttention)
            assert attended is not None
            self.attention.output.add_to_(rows, attended)
        if isinstance(self.mlp, OwnMLP):
            self.mlp.add_to_(rows, self.norms[1](rows, shape) if for_mlp is None else for_mlp, shape)
            return
        # Some rows at a time, so that long chunks fit.
        for low, high in slices(rows.shape[0]):
            some = rows[low:high]
            self.mlp.add_to_(some, self.norms[1](some) if for_mlp is None else for_mlp[low:high])
