"""Which parts of a model can be replaced: each is tried on a few tokens and compared with the original.

What is compared is the part itself, on the model's own weights, against the same in higher precision. A part that
comes out further from that than the model's own does, or whose shape is not known here, stays as it is.
"""

from __future__ import annotations

import copy
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from kvr_partition.runtime.cache import Place
from kvr_partition.runtime.fused import ops
from kvr_partition.runtime.fused.layers import (
    FusedAttention,
    FusedLayer,
    FusedMLP,
    Linear,
    Norm,
    OwnAttention,
    OwnMLP,
)
from kvr_partition.runtime.fused.recorded import AddPrefix, RecordedLayers, can_record, recordable, sizes

Part = Literal["norm", "rotary", "activation", "residual"]
PARTS: tuple[Part, ...] = ("norm", "rotary", "activation", "residual")

_TOKENS = 8
_FAR = 1 << 20
"""As far as tokens stand where a model does not say how many positions it has."""
_ATTENTIONS = ("self_attn", "self_attention", "attention", "attn")
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_NORMS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("ln_attn", "ln_mlp"),
    ("input_layernorm", "input_layernorm"),
    ("ln_1", "ln_2"),
)
"""Names that models give the norms before attention and before the MLP."""
_EPSILONS = ("variance_epsilon", "eps", "epsilon")


class _UnknownError(Exception):
    """A part stays the model's own; says why."""


@dataclass
class _Watched:
    """Modules of a model that matter, and whether they are as they were when its parts were tried.

    Hundreds of modules are looked at before every prompt, while the device waits: they are kept by columns, which
    take no loop of ours.
    """

    siblings: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    attributes: list[dict[str, Any]] = field(default_factory=list)
    then: tuple[list[Any], ...] = ()

    @classmethod
    def of(cls, model: Any, layers: list[Any]) -> _Watched:
        """Layers of a model, all that is in them, and norms elsewhere, as they are."""
        found = cls()
        inside = {id(module) for layer in layers for module in layer.modules()}
        for parent in model.modules():
            for name, module in parent.named_children():
                if id(module) not in inside and _rms_epsilon(module) is None:
                    continue
                found.siblings.append(parent._modules)
                found.names.append(name)
                found.attributes.append(module.__dict__)
        found.then = found.now()
        return found

    def now(self) -> tuple[list[Any], ...]:
        """The modules that are there, and what others have put around their ``forward``."""
        return (
            list(map(dict.get, self.siblings, self.names)),
            list(map(len, map(_HOOKS, self.attributes))),
            list(map(len, map(_PRE_HOOKS, self.attributes))),
            list(map(dict.__contains__, self.attributes, itertools.repeat("forward"))),
        )


_HOOKS, _PRE_HOOKS = (operator.itemgetter(name) for name in ("_forward_hooks", "_forward_pre_hooks"))


