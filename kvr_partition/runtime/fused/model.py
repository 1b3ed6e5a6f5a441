"""What of a model can be replaced, and its replacement for the time of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvr_partition.runtime.fused.layers import FusedLayer, Linear, Norm, OwnMLP
from kvr_partition.runtime.fused.recorded import AddPrefix, RecordedLayers, can_record, recordable, sizes
from kvr_partition.runtime.fused.stand_ins import standing_in
from kvr_partition.runtime.fused.watched import Watched

Part = Literal["norm", "rotary", "activation", "residual"]
PARTS: tuple[Part, ...] = ("norm", "rotary", "activation", "residual")


@dataclass
class FusedModel:
    """What of a model can be replaced.

    Attributes:
        layers: the decoder layers whose order is known, in the order in which they run.
        leaves: other modules with something to put in their ``forward``'s place.
        parts: for each part, in how many of the layers it is replaced.
        total: decoder layers of the model.
        left: what stays the model's own, and why.
        chained: whether each layer reads the very tensor that the one before it returned, which nobody else keeps;
            and all of them are known.
        watched: what was tried. Adapters and hooks that come later must not be passed over.
        recorded: short chunks, once `record` recorded some.
    """

    layers: list[FusedLayer] = field(default_factory=list)
    leaves: list[tuple[Any, Callable[..., Any]]] = field(default_factory=list)
    parts: dict[Part, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    total: int = 0
    left: list[str] = field(default_factory=list)
    chained: bool = False
    watched: Watched = field(default_factory=Watched)
    recorded: RecordedLayers | None = None

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
                    layer.copies,
                )
            )
        return FusedModel(layers, [], dict(self.parts), self.total, list(self.left))

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
            with standing_in(dict([*layers, *self.leaves])):
                yield
        finally:
            if size is not None and self.recorded is not None:
                self.recorded.finished(size)
