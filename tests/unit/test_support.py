"""What is refused by name before anything runs, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvr_partition import Partition, PartitionError
from kvr_partition.errors import UnsupportedError
from kvr_partition.runtime import check_config, check_context, decode, prefill, probe, stock
from profiler.models import open_model, probe_shapes
from profiler.ranks import RankGroup
from tests.models import ALL, build, config, write_folder


def hf_config(**fields: Any) -> Any:
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "mamba", "num_hidden_layers": 2}, "layer 0 of mamba keeps a LinearAttentionLayer"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder"),
        ({"model_type": "jamba", "num_hidden_layers": 2}, "layer 0 of jamba keeps a LinearAttention"),
    ],
)
def test_state_that_is_not_keys_and_values_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        check_config(hf_config(**fields))


def test_positions_end_where_the_model_says() -> None:
    llama = hf_config(**config("llama-gqa"))
    check_context(llama, 512)
    with pytest.raises(PartitionError, match="513 tokens are beyond the 512 positions of this llama model"):
        check_context(llama, 513)
    check_context(hf_config(**config("falcon-alibi")), 100_000)


@pytest.mark.parametrize(("kind", "original"), [("dynamic", 512), ("longrope", 64)])
def test_rope_that_changes_with_the_length_read_is_refused_beyond_its_original_length(
    kind: str, original: int
) -> None:
    rope = {
        "rope_type": kind,
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "long_factor": [1.5] * 8,
        "short_factor": [1.0] * 8,
    }
    scaled = hf_config(**config("llama-gqa"), rope_parameters=rope)
    check_context(scaled, original)
    with pytest.raises(UnsupportedError, match=f"RoPE of type '{kind}' changes with the length read at once"):
        check_context(scaled, original + 1)


@pytest.mark.parametrize(
    ("rope", "reach"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"type": "linear", "factor": 2}, 128),
        ({"rope_type": "proportional", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            256,
        ),
    ],
    ids=lambda value: str(value),
)
def test_rope_that_is_stretched_once_reaches_as_far_as_it_is_stretched(rope: dict[str, Any], reach: int) -> None:
    scaled = hf_config(**config("llama-gqa", max_position_embeddings=64), rope_scaling=rope)
    check_context(scaled, reach)
    with pytest.raises(PartitionError, match=f"beyond the {reach} positions of this llama model"):
        check_context(scaled, reach + 1)


def test_rope_of_each_kind_of_layer_counts() -> None:
    layers = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    fields = {"model_type": "gemma3_text", "num_hidden_layers": 2, "max_position_embeddings": 64}
    check_context(hf_config(**fields, rope_parameters=layers), 512)
    layers["full_attention"] = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e6}
    with pytest.raises(UnsupportedError, match="RoPE of type 'dynamic'"):
        check_context(hf_config(**fields, rope_parameters=layers), 65)


@pytest.mark.parametrize(
    ("field", "kind"), [("max_seq_len", "mpt"), ("n_positions", "gpt2"), ("n_positions", "codegen")]
)
def test_other_families_call_their_positions_otherwise(field: str, kind: str) -> None:
    small = hf_config(model_type=kind, **{field: 64})
    check_context(small, 64)
    with pytest.raises(PartitionError, match=f"65 tokens are beyond the 64 positions of this {kind} model"):
        check_context(small, 65)
    check_context(hf_config(model_type="bloom", seq_length=64), 100_000)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}], ids=str
)
def test_chunks_beyond_the_original_positions_are_exact(rope: dict[str, Any]) -> None:
    model = build("llama-gqa", max_position_embeddings=64, rope_scaling=rope)
    ids = torch.randint(0, 257, (1, 200), generator=torch.Generator().manual_seed(5))
    out = prefill(model, ids[:, 120:], Partition((80,), past=120), past=stock(model, ids[:, :120]).cache)
    assert torch.allclose(out.logits, stock(model, ids).logits, atol=1e-5)  # type: ignore[arg-type]


DBRX = {
    "model_type": "dbrx",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 512,
    "vocab_size": 257,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
}


def test_what_shapes_alone_do_not_show_is_tried_for_real(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DBRX))
    support = probe_shapes(open_model(tmp_path))
    assert [layer.key_heads for layer in support.layers if layer is not None] == [2, 2, 2]
    model = AutoModelForCausalLM.from_config(hf_config(**DBRX)).eval()
    assert support == probe(model)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]}}, "KeyError 'mrope'"),
        ({"hidden_act": "no-such-function"}, "no-such-function"),
        ({"num_attention_heads": 0}, "is not accepted|does not tell the shape|cannot build"),
    ],
)
def test_models_that_cannot_be_built_are_refused_in_one_line(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(UnsupportedError, match=says) as caught:
        probe_shapes(open_model(write_folder(tmp_path, "llama-gqa", **fields)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_shapes_alone_show_what_the_model_itself_shows(name: str, tmp_path: Path) -> None:
    assert probe_shapes(open_model(write_folder(tmp_path / name, name))) == probe(build(name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("falcon-alibi", "does not run with its attention replaced"),
        ("bloom", "does not run with its attention replaced"),
        ("gemma2", "passes softcap"),
        ("gpt-oss", "passes s_aux"),
        ("deepseek-v3", "attends to something else than the keys and values it stores"),
    ],
)
def test_attention_depth_is_refused_where_it_would_be_wrong(name: str, reason: str, tmp_path: Path) -> None:
    support = probe(build(name))
    assert not support.attention_depth
    assert support.choose("auto") == "cache"
    with pytest.raises(UnsupportedError, match=f"attention depth is not possible: .*{reason}.*use depth='cache'"):
        support.choose("attention")
    with pytest.raises(UnsupportedError, match=reason):
        RankGroup(write_folder(tmp_path / name, name), ranks=2, backend="cpu", depth="attention")


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = build("llama-gqa")
    before = model.config._attn_implementation
    probe(model)
    assert model.config._attn_implementation == before
    ids = torch.arange(20)[None]
    prefill(model, ids, Partition((20,)))
    assert model.config._attn_implementation == before


def test_calls_that_do_not_fit_are_refused() -> None:
    model, ids = build("llama-gqa"), torch.arange(20)[None]
    with pytest.raises(PartitionError, match=r"input_ids must be \[batch, 19\]"):
        prefill(model, ids, Partition((19,)))
    with pytest.raises(PartitionError, match="has 4 past tokens, but the cache given holds 0"):
        prefill(model, ids, Partition((20,), past=4))
    with pytest.raises(PartitionError, match="beyond the 512 positions"):
        decode(model, ids, stock(model, ids), 500)


def test_one_rank_needs_no_group_and_decodes_on() -> None:
    model, ids = build("mistral-window"), torch.arange(40)[None]
    out = prefill(model, ids, Partition((40,)), reserve=3)
    right = stock(model, ids)
    assert torch.equal(decode(model, ids, out, 300), decode(model, ids, right, 300))
    assert out.kv_bytes == 0


def test_the_cache_follows_beams_and_batches() -> None:
    model = build("llama-gqa")
    ids = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(3))
    beams = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    out = prefill(model, ids, Partition((30,)))
    right = stock(model, ids)
    found = []
    for result in (out, right):
        tokens = torch.cat([ids, result.first_token], 1)  # type: ignore[list-item]
        result.cache.batch_repeat_interleave(3)
        found.append(
            model.generate(tokens, past_key_values=result.cache, attention_mask=torch.ones_like(tokens), **beams)
        )
    assert torch.equal(*found)


def test_the_cache_can_be_cropped_and_emptied() -> None:
    model, ids = build("llama-gqa"), torch.arange(30)[None]
    out = prefill(model, ids, Partition((30,)))
    keys = out.cache.layers[0].keys.clone()
    out.cache.crop(-10)
    assert out.cache.get_seq_length() == 20
    assert torch.equal(out.cache.layers[0].keys, keys[:, :, :20])
    with pytest.raises(ValueError, match="crop takes minus the tokens"):
        out.cache.crop(5)
    out.cache.reset()
    assert out.cache.get_seq_length() == 0
    logits = model(ids, past_key_values=out.cache).logits[:, -1]
    assert torch.allclose(logits, stock(model, ids).logits, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no config.json"),
        ("{", "is no readable JSON"),
        ("[]", "names no model_type"),
        ('{"model_type": "no-such-model"}', "is not accepted by transformers"),
        ('{"model_type": "bert"}', "attends in both directions"),
        ('{"model_type": "clip"}', "is no causal LM of transformers"),
    ],
)
def test_folders_that_hold_no_usable_model_are_refused(tmp_path: Path, content: str | None, says: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(UnsupportedError, match=says) as caught:
        probe_shapes(open_model(folder))
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedError, match="does not exist"):
        open_model(tmp_path / "elsewhere")


def test_the_geometry_is_what_the_configuration_says(tmp_path: Path) -> None:
    for name, heads in (("llama-gqa", 2), ("falcon-mqa", 1), ("falcon-new", 2), ("gpt2", 4)):
        folder = write_folder(tmp_path / name, name)
        geometry = open_model(folder).geometry
        assert (geometry.kv_heads, geometry.name, geometry.layers) == (heads, name, 3)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(fields.items()))))
    assert open_model(folder).geometry.config_digest == geometry.config_digest
