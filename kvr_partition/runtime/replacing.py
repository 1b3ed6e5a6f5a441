"""Other attention in a model for the time of a run, and nobody else meanwhile."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from transformers import PreTrainedConfig

from kvr_partition.errors import RankError
from kvr_partition.runtime import attention


def uses_interface(model: Any) -> bool:
    return bool(getattr(model, "_can_set_attn_implementation", lambda: False)())


_running: set[int] = set()
"""Ids of modules that a prefill runs with; they live as long as it does."""


_running_known = threading.Lock()


@contextmanager
def exclusively(model: Any) -> Iterator[None]:
    """A model whose attention and layers nobody else replaces meanwhile: they are a model's, not a thread's.

    Raises:
        RankError: another thread prefills with the same model, or with one that has layers of it.
    """
    ids = _with_children(model)
    with _running_known:
        free = _running.isdisjoint(ids)
        if free:
            _running.update(ids)
    if not free:
        raise RankError(
            "another thread prefills with the same model, or one that shares its layers; one prefill at a time, "
            "or a model for each thread",
            kind="busy",
            phase="agreement",
        )
    try:
        yield
    finally:
        with _running_known:
            _running.difference_update(ids)


def _with_children(model: Any) -> set[int]:
    """Ids of a model, its body, its list of layers and the layers: of what has children, down to there."""
    found, level = {id(model)}, [model]
    for _ in range(3):
        level = [
            child for module in level for child in module._modules.values() if child is not None and child._modules
        ]
        found.update(map(id, level))
    return found


class runahead_attention:  # noqa: N801 - reads as a statement: with runahead_attention(model): ...
    """Use our attention in a model; nested uses cost nothing, and the last one out puts the old one back.

    Transformers looks at every module of a model for that, which takes milliseconds. What it changed the first
    time is changed directly from then on.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> None:
        attention.register()
        self._before = self._model.config._attn_implementation
        if self._before == attention.IMPLEMENTATION:
            return
        known = _attention_changes.get(self._model)
        if known is None or any(config._attn_implementation != before for config, before, _ in known):
            configs = {id(module.config): module.config for module in self._model.modules() if _configured(module)}
            were = {key: config._attn_implementation for key, config in configs.items()}
            self._model.set_attn_implementation(attention.IMPLEMENTATION)
            _attention_changes[self._model] = [
                (config, were[key], config._attn_implementation) for key, config in configs.items()
            ]
            return
        for config, _, ours in known:
            config._attn_implementation_internal = ours

    def __exit__(self, *_: object) -> None:
        if self._before != attention.IMPLEMENTATION:
            for config, stock, _ours in _attention_changes[self._model]:
                config._attn_implementation_internal = stock


_attention_changes: weakref.WeakKeyDictionary[Any, list[tuple[Any, str, str]]] = weakref.WeakKeyDictionary()
"""Configurations inside a model, and how they attend without and with our attention."""


def _configured(module: Any) -> bool:
    return isinstance(getattr(module, "config", None), PreTrainedConfig)


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """A model with its own attention, without what would make the host wait inside its layers."""
    with attention.sdpa_calls(None) if not uses_interface(model) else nullcontext():
        yield


@contextmanager
def replaced_attention(
    model: Any, route: Literal["interface", "calls"] | None, hook: attention.Hook
) -> Iterator[dict[str, Any]]:
    """Send a model's attention to ``hook`` by a route of `ModelSupport`; by None it keeps its own.

    Yields:
        What `forward` must be given besides.
    """
    if route == "interface":
        with runahead_attention(model), attention.active(hook):
            yield {}
    elif route == "calls":
        with attention.sdpa_calls(hook):
            yield {"attention_mask": attention.no_mask(model.device)}
    else:
        yield {}
