"""Parts of a layer that are known here: each is tried on a few tokens and compared with the original.

What is compared is the part itself, on the model's own weights, against the same in higher precision: on rows of
usual size, and on rows so large that what a part cuts off shows. A part that comes out further from that than the
model's own does, or has anything that is not known here, stays as it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kvr_partition.dtypes import DTYPES
from kvr_partition.runtime.fused import ops
from kvr_partition.runtime.fused.layers import FusedAttention, FusedMLP, Linear, OwnAttention
from kvr_partition.runtime.fused.noting import TOKENS, Call, NotingCache
from kvr_partition.runtime.fused.watched import holds_tensors, untouched
from kvr_partition.runtime.rows import Place

_FAR = 1 << 20
"""Position of tokens that parts are tried on, where a model has no largest position."""
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_LARGE = 1e3
"""Largest value that attention computes from large rows. Trained models have such outliers."""
_LARGEST_ROWS = 5e3
"""Largest value of those rows, which half precision must hold."""
_LARGE_INNER = (60.0, 15.0, 4.0)
"""Values inside an MLP that are tried, the largest first, until half precision holds their product."""


class UnknownError(Exception):
    """A part stays the model's own; says why."""


def check_known(module: Any, known: Collection[Any], stateful: Collection[int] = ()) -> None:
    """Refuse a part that has more than what it is known for.

    What has no effect today may have one tomorrow: a branch whose weights are still zero, a scale of one.

    Args:
        known: the modules in it that may have parameters.
        stateful: see `Watched`.

    Raises:
        UnknownError: others have, or one has something besides weight and bias, or somebody has put something
            around one.
    """
    for name, inner in module.named_modules():
        where = f"its {name}" if name else "it"
        if not untouched(inner):
            raise UnknownError(f"somebody has changed or hooked {where}")
        if id(inner) in stateful:
            raise UnknownError(f"{where} keeps something from one call to the next")
        allowed = {"weight", "bias"} if inner in known else set()
        if set(inner._parameters) - allowed or inner._buffers or holds_tensors(inner):
            raise UnknownError(f"{where} has tensors that are not known here")


def norm_epsilon(module: Any) -> float | None:
    """The epsilon of an RMS norm; None for other modules, and for norms that differ from it in a detail."""
    weight = getattr(module, "weight", None)
    epsilon = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    if (
        not isinstance(weight, nn.Parameter)
        or weight.dim() != 1
        or [name for name, _ in module.named_parameters()] != ["weight"]
        or not isinstance(epsilon, float)
    ):
        return None
    try:
        check_known(module, {module})
    except UnknownError:
        return None
    # Weights of ones, as in a model that was never trained, would hide what is done with them.
    generator = torch.Generator().manual_seed(11)
    size = weight.shape[0]
    tried = copy.deepcopy(module)
    tried.weight = nn.Parameter((1 + 0.5 * torch.randn(size, generator=generator)).to(weight), requires_grad=False)
    # Small rows show where epsilon stands, rows with a mean whether it is taken off, large ones what overflows.
    scale = torch.tensor([1e-3, 1e-2, 1.0, 30.0, 1e3])[:, None]
    rows = (torch.randn((5, size), generator=generator) * scale + 0.5 * scale).to(weight)
    try:
        own = tried(rows[None])[0]
        exact = tried.to(_higher(weight.dtype))(rows[None].to(_higher(weight.dtype)))[0]
        tried.to(weight.dtype)
        ours = ops.rms_norm(rows, tried.weight, epsilon)
    except Exception:  # a norm of another kind
        return None
    return epsilon if own.shape == ours.shape and _as_good([(ours, own, exact)]) else None


def _higher(dtype: torch.dtype) -> torch.dtype:
    return getattr(torch, DTYPES[str(dtype).removeprefix("torch.")].reference)  # type: ignore[no-any-return]


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
    return torch.randn((TOKENS, width), generator=generator).to(weight)


def _in_higher(module: Any) -> Any:
    return copy.deepcopy(module).to(_higher(next(module.parameters()).dtype))


def _linear(module: Any) -> Linear:
    if not isinstance(module, nn.Linear):
        raise UnknownError(f"a projection is a {type(module).__name__}")
    weight = module.weight
    if (
        type(module).__module__.partition(".")[0] not in ("torch", "transformers")
        or type(weight.data) is not torch.Tensor
        or weight.stride(1) != 1
    ):
        raise UnknownError(f"a projection is more than a product ({type(module).__name__})")
    return Linear(module, plain=True)


# ---------------------------------------------------------------------------------------------------------- MLP