@dataclass
class FusedModel:
    """What of a model can be replaced.

    Attributes:
        layers: the decoder layers whose order is known, in the order in which they run.
        leaves: other modules with something to put in their ``forward``'s place.
        parts: for each part, in how many of the layers it is replaced.
        total: decoder layers of the model.
        left: what stays the model's own, and why.
    """

    layers: list[FusedLayer] = field(default_factory=list)
    leaves: list[tuple[Any, Callable[..., Any]]] = field(default_factory=list)
    parts: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    total: int = 0
    left: list[str] = field(default_factory=list)
    chained: bool = False
    """Whether each layer reads the very tensor that the one before it returned, and all of them are known."""

    watched: _Watched = field(default_factory=_Watched)
    """What was tried. Adapters and hooks that come later must not be passed over."""

    def unchanged(self) -> bool:
        """Whether the model still has the modules that were tried."""
        return not self.watched.names or self.watched.now() == self.watched.then

    @property
    def name(self) -> str:
        """How provenance names these layers: ``"stock"``, or ``"fused(norm, rotary)"`` with what is replaced."""
        found = [
            part if count == self.total else f"{part} {count}/{self.total}"
            for part, count in self.parts.items()
            if count
        ]
        return f"fused({', '.join(found)})" if found else "stock"

    def of_parts(self, model: Any, other: Any) -> FusedModel:
        """The same for a model whose layers are cut across ranks, of which each has a part of every matrix.

        Its attention stays as it is: how many heads a part has is the other model's affair.

        Args:
            model: what these layers are of.
            other: the same model in parts.
        """
        names = {module: name for name, module in model.named_modules()}

        def there(module: Any) -> Any:
            return other.get_submodule(names[module])

        def part(linear: Linear) -> Linear:
            return Linear(there(linear.module), plain=False)

        layers = []
        for layer in self.layers:
            first = Norm(there(layer.norms[0].module), layer.norms[0].epsilon)
            same = layer.norms[1] is layer.norms[0]
            second = first if same else Norm(there(layer.norms[1].module), layer.norms[1].epsilon)
            mlp, attention = layer.mlp, layer.own_attention
            layers.append(
                FusedLayer(
                    there(layer.module),
                    (first, second),
                    replace(attention, module=there(attention.module)),
                    replace(attention, module=there(attention.module)),
                    OwnMLP(there(mlp.module))
                    if isinstance(mlp, OwnMLP)
                    else replace(mlp, gate=mlp.gate and part(mlp.gate), up=part(mlp.up), down=part(mlp.down)),
                    layer.parallel,
                    layer.cache,
                    layer.returns_tuple,
                    layer.first,
                )
            )
        return FusedModel(layers, [], dict(self.parts), self.total, list(self.left))

    recorded: RecordedLayers | None = None
    """Recordings of short chunks, once `record` made some."""

    def record(self, most: int, least: int = 1) -> int:
        """Record the launches of chunks of ``least`` to ``most`` tokens, see `recorded`.

        Returns:
            How many graphs were made; 0 where nothing can be recorded.
        """
        if not recordable(self.layers, self.chained) or not can_record(
            self.layers[0].norms[0].module.weight.device
        ):
            return 0
        if self.recorded is None:
            self.recorded = RecordedLayers(self.layers)
        return self.recorded.record([size for size in sizes(most) if size >= least])

    @property
    def left_in_short(self) -> list[str]:
        """What stays the model's own: one line for all layers that say the same."""
        layers: dict[tuple[str, str], list[str]] = {}
        for line in self.left:
            where, _, reason = line.partition(": ")
            part, _, layer = where.partition(" of layer ")
            layers.setdefault((part, reason), []).append(layer)
        lines = []
        for (part, reason), found in layers.items():
            if found == [""] or len(found) == self.total:
                lines.append(f"{part}: {reason}")
            else:
                lines.append(f"{part} of layer{'s' if len(found) > 1 else ''} {', '.join(found)}: {reason}")
        return lines

    @contextmanager
    def replaced(self, tokens: int | None = None, add_prefix: AddPrefix | None = None) -> Iterator[None]:
        """While it lasts, the model's parts are replaced; of this model only, and nothing of its class.

        Args:
            tokens, add_prefix: of a chunk of one prompt that is about to be run at once, for which recordings may
                be used.
        """
        size = self.recorded.fit(tokens) if self.recorded is not None and tokens is not None else None
        if size is None:
            layers = [(layer.module, layer.forward) for layer in self.layers]
        else:
            assert self.recorded is not None
            layers = self.recorded.forwards(size, add_prefix)
        try:
            with _standing_in(dict([*layers, *self.leaves])):
                yield
        finally:
            if size is not None and self.recorded is not None:
                self.recorded.finished(size)


_probed: weakref.WeakKeyDictionary[Any, FusedModel] = weakref.WeakKeyDictionary()


@torch.no_grad()
def fused_model(model: Any) -> FusedModel:
    """What of a model can be replaced; remembered for as long as nobody changes the model's modules."""
    if nn.modules.module._has_any_global_hook():
        return FusedModel(left=["everything: there are hooks on all modules"])
    known = _probed.get(model)
    if known is None or not known.unchanged():
        try:
            known = _probe(model)
        except torch.OutOfMemoryError:
            # There may be room another time.
            return FusedModel(left=["everything: there was no room to try it"])
        _probed[model] = known
    return known


