"""Which parts of a model can be replaced: each of its layers is tried, once."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kvr_partition.runtime.fused import ops
from kvr_partition.runtime.fused.layers import FusedAttention, FusedLayer, FusedMLP, Norm, OwnAttention, OwnMLP
from kvr_partition.runtime.fused.model import FusedModel, Part
from kvr_partition.runtime.fused.noting import Call, noted_calls
from kvr_partition.runtime.fused.order import NORMS, cache_name, hidden_of, layer_order, outputs_are_kept
from kvr_partition.runtime.fused.parts import UnknownError, known_attention, known_mlp, norm_epsilon, own_attention
from kvr_partition.runtime.fused.watched import Watched, untouched

_ATTENTIONS = ("self_attn", "self_attention", "attention", "attn")
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn")

_probed: weakref.WeakKeyDictionary[Any, FusedModel] = weakref.WeakKeyDictionary()


@torch.no_grad()
def fused_model(model: Any) -> FusedModel:
    """What of a model can be replaced; remembered for as long as nobody changes the model's modules."""
    if nn.modules.module._has_any_global_hook():
        return FusedModel(left=["everything: there are hooks on all modules"])
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        return FusedModel(left=["everything: torch.autocast decides what is computed in which precision"])
    known = _probed.get(model)
    if known is None or not known.watched.unchanged(model):
        try:
            known = _probe(model)
        except torch.OutOfMemoryError:
            # There may be room another time.
            return FusedModel(left=["everything: there was no room to try it"])
        _probed[model] = known
    return known


def _probe(model: Any) -> FusedModel:
    found = FusedModel()
    device = next(model.parameters()).device
    if device.type == "meta" or (missing := ops.missing_kernels(device)):
        found.left.append("everything: the model has no weights" if device.type == "meta" else missing)
        return found
    layers = _decoder_layers(model)
    found.total = len(layers)
    if not layers:
        found.left.append(f"everything: {type(model).__name__} has no decoder layers of a kind known here")
        return found
    found.watched = Watched.of(model, layers)
    try:
        calls = noted_calls(model, [module for layer in layers for module in (layer, *_parts_of(layer))])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does not run, it will fail at by itself
        found.left.append(f"everything: a few tokens cannot be run ({type(error).__name__})")
        return found
    finally:
        found.watched.settle(model)
    if [layer for layer in calls if layer in layers] != layers:
        found.left.append(f"everything: {type(model).__name__} does not run its layers one after the other")
        return found
    kept = outputs_are_kept(model, layers, calls)
    for index, layer in enumerate(layers):
        before = found.layers[-1].module if found.layers else None
        copies = kept or index == 0 or before is not layers[index - 1]
        _probe_layer(model, layer, index, calls, copies, found)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        # The norm behind the last layer.
        if id(module) not in inside and (epsilon := norm_epsilon(module)) is not None:
            found.leaves.append((module, _norm_forward(module, epsilon)))
    found.chained = (
        len(found.layers) == len(layers)
        and not kept
        and all(
            calls[after].args[0] is hidden_of(calls[before].returned)
            for before, after in itertools.pairwise(layers)
        )
    )
    return found


def _decoder_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if all(part is not None for part in _parts_of(module))]


def _parts_of(layer: Any) -> list[Any]:
    """Attention and MLP of a layer; None for what it does not have."""
    children = layer._modules
    return [
        next((children[name] for name in names if children.get(name) is not None), None)
        for names in (_ATTENTIONS, _MLPS)
    ]


# ------------------------------------------------------------------------------------------------ one layer


def _probe_layer(
    model: Any, layer: Any, index: int, calls: dict[Any, Call], copies: bool, found: FusedModel
) -> None:
    """Try the parts of a layer, and note in ``found`` what is known of it and what is left."""
    where = f"layer {index}"
    if not untouched(layer) or id(layer) in found.watched.stateful:
        # Hooks may keep what they are given, which fused layers write to, or give back something else.
        found.left.append(f"everything of {where}: somebody has changed or hooked it, or it keeps something")
        return
    attention, mlp = _parts_of(layer)
    stateful = found.watched.stateful

    def tried(part: Part, what: str, work: Callable[[], Any]) -> Any:
        try:
            known = work()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever fails on a few tokens stays as it is
            reason = f"{what} cannot be tried ({type(error).__name__})"
            found.left.append(f"{part} of {where}: {error if isinstance(error, UnknownError) else reason}")
            return None
        found.parts[part] += 1
        return known

    fused_attention = tried("rotary", "its attention", lambda: known_attention(model, attention, calls, stateful))
    fused_mlp = tried("activation", "its MLP", lambda: known_mlp(mlp, stateful))
    epsilons = {name: norm_epsilon(norm) for name, norm in _norms_of(layer).items()}
    if epsilons and None not in epsilons.values():
        found.parts["norm"] += 1
    else:
        found.left.append(f"norm of {where}: it is no RMS norm, or differs from one in a detail")
    order = tried("residual", "its order", lambda: layer_order(layer, attention, mlp, calls))
    if order is not None:
        own = own_attention(attention, calls)
        parts = (fused_attention or own, own, fused_mlp or OwnMLP(mlp))
        found.layers.append(_put_together(layer, order, epsilons, parts, calls[layer], copies))
        return
    # Each part by itself, which its own layer calls.
    found.leaves += [
        (norm, _norm_forward(norm, epsilon))
        for name, norm in _norms_of(layer).items()
        if (epsilon := epsilons[name]) is not None
    ]
    if fused_mlp is not None:
        found.leaves.append((mlp, _mlp_forward(fused_mlp)))
    if fused_attention is not None:
        # Without a layer of its own there is nobody to call it.
        found.parts["rotary"] -= 1
        found.left.append(f"rotary of {where}: the order of its layer is not known")


def _put_together(
    layer: Any,
    order: tuple[tuple[str, str], bool],
    epsilons: dict[str, float | None],
    parts: tuple[FusedAttention | OwnAttention, OwnAttention, FusedMLP | OwnMLP],
    call: Call,
    copies: bool,
) -> FusedLayer:
    (first, second), parallel = order
    norm = Norm(getattr(layer, first), epsilons[first])
    return FusedLayer(
        module=layer,
        norms=(norm, norm if first == second else Norm(getattr(layer, second), epsilons[second])),
        attention=parts[0],
        own_attention=parts[1],
        mlp=parts[2],
        parallel=parallel,
        cache=cache_name(call),
        returns_tuple=isinstance(call.returned, tuple),
        copies=copies,
    )


def _norms_of(layer: Any) -> dict[str, Any]:
    return {name: layer._modules[name] for pair in NORMS for name in pair if layer._modules.get(name) is not None}


def _norm_forward(module: Any, epsilon: float) -> Callable[..., Any]:
    return lambda hidden: ops.rms_norm(hidden, module.weight, epsilon)


def _mlp_forward(mlp: FusedMLP) -> Callable[..., Any]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        output = torch.zeros_like(rows)
        mlp.add_to_(output, rows)
        return output.view(hidden.shape)

    return forward
