"""Whether a model is as it was when its parts were tried, and nobody has put anything around them."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has."""

_CAPTURING = "transformers.utils.output_capturing"
"""Where transformers' own hooks come from. They stay on a model once its hidden states were asked for, and do
nothing as long as nobody asks for them again."""

_CALLED_DEEP = 2
"""How far functions are followed from a class's ``forward``: rotary embeddings call one to turn halves."""


def untouched(module: Any) -> bool:
    """Whether nobody has put something of their own around or in place of a module's ``forward``."""
    hooks = itertools.chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    return "forward" not in module.__dict__ and all(
        getattr(hook, "__module__", None) == _CAPTURING for hook in hooks
    )


def holds_tensors(module: Any) -> bool:
    """Whether a module has tensors that are neither parameters nor buffers."""
    return any(isinstance(value, torch.Tensor) for value in vars(module).values())


@dataclass
class Watched:
    """Modules of a model, and what their ``forward`` goes by, as they were.

    Hundreds of modules are looked at before every prompt, while the device waits: they are kept by columns, which
    take no loop of ours.

    Attributes:
        places, names: mappings and keys; what a mapping has under its key must stay the identical object.
        modules: what must stay of its class.
        kinds: classes whose ``forward`` must stay what it is.
        sized: what must stay as long: hooks, parameters, attributes, lists.
        tensors: parameters whose number format and device must stay.
        stateful: ids of modules that keep something from one call to the next, set by `settle`.
    """

    places: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    modules: list[Any] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)
    sized: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    stateful: set[int] = field(default_factory=set)
    _owners: list[Any] = field(default_factory=list)
    _then: tuple[list[Any], ...] = ()

    @classmethod
    def of(cls, model: Any, layers: list[Any]) -> Watched:
        """A model: layers with all that is in them, norms elsewhere, and the classes of the rest."""
        found = cls()
        inside = {id(module) for layer in layers for module in layer.modules()}
        configs: dict[int, Any] = {}
        for parent in model.modules():
            if parent is not model:  # which would never be given up
                found.modules.append(parent)
            if id(parent) in inside or any(True for _ in parent.children()):
                found.sized.append(parent._modules)
                for name in parent._modules:
                    found._add(parent._modules, name, None)
            if id(parent) in inside or (
                isinstance(weight := getattr(parent, "weight", None), nn.Parameter) and weight.dim() == 1
            ):
                found._add_module(parent, configs)
        for config in configs.values():
            for name, value in vars(config).items():
                if isinstance(value, bool | int | float | str) and not name.startswith("_"):
                    found._add(vars(config), name, None)
        found.kinds = list({type(module) for module in model.modules()})
        for kind in found.kinds:
            if not kind.__module__.startswith("torch."):
                for place, name in _called(kind.forward, _CALLED_DEEP):
                    found._add(place, name, None)
        found._then = found._now(model)
        return found

    def _add(self, place: Any, name: str, owner: Any) -> None:
        self.places.append(place)
        self.names.append(name)
        self._owners.append(owner)

    def _add_module(self, module: Any, configs: dict[int, Any]) -> None:
        of = vars(module)
        self.sized += [of, module._forward_hooks, module._forward_pre_hooks, module._parameters, module._buffers]
        for name, parameter in module._parameters.items():
            self._add(module._parameters, name, None)
            if parameter is not None:
                self.tensors.append(parameter)
        if type(module).__module__.startswith("torch."):
            return
        for name, value in of.items():
            if name in _OF_MODULES:
                continue
            self._add(of, name, module)
            if isinstance(value, PreTrainedConfig):
                configs[id(value)] = value
            elif isinstance(value, list | dict | set):
                self.sized.append(value)

    def settle(self, model: Any) -> None:
        """Called after a run of the model: what it changed by itself is watched no more, see `stateful`."""
        same = list(map(operator.is_, self._now(model)[0], self._then[0]))
        self.stateful = {
            id(owner)
            for owner, is_same in zip(self._owners, same, strict=True)
            if not is_same and owner is not None
        }
        self.places = list(itertools.compress(self.places, same))
        self.names = list(itertools.compress(self.names, same))
        self._owners = list(itertools.compress(self._owners, same))
        self._then = self._now(model)

    def unchanged(self, model: Any) -> bool:
        """Whether everything still is as it was."""
        if not self._then:
            return True
        now = self._now(model)
        return all(map(operator.is_, now[0], self._then[0])) and now[1:] == self._then[1:]

    def _now(self, model: Any) -> tuple[list[Any], ...]:
        return (
            list(map(dict.get, self.places, self.names)),
            [type(model), *map(type, self.modules)],
            list(map(_FORWARD, self.kinds)),
            list(map(len, self.sized)),
            list(map(_FORMAT, self.tensors)),
        )


_FORMAT = operator.attrgetter("dtype", "device")
_FORWARD = operator.attrgetter("forward")


def _called(function: Any, deep: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Where what a function calls by name stands in its file."""
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType):
        return
    beside = function.__globals__
    for name in function.__code__.co_names:
        if name in beside:
            yield beside, name
            called = beside[name]
            if deep > 1 and isinstance(called, FunctionType) and called.__globals__ is beside:
                yield from _called(called, deep - 1)
