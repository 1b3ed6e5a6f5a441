"""Small configurations of the architectures that tests run for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 257,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}

# The architectures of the paper and of today; attention depth where transformers lets us.
CORE: dict[str, dict[str, Any]] = {
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-gqa": {"model_type": "llama", "num_key_value_heads": 2},
    "mistral-full": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 9},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "falcon-mqa": {
        "model_type": "falcon",
        "multi_query": True,
        "new_decoder_architecture": False,
        "ffn_hidden_size": 96,
    },
    "falcon-new": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": {"model_type": "falcon", "multi_query": True, "alibi": True},
}

# Whatever else keeps its KV in a transformers cache: soft caps, sinks, mixed windows, shared KV, latent KV.
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2-mixed-window": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
    },
    "gpt2": {"model_type": "gpt2", "n_positions": 512},
    "bloom": {"model_type": "bloom", "n_head": 4, "n_layer": 3},
    "mpt": {
        "model_type": "mpt",
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "expansion_ratio": 2,
        "max_seq_len": 512,
    },
    "roberta": {"model_type": "roberta", "is_decoder": True, "pad_token_id": 0, "max_position_embeddings": 514},
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
}

ALL = {**CORE, **OTHERS}


def config(name: str, **changes: Any) -> dict[str, Any]:
    """The configuration as a dictionary."""
    return {**COMMON, **ALL[name], **changes}


def build(name: str, **changes: Any) -> Any:
    """The model with seeded random weights, in eval mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = config(name, **changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()


def write_folder(folder: Path, name: str, **changes: Any) -> Path:
    """A model folder with only a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(name, **changes)))
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of 256 tokens in a model folder, one for each byte; those of digits come late."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    tokens = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    return folder


def provenance(**changes: Any) -> Any:
    """Conditions such as a run of two CPU ranks would have."""
    from kvr_partition.provenance import ModelGeometry, Provenance

    geometry = ModelGeometry("llama", "llama", 3, 64, 4, 2, 16, 257, None, "0" * 64)
    fields: dict[str, Any] = {
        "model": geometry,
        "dtype": "float32",
        "weights": "random(seed=0)",
        "ranks": 2,
        "backend": "cpu",
        "topology": "chain",
        "depth": "attention",
        "layers": "stock",
        "batch": 1,
        "device": "a processor",
        "threads_per_rank": 1,
        "link": "gloo over loopback",
        "os": "Linux x86_64",
        "python": "3.11",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "cuda": None,
        "nccl": None,
        "driver": None,
        "kvr_partition": "0.1.0",
        "created": "2026-11-24T00:00:00+00:00",
    }
    return Provenance(**{**fields, **changes})
