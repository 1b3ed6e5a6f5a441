"""A small model of every causal language-model family that the installed transformers has.

Most configurations shrink by the names of their fields; `OVERRIDES` says what a family needs besides.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

LAYERS = 4
VOCABULARY = 257
# Smaller ids are special ones; no prompt has them.
FIRST_TOKEN = 16

# Small values by the name of a field, for every configuration that has one.
SMALL: dict[str, Any] = {
    # Width.
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "emb_dim": 64,
    "embedding_dim": 64,
    "embedding_size": 64,
    "input_embedding_size": 64,
    "output_embedding_size": 64,
    "word_embed_proj_dim": 64,
    # Depth.
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_blocks": LAYERS,
    "decoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    # Caches take their number of layers from the encoder's.
    "encoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    "depth": 1,
    "num_nextn_predict_layers": 0,
    # Heads.
    "num_attention_heads": 4,
    "attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "swa_head_dim": 16,
    "d_head": 16,
    "dim_head": 16,
    "kv_channels": 16,
    "attention_head_size": 16,
    "rotary_dim": 8,
    "d_rel": 8,
    "rel_extent": 64,
    # Latent attention and its indexers.
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "index_topk_blocks": 2,
    "index_block_size": 8,
    # Feed-forward.
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "n_inner": 96,
    "d_inner": 96,
    "dff": 96,
    "dim_ff": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "feed_forward_size": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "dense_intermediate_size": 96,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "zero_expert_num": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "router_hidden_size": 32,
    # Positions and windows.
    "max_position_embeddings": 512,
    "max_target_positions": 512,
    "max_source_positions": 64,
    "max_seq_len": 512,
    "model_max_length": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "context_length": 512,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "window_size": 8,
    "local_attention": 16,
    "local_attention_window_len": 8,
    "keep_window_size": 8,
    "mem_len": 64,
    # State spaces and linear attention.
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "lru_width": 64,
    "time_step_rank": 8,
    # Vocabularies.
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    # Pictures and sound.
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    # Decoders that are also built as encoders.
    "is_decoder": True,
    # With a head of its own a model does not just repeat the token it read.
    "tie_word_embeddings": False,
}

# Set where a family leaves them out, too: some work them out only for the sizes of their checkpoints.
ALWAYS = ("head_dim", "num_key_value_heads")

# One entry for each layer: all kinds that the family has take turns.
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "attention_layers")

SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

LATENT = {"num_key_value_heads": 4, "head_dim": 8}
MIXED_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
SHARED_KV = {"num_kv_shared_layers": 2}
GEMMA3N = {**SHARED_KV, "activation_sparsity_pattern": [0.5, 0.0] * 2}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ONE_CODEBOOK = {"decoder": {"num_codebooks": 1}}
DOTS3_NOTE = {
    **LATENT,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 24,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "hc_lowrank": 16,
}

# What a family needs besides; a dictionary under the name of a nested configuration changes that one.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT,
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        # Its caches are made for so many layers, which its default does not say.
        "num_hidden_layers": LAYERS,
        "encoder_hash_byte_group_vocab": 300,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass_text": {
        **MIXED_WINDOWS,
        "rope_parameters": {"sliding_attention": PLAIN_ROPE, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_top_k": 2},
    },
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {**MIXED_WINDOWS, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": DOTS3_NOTE,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS3_NOTE,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": SHARED_KV},
    "gemma4_text": SHARED_KV,
    "gemma4_unified": {"text_config": SHARED_KV},
    "gemma4_unified_text": SHARED_KV,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "got_ocr2": {"text_config": MIXED_WINDOWS},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT,
    "laguna": MIXED_WINDOWS,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": LATENT,
    "mamba2": {"head_dim": 32},
    "mellum": MIXED_WINDOWS,
    "minicpm3": LATENT,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "moss_transcribe_diarize": {"text_config": MIXED_WINDOWS},
    "musicgen": ONE_CODEBOOK,
    "musicgen_melody": ONE_CODEBOOK,
    "qwen2": MIXED_WINDOWS,
    "qwen2_moe": MIXED_WINDOWS,
    "qwen3": MIXED_WINDOWS,
    "qwen3_moe": {"sliding_window": 8},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "axial_pos_embds_dim": (16, 48),
        "axial_pos_shape": (16, 32),
        "num_buckets": 4,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "smollm3": MIXED_WINDOWS,
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1},
}

# Other configurations of a family that read a prompt in another way.
WINDOW = {"sliding_window": 8}
FULL = {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * LAYERS}
VARIANTS: dict[str, dict[str, Any]] = {
    "doge+window": {**WINDOW, "keep_window_size": 64},
    # Layers whose KV differs in size.
    "dots3_note_text+full": {"use_dsa": False, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "falcon+alibi": {"alibi": True},
    "falcon+new": {"new_decoder_architecture": True},
    "gpt2+scaled": {"scale_attn_by_inverse_layer_idx": True},
    "granitemoehybrid+attention": {"layer_types": ["attention"] * LAYERS},
    "minimax_m3_vl_text+full": {"layer_types": ["full_attention"] * LAYERS},
    "ministral3+window": WINDOW,
    "mistral+full": {"sliding_window": None},
    "mixtral+window": WINDOW,
    "mpt+learned": {"attn_config": {"alibi": False}},
    "phi3+window": WINDOW,
    "phi4_multimodal+window": WINDOW,
    "phimoe+window": WINDOW,
    "qwen2+full": FULL,
    "qwen3+full": FULL,
    "starcoder2+window": WINDOW,
}

# Families whose causal model is built from the configuration of a part.
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def names() -> list[str]:
    """Model types of all families, as transformers names them, and `VARIANTS` of some."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])


