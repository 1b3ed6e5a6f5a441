"""Models to measure: from a folder with a configuration, with seeded random weights or from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvr_partition.errors import UnsupportedError
from kvr_partition.provenance import ModelGeometry

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with ``config.json`` and, if it is a checkpoint, weights.

    Attributes:
        path: the folder.
        config: the Hugging Face configuration.
        geometry: what of it decides how long a prefill takes.
        has_weights: whether there are weights to load; otherwise they are random, from a seed.
    """

    path: Path
    config: Any
    geometry: ModelGeometry
    has_weights: bool

    def weights(self, seed: int) -> str:
        """How the weights came about, for provenance."""
        return "checkpoint" if self.has_weights else f"random(seed={seed})"


def open_model(path: str | os.PathLike[str]) -> ModelFolder:
    """Read a model folder and refuse, before any rank starts, what cannot be measured.

    Raises:
        UnsupportedError: no such folder, no readable config.json, or not a causal LM that keeps its KV in
            a transformers cache.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        raise UnsupportedError(f"model folder {folder} does not exist; give a folder with a config.json")
    if not file.is_file():
        raise UnsupportedError(f"model folder {folder} has no config.json; give a Hugging Face model folder")
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"{file} is no readable JSON: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UnsupportedError(f"{file} names no model_type; give a Hugging Face configuration")

    from transformers import AutoConfig, AutoModelForCausalLM

    from kvr_partition.runtime.support import check_config, text_config

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers finds wrong with it, it is the file that is wrong
        raise UnsupportedError(f"{file} is not accepted by transformers: {_first_line(error)}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(f"{file}: {config.model_type} is no causal LM of transformers")
    check_config(config)
    text = text_config(config)
    heads = int(text.num_attention_heads)
    geometry = ModelGeometry(
        name=folder.resolve().name,
        model_type=str(text.model_type),
        layers=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        attention_heads=heads,
        kv_heads=_kv_heads(text, heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocab_size=int(text.vocab_size),
        sliding_window=getattr(text, "sliding_window", None),
        config_digest=hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest(),
    )
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return ModelFolder(folder, config, geometry, has_weights)


def build_model(folder: ModelFolder, *, dtype: str, device: str, seed: int) -> Any:
    """The model itself, in eval mode on its device.

    Without a checkpoint the weights are drawn on the device from ``seed``: ranks with the same kind of
    device get the same ones, and nothing large passes through host memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch_dtype = getattr(torch, dtype)
    if folder.has_weights:
        model: Any = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch_dtype, local_files_only=True)
        return model.to(torch.device(device)).eval()
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(folder.config, dtype=torch_dtype)
    return model.eval()


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
    from kvr_partition.runtime.support import text_config

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
    import torch
    from transformers import AutoModelForCausalLM

    # Transformers reads its place in the world from what torchrun would have set.
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", ranks)):
        os.environ.setdefault(name, str(value))
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        # What tp_plan="auto" stands for in newer versions.
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            distributed_config=DistributedConfig(tp_size=ranks),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UnsupportedError(
            f"transformers cannot run this model tensor-parallel: {_first_line(error)}"
        ) from None
    return model.eval()


def probe_shapes(folder: ModelFolder) -> Any:
    """What a probe of this model shows, from shapes alone: no weights are drawn or loaded.

    Raises:
        UnsupportedError: the model cannot be split exactly.
    """
    from kvr_partition.runtime.support import probe

    # Shapes do not depend on the dtype, but some operators (grouped matrix products of experts) have no
    # shape rule for any other than bfloat16.
    bare = replace(folder, has_weights=False)
    return probe(build_model(bare, dtype="bfloat16", device="meta", seed=0))


def _kv_heads(text: Any, heads: int) -> int:
    for field in ("num_key_value_heads", "num_kv_heads"):
        value = getattr(text, field, None)
        if value is not None:
            # Falcon keeps num_kv_heads even where multi_query overrules it.
            if field == "num_kv_heads" and not getattr(text, "new_decoder_architecture", False):
                return 1 if getattr(text, "multi_query", False) else int(value)
            return int(value)
    return heads


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
