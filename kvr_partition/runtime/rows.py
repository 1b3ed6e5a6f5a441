"""Rows of KV: keys and values of a token side by side, and where a layer puts them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer keeps for one token: heads and head sizes of its keys and values, and its window.

    ``window`` counts the tokens a query sees, itself included; None when it sees all before it.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    window: int | None

    def entry(self, batch: int) -> int:
        """Elements that one token of the batch keeps: its keys, then its values."""
        return batch * (self.key_heads * self.key_dim + self.value_heads * self.value_dim)


@dataclass(frozen=True, slots=True)
class Place:
    """Where keys and values of some tokens of a chunk are kept, so that they can be computed there.

    Attributes:
        first, last: which tokens of the chunk, the last one excluded.
        rows: ``[tokens, entry]``, keys and values of a token together.
        keys, values: the same, ``[tokens, width]`` each.
    """

    first: int
    last: int
    rows: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, first: int, rows: torch.Tensor, keys_width: int) -> Place:
        """The place that these rows are, for the tokens of a chunk from ``first`` on."""
        return cls(first, first + rows.shape[0], rows, rows[:, :keys_width], rows[:, keys_width:])


class TokenRows:
    """Keys and values of one layer in one buffer ``[tokens, entry]``, keys and values of a token together.

    Token-major rows make every run of tokens one contiguous block, so a chunk is received straight into
    place and sent straight from it, keys and values in one message; attention gets strided views.
    """

    def __init__(
        self,
        kv: LayerKV,
        batch: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        empty: Callable[..., torch.Tensor] = torch.empty,
    ) -> None:
        self.kv = kv
        self.batch = batch
        self.taken_from: list[int] = []
        """Rows from which other caches have gone on in place, in that order."""
        self.rows = empty((tokens, kv.entry(batch)), dtype=dtype, device=device)
        self._split = batch * kv.key_heads * kv.key_dim

    def keys(self, start: int, end: int) -> torch.Tensor:
        """Keys of rows ``start`` to ``end`` as ``[batch, heads, tokens, dim]``, no copy."""
        return self._all_keys[:, :, start:end]

    def values(self, start: int, end: int) -> torch.Tensor:
        """Values of rows ``start`` to ``end`` as ``[batch, heads, tokens, dim]``, no copy."""
        return self._all_values[:, :, start:end]

    def place(self, start: int, end: int, first: int = 0) -> Place:
        """Rows ``start`` to ``end`` for the tokens of a chunk from ``first`` on; of one prompt."""
        return Place.of(first, self.rows[start:end], self._split)

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Put keys and values ``[batch, heads, tokens, dim]`` at row ``start``; returns the row after them."""
        end = start + keys.shape[-2]
        with torch.no_grad():  # as the rows were made
            self.keys(start, end).copy_(keys)
            self.values(start, end).copy_(values)
        return end

    # Views of everything once: a slice of one is an operation less for each of a token's layers. Not before they
    # are asked for: while rows are allocated the device has nothing to do.

    @functools.cached_property
    def _all_keys(self) -> torch.Tensor:
        return self._view(self.rows[:, : self._split], self.kv.key_heads, self.kv.key_dim)

    @functools.cached_property
    def _all_values(self) -> torch.Tensor:
        return self._view(self.rows[:, self._split :], self.kv.value_heads, self.kv.value_dim)

    def _view(self, part: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
        return part.view(part.shape[0], self.batch, heads, dim).permute(1, 2, 0, 3)