def small_config(name: str) -> Any:
    """A small configuration of a family or variant."""
    from transformers import CONFIG_MAPPING

    family = name.partition("+")[0]
    return _small(CONFIG_MAPPING[family], {**OVERRIDES.get(family, {}), **VARIANTS.get(name, {})})


def _small(kind: Any, overrides: dict[str, Any]) -> Any:
    fields: dict[str, Any] = {}
    for field, value in vars(kind()).items():
        if field in kind.sub_configs and hasattr(value, "to_dict"):
            fields[field] = _small(type(value), overrides.get(field, {}))
        elif field in PER_LAYER and isinstance(value, list | tuple) and value:
            fields[field] = _taking_turns(value)
        elif field.endswith(("_token_id", "_token_index")) and value is not None:
            fields[field] = SPECIAL_TOKENS.get(field, 3)
        elif field in SMALL and (value is not None or field in ALWAYS):
            fields[field] = SMALL[field]
    fields.update({field: value for field, value in overrides.items() if field not in kind.sub_configs})
    return kind(**fields)


def _taking_turns(values: Iterable[str]) -> list[str]:
    kinds = list(dict.fromkeys(values))
    return [kinds[layer % len(kinds)] for layer in range(LAYERS)]


def build(name: str) -> Any:
    """A small model of a family with seeded random weights, in eval mode, float32."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = small_config(name)
    if name in PARTS:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = kind(getattr(config, PARTS[name])).eval()
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shake(model)
    if getattr(model, "generation_config", None) is not None:
        # Random weights would otherwise end some answers early.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        if name in PARTS:
            # Without guidance, which would read every prompt twice.
            model.generation_config.guidance_scale = 1.0
            model.generation_config.decoder_start_token_id = 1
    return model


def shake(model: Any) -> None:
    """Random weights that make layers and tokens matter, which those of a fresh model hardly do."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for weight in dict.fromkeys(model.parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if weight.dim() >= 2 and min(weight.shape[-2:]) > 4:
                weight.copy_(noise * 1.2 * weight.shape[-1] ** -0.5)
            else:
                weight.add_(0.1 * noise)
