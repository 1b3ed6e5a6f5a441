"""Where a number comes from: the model, the machine and the versions behind it."""

from __future__ import annotations

import msgspec

ROUTED = ", routed"
"""Mark of random weights in a mixture of experts. Its router is random too, and sends tokens elsewhere than a
trained one does, so times with such weights need not be those of a checkpoint."""


def weights_line(weights: str) -> str:
    """The weights behind a result in words, for whoever reads it."""
    if weights.endswith(ROUTED):
        return f"weights: {weights}: experts get other tokens than with real weights, which may change TTFT"
    return f"weights: {weights}"


def random_weights(seed: int, routed: bool) -> str:
    """How provenance names weights that were drawn: ``"random(seed=N)"``, with a mark where they route tokens."""
    return f"random(seed={seed})" + (ROUTED if routed else "")


class ModelGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a model decides how long its prefill takes.

    ``config_digest`` is the SHA-256 of the model's ``config.json`` with sorted keys; two models with the
    same digest are the same architecture with the same shapes.
    """

    name: str
    model_type: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int | None
    config_digest: str


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The conditions of a measurement. Two runs with the same `conditions` can be compared and mixed."""

    model: ModelGeometry
    dtype: str
    weights: str
    """``"checkpoint"`` or what `random_weights` says."""
    ranks: int
    backend: str
    """``"cpu"`` (gloo process ranks), ``"cuda"`` (NCCL, one GPU a rank), ``"sm"`` (one GPU cut into ranks)
    or ``"simulate"`` (nothing ran; a profile answered)."""
    topology: str
    depth: str
    """How far the runtime reaches into the model: ``"attention"`` or ``"cache"``."""
    layers: str
    """Whose norms, rotary embedding, activations and KV rows ran: ``"stock"``, the model's own, or those of this
    project with what they replace, like ``"fused(norm, rotary, activation, residual)"``."""
    batch: int
    device: str
    threads_per_rank: int
    link: str
    os: str
    python: str
    torch: str
    transformers: str
    cuda: str | None
    nccl: str | None
    driver: str | None
    kvr_partition: str
    created: str
    """UTC, ISO 8601."""

    def conditions(self) -> dict[str, object]:
        """Every field that a comparison depends on: all but the time and our own version."""
        fields: dict[str, object] = msgspec.to_builtins(self)
        # Whether random weights route tokens follows from the model, and older files do not say it.
        fields["weights"] = self.weights.removesuffix(ROUTED)
        fields.pop("created")
        fields.pop("kvr_partition")
        return fields

    def costs_differ(self, other: Provenance) -> str | None:
        """What makes chunks cost something else there, as ``"field theirs, not ours"``, or None.

        Ranks, links and versions may differ; where nothing ran, the machine too.
        """
        names = ["dtype", "depth", "layers", "batch"]
        if "simulate" not in (self.backend, other.backend):
            names += ["backend", "device", "threads_per_rank"]
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name.replace('_', ' ')} {theirs}, not {ours}"
        return None

    def difference(self, other: Provenance) -> str | None:
        """The first condition in which two runs differ, as ``"field: ours, theirs"``, or None."""
        ours, theirs = self.conditions(), other.conditions()
        for field, value in ours.items():
            if theirs[field] == value:
                continue
            if isinstance(value, dict):
                other_value = theirs[field]
                assert isinstance(other_value, dict)
                inner = next(key for key in value if value[key] != other_value[key])
                return f"{field}.{inner}: {value[inner]}, {other_value[inner]}"
            return f"{field}: {value}, {theirs[field]}"
        return None
