"""In which order a layer calls its parts, and whether anybody keeps what a layer returned."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kvr_partition.runtime.fused import noting
from kvr_partition.runtime.fused.noting import TOKENS, Call, NotingCache
from kvr_partition.runtime.fused.parts import UnknownError, own_attention
from kvr_partition.runtime.fused.stand_ins import standing_in
from kvr_partition.runtime.fused.watched import holds_tensors, untouched

NORMS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("ln_attn", "ln_mlp"),
    ("input_layernorm", "input_layernorm"),
    ("ln_1", "ln_2"),
)
"""Names that models give the norms before attention and before the MLP."""


def hidden_of(returned: Any) -> Any:
    """The hidden states of what a layer returned."""
    return returned[0] if isinstance(returned, tuple) else returned


def cache_name(call: Call) -> str:
    """Under which name a layer is given the cache.

    Raises:
        UnknownError: it is not given one by name.
    """
    for name, value in call.given.items():
        if isinstance(value, NotingCache):
            return name
    raise UnknownError("it is not given the cache by name")


def layer_order(layer: Any, attention: Any, mlp: Any, calls: dict[Any, Call]) -> tuple[tuple[str, str], bool]:
    """Which norms a layer has where, and whether its MLP runs beside attention.

    Its parts are replaced by functions of one number each, so that what the layer makes of them shows its order
    exactly, whatever its weights.

    Raises:
        UnknownError: it has an order that is not known, or more than attention, MLP and norms.
    """
    call = calls[layer]
    if not call.args:
        raise UnknownError("it is called in another way")
    if isinstance(calls[mlp].returned, tuple):
        raise UnknownError("its MLP returns more than hidden states")
    own_attention(attention, calls)
    cache_name(call)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn((1, TOKENS, call.args[0].shape[-1]), generator=generator, dtype=torch.float64)
    hidden = hidden.to(call.args[0].device)
    for first, second in NORMS:
        if not all(isinstance(getattr(layer, name, None), nn.Module) for name in (first, second)):
            continue
        norms = [getattr(layer, name) for name in (first, second)]
        if not all(untouched(norm) for norm in norms):
            raise UnknownError("somebody has changed a norm")
        _check_nothing_else(layer, [attention, mlp, *norms])
        stand_ins: dict[Any, Callable[..., Any]] = {
            norms[0]: lambda x: torch.sin(x + 0.3),
            attention: _returning(calls[attention], lambda x: torch.cos(1.7 * x)),
            mlp: lambda x: torch.tanh(0.9 * x) + 0.1,
        }
        if norms[1] is not norms[0]:
            stand_ins[norms[1]] = lambda x: torch.sin(0.7 * x - 0.2)
        with standing_in(stand_ins):
            found = hidden_of(layer(hidden.clone(), *call.args[1:], **call.given))
        normed = [stand_ins[norm] for norm in norms]
        attended = torch.cos(1.7 * normed[0](hidden))
        for parallel in (False, True):
            seen = normed[1](hidden if parallel else hidden + attended)
            expected = hidden + attended + torch.tanh(0.9 * seen) + 0.1
            if torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
                return (first, second), parallel
    raise UnknownError("norms, attention, MLP and sums in an order that is not known here")


def _check_nothing_else(layer: Any, parts: list[Any]) -> None:
    """Refuse a layer with tensors outside its parts: what has no effect today may have one tomorrow."""
    inside = {id(module) for part in parts for module in part.modules()}
    for module in layer.modules():
        if id(module) not in inside and (module._parameters or module._buffers or holds_tensors(module)):
            raise UnknownError("it has more than attention, MLP and norms")


def _returning(call: Call, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A stand-in for attention: changes its hidden states, and returns as much besides as attention did."""

    def forward(*args: Any, **given: Any) -> Any:
        changed = change(args[0] if args else given["hidden_states"])
        return (changed, *call.returned[1:]) if isinstance(call.returned, tuple) else changed

    return forward


def outputs_are_kept(model: Any, layers: list[Any], calls: dict[Any, Call]) -> bool:
    """Whether somebody still has what a layer returned, or reads it, when the layer behind it has run.

    Fused layers write over it. Stand-ins do the same, with what is no number: whoever reads it then makes logits
    that are none.
    """
    given_back: list[weakref.ref[Any]] = []
    written: list[tuple[weakref.ref[Any], Any]] = []
    kept = False

    def standing_for(index: int, layer: Any) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
            nonlocal kept
            # What the last one returned is read here; whoever called may have it still.
            kept = kept or any(reference() is not None for reference in given_back[:-1])
            made = 0.5 * hidden + 1
            if index:
                storage = hidden.untyped_storage()
                written.append((weakref.ref(storage), storage.clone()))
                hidden.fill_(torch.nan)
            given_back.append(weakref.ref(made.untyped_storage()))
            returned = calls[layer].returned
            return (made, *returned[1:]) if isinstance(returned, tuple) else made

        return forward

    try:
        with standing_in({layer: standing_for(index, layer) for index, layer in enumerate(layers)}):
            logits = noting.run(model)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that looks at what its layers return
        return True
    finally:
        for there, before in written:
            if (storage := there()) is not None:
                storage.copy_(before)
    return (
        kept or any(reference() is not None for reference in given_back[:-1]) or not bool(logits.isfinite().all())
    )
