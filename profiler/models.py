"""Models to measure: from a folder with a configuration, with seeded random weights or from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvr_partition.checkpoints import Checkpoint, read_checkpoint, routes_tokens
from kvr_partition.errors import KVRError, UnsupportedError
from kvr_partition.provenance import ModelGeometry, random_weights


@dataclass(frozen=True)
class ModelFolder:
    """A folder with ``config.json`` and, if it is a checkpoint, weights.

    Attributes:
        checkpoint: what the folder holds.
        config: the Hugging Face configuration.
        geometry: what of it decides how long a prefill takes.
    """

    checkpoint: Checkpoint
    config: Any
    geometry: ModelGeometry

    @property
    def path(self) -> Path:
        """The folder."""
        return self.checkpoint.path

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to load; otherwise they are random, from a seed."""
        return self.checkpoint.has_weights

    def weights(self, seed: int) -> str:
        """How the weights came about, for provenance."""
        return "checkpoint" if self.has_weights else random_weights(seed, routes_tokens(self.config.to_dict()))


def open_model(path: str | os.PathLike[str]) -> ModelFolder:
    """Read a model folder and refuse, before any rank starts, what cannot be measured.

    Raises:
        UnsupportedError: no such folder, no readable config.json, weights that are not all there, a folder that
            wants code to be run, or not a causal LM that keeps its KV in a transformers cache.
    """
    checkpoint = read_checkpoint(path)

    from kvr_partition.runtime.loading import first_line, load_config
    from kvr_partition.runtime.positions import text_config

    config = load_config(checkpoint)
    text = text_config(config)
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest()
    try:
        heads = int(text.num_attention_heads)
        geometry = ModelGeometry(
            name=checkpoint.path.resolve().name,
            model_type=str(text.model_type),
            layers=int(text.num_hidden_layers),
            hidden_size=int(text.hidden_size),
            attention_heads=heads,
            kv_heads=_kv_heads(text, heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            vocab_size=int(text.vocab_size),
            sliding_window=getattr(text, "sliding_window", None),
            config_digest=digest,
        )
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{checkpoint.path / 'config.json'} does not tell the shape of this {text.model_type} model: "
            f"{first_line(error)}"
        ) from None
    return ModelFolder(checkpoint, config, geometry)


def build_model(folder: ModelFolder, *, dtype: str, device: str, seed: int) -> Any:
    """The model itself, in eval mode on its device; see `kvr_partition.runtime.loading.load_model`.

    Raises:
        UnsupportedError: weights that are missing or of other shapes, or transformers cannot build the model.
    """
    from kvr_partition.runtime.loading import build

    return build(folder.checkpoint, folder.config, dtype=dtype, device=device, seed=seed)


@dataclass(frozen=True)
class Operations:
    """What a prefill computes, counted from a model's shape.

    Attributes:
        per_token: floating-point operations in matrix products for each token.
        per_pair: in attention, for each token that a token sees.
        before_kv: share of a layer's matrix products that come before its KV is ready: those of Q, K and V.
    """

    per_token: float
    per_pair: float
    before_kv: float


def operations(folder: ModelFolder) -> Operations:
    """Count a model's operations; an MLP whose width the configuration does not tell is four hidden sizes wide."""
    from kvr_partition.runtime.positions import text_config

    shape, config = folder.geometry, text_config(folder.config)
    before = (shape.attention_heads + 2 * shape.kv_heads) * shape.head_dim
    output = shape.attention_heads * shape.head_dim
    inner = getattr(config, "intermediate_size", None)
    # A gated MLP has three matrices, as Llama's; others two.
    mlp = 3 * inner if inner and shape.model_type != "falcon" else 8 * shape.hidden_size
    columns = before + output + mlp
    return Operations(
        2.0 * shape.layers * shape.hidden_size * columns,
        4.0 * shape.layers * shape.attention_heads * shape.head_dim,
        before / columns,
    )


def build_tensor_parallel(folder: Path, *, dtype: str, rank: int, ranks: int) -> Any:
    """A checkpoint with its layers cut across all ranks of the world, the way transformers does it.

    Raises:
        UnsupportedError: transformers cannot cut this model into so many parts.
    """
    from kvr_partition.runtime.loading import build, load_config

    # Transformers reads its place in the world from what torchrun would have set.
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", ranks)):
        os.environ.setdefault(name, str(value))
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError:
        raise UnsupportedError("this version of transformers cannot run models tensor-parallel") from None
    checkpoint = read_checkpoint(folder)
    # What tp_plan="auto" stands for in newer versions.
    plan = DistributedConfig(tp_size=ranks)
    return build(
        checkpoint, load_config(checkpoint), dtype=dtype, device="cpu", seed=None, distributed_config=plan
    )


def probe_shapes(folder: ModelFolder) -> Any:
    """What a probe of this model shows, from shapes alone: no weights are drawn or loaded.

    The tensors of a checkpoint are compared with those of the model on the way.

    Raises:
        UnsupportedError: the model cannot be split exactly or built at all, or its weights do not fit it.
    """
    from kvr_partition.runtime.loading import build, check_tensors, first_line
    from kvr_partition.runtime.support import probe

    # Shapes do not depend on the dtype, but some operators (grouped matrix products of experts) have no
    # shape rule for any other than bfloat16.
    bare = replace(folder.checkpoint, files=())
    model = build(bare, folder.config, dtype="bfloat16", device="meta", seed=0)
    check_tensors(model, folder.checkpoint)
    try:
        return probe(model)
    except KVRError:
        raise
    except Exception:  # an operator without a shape rule: what it makes depends on data
        pass
    try:
        # Memory that nobody has written to takes no place and reads as zeros, which are weights enough for this.
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.zero_()
        return probe(model)
    except KVRError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"transformers cannot run the {folder.geometry.model_type} model of {folder.path / 'config.json'}: "
            f"{first_line(error)}"
        ) from error


def _kv_heads(text: Any, heads: int) -> int:
    for field in ("num_key_value_heads", "num_kv_heads"):
        value = getattr(text, field, None)
        if value is not None:
            # Falcon keeps num_kv_heads even where multi_query overrules it.
            if field == "num_kv_heads" and not getattr(text, "new_decoder_architecture", False):
                return 1 if getattr(text, "multi_query", False) else int(value)
            return int(value)
    return heads
