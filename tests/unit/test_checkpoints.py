"""Model folders are data: missing weights are named, and nothing of a folder runs or leads out of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvr_partition.checkpoints import read_checkpoint, routes_tokens
from kvr_partition.errors import UnsupportedError
from kvr_partition.runtime.loading import load_model, load_tokenizer
from profiler.models import open_model, probe_shapes
from tests.models import ALL, build, config, write_folder

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 2}


def saved(folder: Path, name: str = "llama-gqa", changes: dict[str, Any] | None = None, **how: Any) -> Path:
    """A checkpoint of a small model."""
    build(name, **(changes or {})).save_pretrained(folder, **how)
    return folder


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def keep(folder: Path, wanted: Callable[[str], bool]) -> None:
    """Leave only some tensors in a checkpoint."""
    file = folder / "model.safetensors"
    save_file(
        {name: one for name, one in load_file(file).items() if wanted(name)}, file, metadata={"format": "pt"}
    )


def refusal(folder: Path) -> str:
    """What the driver says of a folder, before any rank starts; what loading it says is no other kind of error."""
    with pytest.raises(UnsupportedError) as caught:
        probe_shapes(open_model(folder))
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedError) as loading:
        load_model(folder, seed=0)
    assert "\n" not in str(loading.value)
    return str(caught.value)


# ------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ALL)
def test_whole_checkpoints_are_loaded_as_they_were_saved(name: str, tmp_path: Path) -> None:
    folder = open_model(saved(tmp_path, name))
    probe_shapes(folder)
    assert folder.weights(0) == "checkpoint"
    ours, theirs = load_model(tmp_path).state_dict(), build(name).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("form", ["tied", "shards", "links", "pickled", "subfolder"])
def test_forms_in_which_whole_checkpoints_come(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shards = {"max_shard_size": "40KB"} if form in ("shards", "links") else {}
    saved(folder, changes={"tie_word_embeddings": form == "tied"}, **shards)
    if form == "links":  # as in the cache of a hub
        (tmp_path / "blobs").mkdir()
        for at, file in enumerate(folder.glob("*.safetensors")):
            file.rename(tmp_path / "blobs" / str(at))
            file.symlink_to(f"../blobs/{at}")
    if form == "pickled":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    if form == "subfolder":
        (folder / "parts").mkdir()
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "parts" / "one.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "parts/one.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    probe_shapes(open_model(folder))
    right = build("llama-gqa", tie_word_embeddings=form == "tied")
    assert torch.equal(load_model(folder).lm_head.weight, right.lm_head.weight)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (
            lambda name: "layers.1.self_attn" not in name,
            "model.layers.1.self_attn.k_proj.weight and 3 more tensors",
        ),
        (lambda name: name != "lm_head.weight", "no weights for lm_head.weight of the model"),
        (lambda name: name != "model.norm.weight", "no weights for model.norm.weight of the model"),
    ],
)
def test_missing_tensors_are_named(wanted: Callable[[str], bool], says: str, tmp_path: Path) -> None:
    keep(saved(tmp_path), wanted)
    assert says in refusal(tmp_path)


def test_a_missing_expert_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL, "mixtral", MIXTRAL)
    keep(saved(tmp_path, "mixtral"), lambda name: "layers.1" not in name or "experts.2" not in name)
    assert "layers.1.mlp.experts" in refusal(tmp_path)


def test_a_missing_tensor_of_a_pickled_checkpoint_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    tensors = load_file(saved(tmp_path) / "model.safetensors")
    del tensors["lm_head.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match=r"no weights for lm_head\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"intermediate_size": 80}, r"mlp.down_proj.weight is [64, 96], and [64, 80] by config.json"),
        ({"vocab_size": 300}, "is [257, 64], and [300, 64] by config.json"),
        ({"num_hidden_layers": 4}, "no weights for model.layers.3"),
    ],
)
def test_weights_of_another_shape_are_refused(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    edit(saved(tmp_path) / "config.json", **fields)
    assert says in refusal(tmp_path)


def test_experts_of_another_shape_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL, "mixtral", MIXTRAL)
    file = saved(tmp_path, "mixtral") / "model.safetensors"
    tensors = load_file(file)
    cut = next(name for name in tensors if "layers.1" in name and "experts.2" in name)
    tensors[cut] = tensors[cut][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    assert "experts" in refusal(tmp_path)


OTHER_FORMATS = (
    *("model-q4.gguf", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "model.onnx", "model.pt"),
    *("onnx/model.onnx", "model-00001-of-00002.safetensors", "model.fp16.safetensors", "rust_model.ot"),
    *("model.safetensors.part", ".cache/huggingface/download/abc.incomplete", "model.ckpt.index"),
    *("weights.npz", "consolidated.safetensors", "checkpoint-500/model.safetensors"),
)


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_weights_that_would_not_be_loaded_are_no_reason_for_random_ones(name: str, tmp_path: Path) -> None:
    file = write_folder(tmp_path, "llama-gqa") / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"weights")
    assert f"weights that transformers does not load from there ({name})" in refusal(tmp_path)


def test_files_that_an_index_names_are_there(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    assert f"lacks 1 of {len(shards)} files that model.safetensors.index.json names" in refusal(tmp_path)
    assert shards[1].name in refusal(tmp_path)
    for shard in (shards[0], *shards[2:]):
        shard.unlink()
    assert f"lacks {len(shards)} of {len(shards)} files" in refusal(tmp_path)


@pytest.mark.parametrize(
    "where", ["../elsewhere.safetensors", "/etc/hostname", "parts/../../elsewhere.safetensors"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(where: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, where)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names {where!r}, which is outside the folder" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no safetensors file"),
        (b"these are no weights", "is no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "run git lfs pull"),
        (None, "bytes by its header|by its header"),
    ],
)
def test_torn_files_are_refused(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    assert any(words in refusal(tmp_path) for words in says.split("|"))


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (write_folder(tmp_path, "llama-gqa") / "model.safetensors").symlink_to("../blobs/gone")
    assert "model.safetensors leads to no file" in refusal(tmp_path)


def test_random_weights_are_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama-gqa")
    with pytest.raises(UnsupportedError, match="has no weights; give a checkpoint, or a seed"):
        load_model(tmp_path)
    drawn = load_model(tmp_path, seed=0, dtype="float32")
    assert torch.equal(drawn.lm_head.weight, build("llama-gqa").lm_head.weight)
    assert open_model(tmp_path).weights(7) == "random(seed=7)"


@pytest.mark.parametrize(
    ("fields", "routed"),
    [
        (config("llama-gqa"), False),
        (config("gpt-oss"), True),
        (config("deepseek-v3"), True),
        (MIXTRAL, True),
        ({**MIXTRAL, "num_local_experts": 1}, False),
        ({"ffn_config": {"moe_num_experts": 4}}, True),
        ({"text_config": {"num_experts": 8}}, True),
        ({"vision_config": {"num_local_experts": 8}}, False),
        ({"num_experts": [1, 16]}, True),
        ({"num_experts": 16384, "is_moe": False}, False),
    ],
)
def test_random_weights_that_route_say_so(fields: dict[str, Any], routed: bool, tmp_path: Path) -> None:
    assert routes_tokens(fields) is routed
    if "hidden_size" in fields:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert open_model(tmp_path).weights(0) == ("random(seed=0), routed" if routed else "random(seed=0)")


def test_quantised_configurations_without_weights_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama-gqa", quantization_config={"quant_method": "fp8"})
    assert "quantised model (fp8), and the folder has no weights" in refusal(tmp_path)


# ---------------------------------------------------------------------- code


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that code of a folder makes when it runs; whoever asks on standard input fails."""

    def asked(*_: object) -> str:
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", asked)
    return tmp_path / "ran"


