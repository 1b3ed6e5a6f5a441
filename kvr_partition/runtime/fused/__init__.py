"""Layers of unchanged models with fewer kernels: recognised by probing, replaced per model, put back after use."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from kvr_partition.errors import UnsupportedError
from kvr_partition.runtime.fused.model import PARTS, FusedModel
from kvr_partition.runtime.fused.probing import fused_model
from kvr_partition.runtime.fused.recorded import AddPrefix

__all__ = ["PARTS", "FusedModel", "Layers", "chosen_layers", "fused_model", "running"]

Layers = Literal["auto", "fused", "stock"]


def chosen_layers(model: Any, layers: Layers | FusedModel = "auto") -> FusedModel:
    """What of a model is replaced in a run.

    Args:
        layers: ``"fused"``: whatever can be; ``"stock"``: nothing; ``"auto"``: whatever can be on a GPU, and
            nothing elsewhere, where it is no faster; or what an earlier call chose.

    Raises:
        UnsupportedError: another word, or ``"fused"`` where nothing can be replaced, with the reason.
    """
    if isinstance(layers, FusedModel):
        return layers
    if layers not in ("auto", "fused", "stock"):
        raise UnsupportedError(f"layers must be auto, fused or stock; got {layers!r}")
    if layers == "stock" or (layers == "auto" and next(model.parameters()).device.type != "cuda"):
        return FusedModel()
    found = fused_model(model)
    if layers == "fused" and found.name == "stock":
        raise UnsupportedError(f"no part of {type(model).__name__} can be replaced: {found.left[0]}")
    return found


def running(
    model: Any, layers: Layers | FusedModel, tokens: int | None = None, add_prefix: AddPrefix | None = None
) -> AbstractContextManager[object]:
    """While it lasts, a model runs with these layers.

    Args:
        tokens: of a chunk of one prompt that is run at once; None where recordings must not be used.
        add_prefix: folds the prefix into what a chunk's attention made of itself, see `recorded.AddPrefix`; None
            where its attention is something else.
    """
    found = chosen_layers(model, layers)
    return found.replaced(tokens, add_prefix) if found.layers or found.leaves else nullcontext()