def known_mlp(module: Any, stateful: Collection[int]) -> FusedMLP:
    """An MLP put together from its parts.

    Raises:
        UnknownError: it is not known, or computes something else.
    """
    names = (
        ("gate_proj", "up_proj", "down_proj", False),
        (None, "gate_up_proj", "down_proj", True),
        (None, "dense_h_to_4h", "dense_4h_to_h", False),
        (None, "fc1", "fc2", False),
        (None, "up_proj", "down_proj", False),
    )
    fitting = [
        named
        for named in names
        if all(hasattr(module, name) for name in (named[0] or named[1], named[1], named[2]))
    ]
    if not fitting:
        raise UnknownError(f"{type(module).__name__} is not an MLP as it is known here")
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
    check_known(
        module, [linear.module for linear in (fused.gate, fused.up, fused.down) if linear is not None], stateful
    )
    rows = _rows(module, fused.up.module.in_features)
    inner = max(float(linear.of(rows).abs().max()) for linear in (fused.gate, fused.up) if linear is not None)
    exactly = _in_higher(module)
    for tried in (rows, *(rows * (large / inner) for large in _LARGE_INNER)):
        found = module(tried[None])[0]
        if tried is not rows and not found.isfinite().all():
            continue
        residual = torch.zeros_like(tried)
        fused.add_to_(residual, tried)
        if not _as_good([(residual, found, exactly(tried[None].to(_higher(rows.dtype)))[0])]):
            raise UnknownError("it computes something else")
        if tried is not rows:
            break
    return fused


def _activation(own: Any) -> str:
    points = torch.linspace(-8, 8, 65, dtype=torch.float64)
    try:
        found = own(points)
    except Exception:
        raise UnknownError("its activation is not known here") from None
    for name, known in ops.ACTIVATIONS.items():
        if torch.allclose(found, known(points), rtol=1e-9, atol=1e-9):
            return name
    raise UnknownError("its activation is not known here")


# ---------------------------------------------------------------------------------------------------- attention


def own_attention(module: Any, calls: dict[Any, Call]) -> OwnAttention:
    """The module's own attention, if its layer gives it nothing but what it was given itself.

    Raises:
        UnknownError: it is called in another way.
    """
    call = calls[module]
    hidden = None if call.args else "hidden_states"
    if len(call.args) > 1 or (hidden is not None and hidden not in call.given):
        raise UnknownError("its attention is called in another way")
    return OwnAttention(module, hidden, tuple(name for name in call.given if name != hidden))


def known_attention(model: Any, module: Any, calls: dict[Any, Call], stateful: Collection[int]) -> FusedAttention:
    """Attention put together from its parts.

    Args:
        calls: how the model calls it.
        stateful: see `Watched`.

    Raises:
        UnknownError: it is not known, or computes something else.
    """
    from kvr_partition.runtime.positions import farthest
    from kvr_partition.runtime.support import probe

    support = probe(model)
    index: Any = getattr(module, "layer_idx", None)
    kv = support.layers[index] if isinstance(index, int) and index < len(support.layers) else None
    if support.route is None or kv is None:
        raise UnknownError(support.reason or "it keeps no KV")
    if (kv.key_heads, kv.key_dim) != (kv.value_heads, kv.value_dim):
        raise UnknownError("its keys and values differ in shape")
    call = calls[module]
    angles = call.given.get("position_embeddings")
    if not (isinstance(angles, tuple) and len(angles) == 2 and angles[0].shape[-1] == kv.key_dim):
        raise UnknownError("it has no rotary embedding of whole heads")
    fused = _put_together(module, index, kv.key_dim, kv.key_heads, support.route)
    parts = [linear.module for linear in (*fused.projections, fused.output)]
    check_known(module, [*parts, *(fused.norms or ())[:2]], stateful)
    far = torch.linspace(0, (farthest(model) or _FAR) - 1, TOKENS, device=model.device).round().long()
    trial = _Trial(model, module, call, fused, far)
    noted, usual = trial.run(1.0)
    constants, passed_on = _interface(noted.given, trial.given, support.route)
    largest = max(float(own.abs().max()) for _, own, _ in usual)
    for pairs in (usual, trial.run(min(_LARGE / largest, _LARGEST_ROWS))[1]):
        if any(ours.shape != own.shape for ours, own, _ in pairs) or not _as_good(pairs):
            raise UnknownError("it computes something else")
    return replace(fused, constants=constants, passed_on=passed_on)