def spring(file: Path, trap: Path, code: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\n{code}")


MINE = """
from transformers import LlamaConfig, LlamaForCausalLM
class Mine(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = Mine
"""
MAP = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineForCausalLM"}


def test_a_model_type_that_is_code_of_its_folder_is_refused(trap: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "llama-gqa", model_type="mine", auto_map=MAP)
    spring(folder / "mine.py", trap, MINE)
    assert "model type 'mine' needs code of its folder (auto_map), which is never run" in refusal(folder)
    assert not trap.exists()


def test_a_known_model_type_is_transformers_own_whatever_code_is_beside_it(trap: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    edit(folder / "config.json", auto_map=MAP)
    spring(folder / "mine.py", trap, MINE)
    spring(folder / "custom_generate" / "generate.py", trap, "def generate(model, **_): return None\n")
    probe_shapes(open_model(folder))
    model = load_model(folder)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert model.generate(torch.arange(3)[None], max_new_tokens=1, do_sample=False).shape == (1, 4)
    write_folder(tmp_path / "alone", "llama-gqa", auto_map=MAP)
    spring(tmp_path / "alone" / "mine.py", trap, MINE)
    load_model(tmp_path / "alone", seed=0)
    assert not trap.exists()


def test_a_tokenizer_that_is_code_of_its_folder_is_refused(trap: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "llama-gqa")
    spring(folder / "mine.py", trap, "class Mine: pass\n")
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedError, match="needs code of its folder"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": ["../tokenizer.4.0.json"]}))
    with pytest.raises(UnsupportedError, match="names files outside the folder"):
        load_tokenizer(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"attn_implementation": "kernels-community/flash-attn"},
            "'kernels-community/flash-attn', which comes from",
        ),
        ({"_attn_implementation": "flash|me/mine@main:f"}, "which comes from a hub"),
        ({"attn_implementation": {"": "me/mine"}}, "'me/mine', which comes from a hub"),
        ({"nested": {"_attn_implementation": "me/mine"}}, "nested._attn_implementation asks for 'me/mine'"),
        ({"attn_implementation": "my_own"}, "'my_own', which is not part of transformers itself"),
        ({"attn_implementation": "flash_attention_2"}, "'flash_attention_2', which is not installed here"),
        ({"experts_implementation": "sonicmoe"}, "'sonicmoe', which is not part of transformers itself"),
        ({"configuration_files": ["config.4.0.0.json"]}, "sends transformers to other files"),
        ({"transformers_weights": "../model.safetensors"}, "'../model.safetensors', outside the folder"),
        ({"transformers_weights": "other.safetensors"}, "lacks other.safetensors"),
        ({"vision_config": {"architecture": "hf-hub:me/mine"}}, "names a model elsewhere, 'hf-hub:me/mine'"),
    ],
    ids=str,
)
def test_configurations_that_ask_for_something_from_elsewhere_are_refused(
    fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in refusal(write_folder(tmp_path, "llama-gqa", **fields))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_that_transformers_has_is_taken_as_asked_for(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, "llama-gqa", attn_implementation=name)
    assert load_model(tmp_path, seed=0).config._attn_implementation == name


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_are_refused(name: str, tmp_path: Path) -> None:
    (saved(tmp_path) / name).write_text('{"base_model_name_or_path": "someone/else"}')
    assert f"holds an adapter ({name})" in refusal(tmp_path)


def test_distributed_checkpoints_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    file.rename(tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    assert "is a distributed checkpoint" in refusal(tmp_path)


def test_what_a_folder_holds_is_read_without_loading_it(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path))
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    assert checkpoint.shapes["lm_head.weight"] == (257, 64)
    assert checkpoint.quantization is None