@dataclass
class _Call:
    """What a module was given in a run of the model, and what it returned."""

    args: tuple[Any, ...]
    given: dict[str, Any]
    returned: Any = None


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
    found.watched = _Watched.of(model, layers)
    try:
        calls = _calls(model, layers)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does not run, it will fail at by itself
        found.left.append(f"everything: a few tokens cannot be run ({type(error).__name__})")
        return found
    order = [layer for layer in calls if layer in layers]
    if order != layers:
        found.left.append(f"everything: {type(model).__name__} does not run its layers one after the other")
        return found
    for index, layer in enumerate(order):
        _probe_layer(model, layer, index, calls, found)
    known = {id(layer.module) for layer in found.layers}
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        # The norm behind the last layer.
        if id(module) not in inside and (epsilon := _rms_epsilon(module)) is not None:
            found.leaves.append((module, _norm_forward(module, epsilon)))
    found.chained = len(known) == len(order) and all(
        calls[after].args[0] is _hidden(calls[before].returned) for before, after in itertools.pairwise(order)
    )
    return found


def _decoder_layers(model: Any) -> list[Any]:
    return [
        module
        for module in model.modules()
        if _child(module, _ATTENTIONS) is not None and _child(module, _MLPS) is not None
    ]


def _child(module: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def _hidden(returned: Any) -> Any:
    return returned[0] if isinstance(returned, tuple) else returned


def _calls(model: Any, layers: list[Any]) -> dict[Any, _Call]:
    """How layers and their attention and MLPs are called, in a run over a few tokens."""
    from kvr_partition.runtime.support import forward, probe, replaced_attention

    calls: dict[Any, _Call] = {}
    hooks: list[Any] = []

    def before(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        calls[module] = _Call(args, given)

    def after(module: Any, args: tuple[Any, ...], given: dict[str, Any], returned: Any) -> None:
        calls[module].returned = returned

    support = probe(model)
    noting = _NotingCache(model.config)
    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device=next(model.parameters()).device)
    try:
        for layer in layers:
            parts = [getattr(layer, _child(layer, names) or "") for names in (_ATTENTIONS, _MLPS)]
            for module in (layer, *parts):
                hooks += [
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(after, with_kwargs=True),
                ]
        with replaced_attention(model, support.route, noting.attend) as extra:
            forward(model, ids, noting, **extra)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class _NotingCache(DynamicCache):
    """Gives back what a layer stores, and notes it and what its attention is given."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.query: torch.Tensor | None = None
        self.stored: tuple[torch.Tensor, torch.Tensor] | None = None
        self.given: dict[str, Any] = {}
        self.answer: torch.Tensor | None = None
        self.before = 0

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
        """Attention that returns a given answer, or zeros."""
        self.query, self.given = query, given
        batch, heads, tokens, _ = query.shape
        if self.answer is None:
            return query.new_zeros((batch, tokens, heads, value.shape[3]))
        return self.answer.to(query.dtype)


# ------------------------------------------------------------------------------------------------ one layer


def _probe_layer(model: Any, layer: Any, index: int, calls: dict[Any, _Call], found: FusedModel) -> None:
    where = f"layer {index}"
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        # They may keep what they are given, which fused layers write to, or give back something else.
        found.left.append(f"everything of {where}: somebody's hooks are on it")
        return
    attention_name, mlp_name = _child(layer, _ATTENTIONS) or "", _child(layer, _MLPS) or ""
    own_attention, own_mlp = getattr(layer, attention_name), getattr(layer, mlp_name)

    def tried(part: Part, what: str, work: Callable[[], Any]) -> Any:
        try:
            known = work()
        except _UnknownError as reason:
            found.left.append(f"{part} of {where}: {reason}")
            return None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever fails on a few tokens stays as it is
            found.left.append(f"{part} of {where}: {what} cannot be tried ({type(error).__name__})")
            return None
        found.parts[part] += 1
        return known

    fused_attention = tried("rotary", "its attention", lambda: _attention(model, own_attention, calls))
    fused_mlp = tried("activation", "its MLP", lambda: _mlp(own_mlp))
    norms = {
        name: _rms_epsilon(getattr(layer, name))
        for pair in _NORMS
        for name in pair
        if isinstance(getattr(layer, name, None), nn.Module)
    }
    if norms and all(epsilon is not None for epsilon in norms.values()):
        found.parts["norm"] += 1
    else:
        found.left.append(f"norm of {where}: it is no RMS norm, or differs from one in a detail")
    order = tried("residual", "its order", lambda: _order(layer, attention_name, mlp_name, calls))
    if order is not None:
        (first, second), parallel = order
        norm = Norm(getattr(layer, first), norms[first])
        other = norm if first == second else Norm(getattr(layer, second), norms[second])
        found.layers.append(
            FusedLayer(
                layer,
                (norm, other),
                fused_attention or _own_attention(own_attention, calls),
                _own_attention(own_attention, calls),
                fused_mlp or OwnMLP(own_mlp),
                parallel,
                _cache_name(calls[layer]),
                isinstance(calls[layer].returned, tuple),
                first=index == 0,
            )
        )
        return
    for name, epsilon in norms.items():
        if epsilon is not None:
            module = getattr(layer, name)
            found.leaves.append((module, _norm_forward(module, epsilon)))
    if fused_mlp is not None:
        found.leaves.append((own_mlp, _mlp_forward(fused_mlp)))
    if fused_attention is not None:
        # Without a layer of its own there is nobody to call it.
        found.parts["rotary"] -= 1
        found.left.append(f"rotary of {where}: the order of its layer is not known")


def _norm_forward(module: Any, epsilon: float) -> Callable[..., Any]:
    return lambda hidden: ops.rms_norm(hidden, module.weight, epsilon)


def _mlp_forward(mlp: FusedMLP) -> Callable[..., Any]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        output = torch.zeros_like(rows)
        mlp.add_to_(output, rows)
        return output.view(hidden.shape)

    return forward


def _cache_name(call: _Call) -> str:
    return next(name for name, value in call.given.items() if isinstance(value, _NotingCache))


def _untouched(module: Any) -> bool:
    """Whether nobody has put something of their own around or in place of a module's ``forward``."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)


def _linear(module: Any) -> Linear:
    if not isinstance(module, nn.Linear):
        raise _UnknownError(f"a projection is a {type(module).__name__}")
    ours = type(module).__module__.partition(".")[0] in ("torch", "transformers")
    weight = module.weight
    plain = ours and _untouched(module) and type(weight.data) is torch.Tensor and weight.stride(1) == 1
    return Linear(module, plain)


# -------------------------------------------------------------------------------------------------- its order


def _order(
    layer: Any, attention_name: str, mlp_name: str, calls: dict[Any, _Call]
) -> tuple[tuple[str, str], bool]:
    """Which norms a layer has where, and whether its MLP runs beside attention.

    Its parts are replaced by functions of one number each, so that what the layer makes of them shows its order
    exactly, whatever its weights.
    """
    call = calls[layer]
    if "forward" in layer.__dict__:
        raise _UnknownError("somebody has changed its forward")
    if not call.args or any(
        not isinstance(getattr(layer, name), nn.Module) for name in (attention_name, mlp_name)
    ):
        raise _UnknownError("it is called in another way")
    attention, mlp = getattr(layer, attention_name), getattr(layer, mlp_name)
    if isinstance(calls[mlp].returned, tuple):
        raise _UnknownError("its MLP returns more than hidden states")
    _own_attention(attention, calls)
    _cache_name(call)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn((1, _TOKENS, call.args[0].shape[-1]), generator=generator, dtype=torch.float64)
    hidden = hidden.to(call.args[0].device)
    for first, second in _NORMS:
        if not all(isinstance(getattr(layer, name, None), nn.Module) for name in (first, second)):
            continue
        if not all(_untouched(getattr(layer, name)) for name in (first, second)):
            raise _UnknownError("somebody has changed a norm")
        stand_ins: dict[Any, Callable[..., Any]] = {
            getattr(layer, first): lambda x: torch.sin(x + 0.3),
            attention: _returning(calls[attention], lambda x: torch.cos(1.7 * x)),
            mlp: lambda x: torch.tanh(0.9 * x) + 0.1,
        }
        if second != first:
            stand_ins[getattr(layer, second)] = lambda x: torch.sin(0.7 * x - 0.2)
        norms = [stand_ins[getattr(layer, name)] for name in (first, second)]
        with _standing_in(stand_ins):
            found = _hidden(layer(hidden.clone(), *call.args[1:], **call.given))
        attended = torch.cos(1.7 * norms[0](hidden))
        for parallel in (False, True):
            seen = norms[1](hidden if parallel else hidden + attended)
            expected = hidden + attended + torch.tanh(0.9 * seen) + 0.1
            if torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
                return (first, second), parallel
    raise _UnknownError("norms, attention, MLP and sums in an order that is not known here")


def _returning(call: _Call, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A stand-in for attention: changes its hidden states, and returns as much besides as attention did."""

    def forward(*args: Any, **given: Any) -> Any:
        changed = change(args[0] if args else given["hidden_states"])
        return (changed, *call.returned[1:]) if isinstance(call.returned, tuple) else changed

    return forward


@contextmanager
def _standing_in(stand_ins: dict[Any, Callable[..., Any]]) -> Iterator[None]:
    before = {module: module.__dict__.get("forward") for module in stand_ins}
    for module, forward in stand_ins.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _own_attention(module: Any, calls: dict[Any, _Call]) -> OwnAttention:
    """The module's own attention, if its layer gives it nothing but what it was given itself."""
    call = calls[module]
    hidden = None if call.args else "hidden_states"
    if len(call.args) > 1 or (hidden is not None and hidden not in call.given):
        raise _UnknownError("its attention is called in another way")
    return OwnAttention(module, hidden, tuple(name for name in call.given if name != hidden))


# -------------------------------------------------------------------------------------------------- its parts


def _rms_epsilon(module: Any) -> float | None:
    """The epsilon of an RMS norm; None for other modules, and for norms that differ from it in a detail."""
    weight = getattr(module, "weight", None)
    epsilon = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    if (
        not isinstance(weight, nn.Parameter)
        or weight.dim() != 1
        or [name for name, _ in module.named_parameters()] != ["weight"]
        or not isinstance(epsilon, float)
        or not _untouched(module)
    ):
        return None
    # Weights of ones, as in a model that was never trained, would hide what is done with them.
    generator = torch.Generator().manual_seed(11)
    size = weight.shape[0]
    tried = copy.deepcopy(module)
    tried.weight = nn.Parameter((1 + 0.5 * torch.randn(size, generator=generator)).to(weight), requires_grad=False)
    # Small rows show where epsilon stands, rows with a mean whether it is taken off, large ones what overflows.
    scale = torch.tensor([1e-3, 1e-2, 1.0, 30.0])[:, None]
    rows = (torch.randn((4, size), generator=generator) * scale + 0.5 * scale).to(weight)
    try:
        own = tried(rows[None])[0]
        exact = tried.to(_higher(weight.dtype))(rows[None].to(_higher(weight.dtype)))[0]
        tried.to(weight.dtype)
        ours = ops.rms_norm(rows, tried.weight, epsilon)
    except Exception:  # a norm of another kind
        return None
    return epsilon if own.shape == ours.shape and _as_good([(ours, own, exact)]) else None


def _higher(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def _as_good(results: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> bool:
    """Whether what we compute is as near to what is exact as what the model computes; all finite.

    A sum in another order moves the last digit: a quarter of the precision counts as no difference. In single
    precision two of it do: norms are computed in it whatever they are given, so that nothing exact is known.
    """
    for ours, own, exact in results:
        epsilon = torch.finfo(own.dtype).eps
        allowed = 1.1 * _distance(own, exact) + (2 * epsilon if own.dtype == torch.float32 else epsilon / 4)
        if not _distance(ours, exact) <= allowed:
            return False
    return True


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.double()
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


def _rows(module: Any, width: int) -> torch.Tensor:
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(13)
    return torch.randn((_TOKENS, width), generator=generator).to(weight)


def _in_higher(module: Any) -> Any:
    return copy.deepcopy(module).to(_higher(next(module.parameters()).dtype))


def _mlp(module: Any) -> FusedMLP:
    if not _untouched(module):
        raise _UnknownError("somebody has changed its forward")
    names = (
        ("gate_proj", "up_proj", "down_proj", False),
        (None, "gate_up_proj", "down_proj", True),
        (None, "dense_h_to_4h", "dense_4h_to_h", False),
        (None, "fc1", "fc2", False),
        (None, "up_proj", "down_proj", False),
    )
    fitting = [one for one in names if all(hasattr(module, name) for name in (one[0] or one[1], one[1], one[2]))]
    if not fitting:
        raise _UnknownError(f"{type(module).__name__} is not an MLP as it is known here")
    gate, up, down, joined = fitting[0]
    own = next(
        (getattr(module, name) for name in ("act_fn", "act", "activation_fn") if hasattr(module, name)), None
    )
    activation = _activation(own)
    fused = FusedMLP(
        None if gate is None else _linear(getattr(module, gate)),
        _linear(getattr(module, up)),
        _linear(getattr(module, down)),
        joined,
        activation,
    )
    rows = _rows(module, fused.up.module.in_features)
    residual = torch.zeros_like(rows)
    fused.add_to_(residual, rows)
    if not _as_good(
        [(residual, module(rows[None])[0], _in_higher(module)(rows[None].to(_higher(rows.dtype)))[0])]
    ):
        raise _UnknownError("it computes something else")
    return fused


def _activation(own: Any) -> str:
    points = torch.linspace(-8, 8, 65, dtype=torch.float64)
    try:
        found = own(points)
    except Exception:
        raise _UnknownError("its activation is not known here") from None
    for name, known in ops.ACTIVATIONS.items():
        if torch.allclose(found, known(points), rtol=1e-9, atol=1e-9):
            return name
    raise _UnknownError("its activation is not known here")


def _attention(model: Any, module: Any, calls: dict[Any, _Call]) -> FusedAttention:
    from kvr_partition.runtime.support import farthest, probe, replaced_attention

    support = probe(model)
    index: Any = getattr(module, "layer_idx", None)
    kv = support.layers[index] if isinstance(index, int) and index < len(support.layers) else None
    if support.route is None or kv is None:
        raise _UnknownError(support.reason or "it keeps no KV")
    if not _untouched(module):
        raise _UnknownError("somebody has changed its forward")
    if (kv.key_heads, kv.key_dim) != (kv.value_heads, kv.value_dim):
        raise _UnknownError("its keys and values differ in shape")
    call = calls[module]
    given = {name: value for name, value in call.given.items() if name != "hidden_states"}
    angles = given.get("position_embeddings")
    if not (isinstance(angles, tuple) and len(angles) == 2 and angles[0].shape[-1] == kv.key_dim):
        raise _UnknownError("it has no rotary embedding of whole heads")
    fused = _put_together(module, index, kv.key_dim, kv.key_heads, support.route)
    rows = _rows(module, fused.projections[0].module.in_features)
    device, dtype = rows.device, rows.dtype
    generator = torch.Generator().manual_seed(17)
    # Angles of any size, as far positions have them; both halves of a rotation turn by the same.
    half = 6.3 * torch.rand((_TOKENS, kv.key_dim // 2), generator=generator, dtype=torch.float64)
    angle = torch.cat([half, half], dim=1)
    cos, sin = (one.to(device=device, dtype=dtype) for one in (angle.cos(), angle.sin()))
    heads = (fused.projections[0].module.out_features // kv.key_dim) - (
        2 * kv.key_heads if len(fused.projections) == 1 else 0
    )
    answer = torch.randn((1, _TOKENS, heads, kv.key_dim), generator=generator).to(device=device, dtype=dtype)

    # What depends on how far a token stands in a prompt shows only far away.
    far = torch.linspace(0, (farthest(model) or _FAR) - 1, _TOKENS, device=device).round().long()
    given |= {name: far.view(value.shape) for name, value in given.items() if _counts_tokens(value)}
    noted: list[_NotingCache] = []
    outputs = []
    with replaced_attention(model, support.route, lambda *args, **named: noted[-1].attend(*args, **named)):
        for one, precision in ((module, dtype), (_in_higher(module), _higher(dtype))):
            noted.append(_NotingCache(model.config))
            noted[-1].answer, noted[-1].before = answer, int(far[-1]) + 1 - _TOKENS
            passed = {
                name: noted[-1] if isinstance(value, _NotingCache) else value for name, value in given.items()
            } | {"position_embeddings": (cos.to(precision)[None], sin.to(precision)[None])}
            hidden = rows[None].to(precision)
            found = one(hidden, **passed) if call.args else one(hidden_states=hidden, **passed)
            outputs.append(_hidden(found))
    own, exact = noted
    constants, passed_on = _interface(own.given, given, support.route)
    fused = replace(fused, constants=constants, passed_on=passed_on)
    width = kv.key_heads * kv.key_dim
    place = Place.of(0, rows.new_empty((_TOKENS, 2 * width)), width)
    query = fused.project(rows, cos, sin, [place])
    output = torch.zeros_like(outputs[0][0])
    fused.output.add_to_(output, answer.reshape(_TOKENS, -1))
    assert own.stored is not None and exact.stored is not None  # noqa: PT018
    assert own.query is not None and exact.query is not None  # noqa: PT018

    def dense(states: torch.Tensor) -> torch.Tensor:
        return states[0].transpose(0, 1).reshape(_TOKENS, -1)

    pairs = [
        (query.reshape(_TOKENS, -1), dense(own.query), dense(exact.query)),
        (place.keys, dense(own.stored[0]), dense(exact.stored[0])),
        (place.values, dense(own.stored[1]), dense(exact.stored[1])),
        (output, outputs[0][0], outputs[1][0]),
    ]
    if any(ours.shape != theirs.shape for ours, theirs, _ in pairs) or not _as_good(pairs):
        raise _UnknownError("it computes something else")
    return fused


def _counts_tokens(value: Any) -> bool:
    """Whether something says where the tokens stand."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.long and value.numel() == _TOKENS


def _interface(noted: dict[str, Any], given: dict[str, Any], route: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a module gives to its attention: the same for every call, and what it passes on."""
    if route == "calls":
        if any(value is not None for name, value in noted.items() if name != "attention_mask"):
            raise _UnknownError("it gives something to its attention that is not known here")
        return {}, ()
    constants, passed_on = {}, []
    for name, value in noted.items():
        if name == "attention_mask":
            continue
        if name in given and value is given[name]:
            passed_on.append(name)
        elif value is None or isinstance(value, bool | int | float | str):
            constants[name] = value
        else:
            raise _UnknownError(f"it gives {name} to its attention")
    return constants, tuple(passed_on)


def _put_together(module: Any, index: int, dim: int, kv_heads: int, route: Any) -> FusedAttention:
    names = (
        (("q_proj", "k_proj", "v_proj"), "o_proj"),
        (("qkv_proj",), "o_proj"),
        (("query_key_value",), "dense"),
    )
    for projections, output in names:
        if all(hasattr(module, name) for name in (*projections, output)):
            break
    else:
        raise _UnknownError(f"{type(module).__name__} has projections that are not known here")
    norms = None
    if hasattr(module, "q_norm") or hasattr(module, "k_norm"):
        both = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        epsilons = [None if one is None else _rms_epsilon(one) for one in both]
        if epsilons[0] is None or epsilons[0] != epsilons[1] or both[0].weight.shape != (dim,):  # type: ignore[union-attr]
            raise _UnknownError("its norms of queries and keys are not known here")
        norms = (both[0], both[1], epsilons[0])
    return FusedAttention(
        module,
        index,
        tuple(_linear(getattr(module, name)) for name in projections),
        _linear(getattr(module, output)),
        dim,
        kv_heads,
        norms,
        route,
        {},
        (),
    )
