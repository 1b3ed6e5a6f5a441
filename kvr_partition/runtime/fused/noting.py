"""How a model calls its layers and their parts: noted in a run over a few tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

TOKENS = 8
"""Tokens that parts are tried on."""


@dataclass
class Call:
    """What a module was given in a run of the model, and what it returned."""

    args: tuple[Any, ...]
    given: dict[str, Any]
    returned: Any = None


class NotingCache(DynamicCache):
    """Gives back what a layer stores, and notes it and what its attention is given.

    Attributes:
        answer: what attention returns, ``[1, tokens, heads, dim]``; zeros where it is None.
        before: tokens that it says it holds.
    """

    def __init__(self, config: Any, answer: torch.Tensor | None = None, before: int = 0) -> None:
        super().__init__(config=config)
        self.query: torch.Tensor | None = None
        self.stored: tuple[torch.Tensor, torch.Tensor] | None = None
        self.given: dict[str, Any] = {}
        self.answer = answer
        self.before = before

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.before

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.stored = (key_states, value_states)
        return self.stored

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any
    ) -> torch.Tensor:
        """Attention that returns the answer."""
        self.query, self.given = query, given
        batch, heads, tokens, _ = query.shape
        if self.answer is None:
            return query.new_zeros((batch, tokens, heads, value.shape[3]))
        return self.answer.to(query.dtype)


def run(model: Any) -> torch.Tensor:
    """The last logits of a few tokens, whose attention returns zeros."""
    from kvr_partition.runtime.replacing import replaced_attention
    from kvr_partition.runtime.support import forward, probe

    noting = NotingCache(model.config)
    ids = torch.zeros((1, TOKENS), dtype=torch.long, device=next(model.parameters()).device)
    with replaced_attention(model, probe(model).route, noting.attend) as extra:
        logits: torch.Tensor = forward(model, ids, noting, **extra).logits
    return logits


def noted_calls(model: Any, modules: Iterable[Any]) -> dict[Any, Call]:
    """How modules of a model are called in a run over a few tokens, in the order in which they are."""
    calls: dict[Any, Call] = {}
    hooks: list[Any] = []
    thread = threading.get_ident()

    def before(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            calls[module] = Call(args, given)

    def after(module: Any, args: tuple[Any, ...], given: dict[str, Any], returned: Any) -> None:
        if threading.get_ident() == thread:
            calls[module].returned = returned

    try:
        for module in modules:
            hooks += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True),
            ]
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