@dataclass
class _Trial:
    """Attention as the model has it and put together, on the same rows.

    Attributes:
        call: how the model calls it.
        fused: it, put together.
        far: where the rows stand, ``[tokens]``: what depends on that shows only far away.
    """

    model: Any
    module: Any
    call: Call
    fused: FusedAttention
    far: torch.Tensor

    @functools.cached_property
    def given(self) -> dict[str, Any]:
        """What it is given besides hidden states: as the model gives it, its tokens as far away as `far`."""
        return {
            name: self.far.view(value.shape) if _counts_tokens(value) else value
            for name, value in self.call.given.items()
            if name != "hidden_states"
        }

    @functools.cached_property
    def exactly(self) -> Any:
        """The module in higher precision."""
        return _in_higher(self.module)

    def run(self, scale: float) -> tuple[NotingCache, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
        """Read rows of this size.

        Returns:
            What the model's own attention gave to others; and queries, keys, values and output, each by us, by the
            model, and in higher precision.
        """
        from kvr_partition.runtime.replacing import replaced_attention
        from kvr_partition.runtime.support import probe

        fused, dim = self.fused, self.fused.dim
        rows = scale * _rows(self.module, fused.projections[0].module.in_features)
        generator = torch.Generator().manual_seed(17)
        # Angles of any size, as far positions have them; both halves of a rotation turn by the same.
        half = 6.3 * torch.rand((TOKENS, dim // 2), generator=generator, dtype=torch.float64)
        angle = torch.cat([half, half], dim=1)
        cos, sin = (wave.to(rows) for wave in (angle.cos(), angle.sin()))
        heads = (fused.projections[0].module.out_features // dim) - (
            2 * fused.kv_heads if len(fused.projections) == 1 else 0
        )
        answer = scale * torch.randn((1, TOKENS, heads, dim), generator=generator).to(rows)
        noted: list[NotingCache] = []
        outputs = []
        route = probe(self.model).route
        with replaced_attention(self.model, route, lambda *args, **named: noted[-1].attend(*args, **named)):
            for module in (self.module, self.exactly):
                noted.append(NotingCache(self.model.config, answer, int(self.far[-1]) + 1 - TOKENS))
                outputs.append(self._own(module, rows, cos, sin, noted[-1]))
        own, exact = noted
        width = fused.kv_heads * dim
        place = Place.of(0, rows.new_empty((TOKENS, 2 * width)), width)
        query = fused.project(rows, cos, sin, [place])
        output = torch.zeros_like(outputs[0])
        fused.output.add_to_(output, answer.reshape(TOKENS, -1))
        return own, [
            (query.reshape(TOKENS, -1), _dense(own.query), _dense(exact.query)),
            (place.keys, _dense(own.stored and own.stored[0]), _dense(exact.stored and exact.stored[0])),
            (place.values, _dense(own.stored and own.stored[1]), _dense(exact.stored and exact.stored[1])),
            (output, outputs[0], outputs[1]),
        ]

    def _own(
        self, module: Any, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, noting: NotingCache
    ) -> torch.Tensor:
        """What a module makes of rows, called as the model calls its own."""
        precision = next(module.parameters()).dtype
        given = {
            name: noting if isinstance(value, NotingCache) else value for name, value in self.given.items()
        } | {"position_embeddings": (cos.to(precision)[None], sin.to(precision)[None])}
        hidden = rows[None].to(precision)
        found = module(hidden, **given) if self.call.args else module(hidden_states=hidden, **given)
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return output[0]


def _dense(states: torch.Tensor | None) -> torch.Tensor:
    """``[1, heads, tokens, dim]`` as rows."""
    if states is None:
        raise UnknownError("it does not attend as a probe showed")
    return states[0].transpose(0, 1).reshape(TOKENS, -1)


def _counts_tokens(value: Any) -> bool:
    """Whether something says where the tokens stand."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.long and value.numel() == TOKENS


def _interface(noted: dict[str, Any], given: dict[str, Any], route: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a module gives to its attention: the same for every call, and what it passes on."""
    if route == "calls":
        if any(value is not None for name, value in noted.items() if name != "attention_mask"):
            raise UnknownError("it gives something to its attention that is not known here")
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
            raise UnknownError(f"it gives {name} to its attention")
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
        raise UnknownError(f"{type(module).__name__} has projections that are not known here")
    norms = None
    if hasattr(module, "q_norm") or hasattr(module, "k_norm"):
        both = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        epsilons = [None if norm is None else norm_epsilon(norm) for norm in both]
        if epsilons[0] is None or epsilons[0] != epsilons[1] or both[0].weight.shape != (dim,):  # type: ignore[union-attr]
            raise UnknownError("its norms of queries and keys are not known here")
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
