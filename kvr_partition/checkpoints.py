"""Checkpoints: what a model folder holds, read without loading any of it, and what is refused by name.

A folder is data. What would make transformers run code of it, fetch code for it, read outside it or draw random
numbers in place of weights is refused here, before transformers sees the folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from kvr_partition.errors import UnsupportedError

LOADED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers loads weights from; the first one that is there."""

WEIGHT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "pkl", "pickle", "nemo", "pte", "dduf", "incomplete"),
        *("gguf", "ggml", "llamafile", "h5", "hdf5", "keras", "pb", "tflite", "task", "litertlm", "msgpack"),
        *("npz", "onnx", "onnx_data", "ot", "pdparams", "mlmodel", "engine", "plan"),
    )
)
"""Endings of files that hold weights in one program or another, unfinished downloads included."""

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attention implementations that are part of transformers or of a package beside it."""

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Implementations of experts that transformers does not fetch from a hub."""

_TEXT = frozenset({".md", ".txt", ".json", ".py", ".yaml", ".yml", ".toml", ".html"})
"""Endings of files that say something of weights and hold none."""

_DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, looked through.

    Attributes:
        path: the folder.
        config: what its config.json says.
        files: the files that weights are loaded from; none in a folder with a configuration alone.
        shapes: of the tensors in them, by name; empty where the format does not tell without loading.
        quantization: the method that its weights are quantised by, or None.
    """

    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    quantization: str | None

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to load."""
        return bool(self.files)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Look through a model folder.

    Raises:
        UnsupportedError: no such folder, no readable config.json, weights that are not all there or that
            transformers does not load, or a configuration that asks for code or files from elsewhere.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        raise UnsupportedError(f"model folder {folder} does not exist; give a folder with a config.json")
    if not file.is_file():
        raise UnsupportedError(f"model folder {folder} has no config.json; give a Hugging Face model folder")
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UnsupportedError(f"{file} names no model_type; give a Hugging Face configuration")
    _check_references(config, file)
    for name in _ADAPTERS:
        if os.path.lexists(folder / name):
            raise UnsupportedError(
                f"{folder} holds an adapter ({name}), which belongs to another model; merge it into that model "
                "and give the merged folder"
            )
    files = _weight_files(folder, config)
    quantization = _quantization(config)
    if quantization is not None and not files:
        raise UnsupportedError(
            f"{file} is of a quantised model ({quantization}), and the folder has no weights; add them, or take "
            "quantization_config out to run the model unquantised with random weights"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for one in files:
        if one.suffix == ".safetensors":
            shapes.update(_stored_shapes(one))
    return Checkpoint(folder, config, files, shapes, quantization)


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UnsupportedError: it cannot be read.
    """
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"{file} is no readable JSON: {error}") from None


def is_inside(name: object) -> bool:
    """Whether a file name that was read from a folder stays in that folder."""
    if not isinstance(name, str) or not name:
        return False
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts


def routes_tokens(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a mixture of experts, where weights decide which work a token makes."""
    if config.get("is_moe") is False:
        return False
    for _, key, value in _fields(config, skip=("vision_config", "audio_config")):
        if re.fullmatch(r"(moe_)?n(um)?_(local_|routed_)?experts", key):
            counts = value if isinstance(value, list) else [value]
            if any(isinstance(count, int) and count > 1 for count in counts):
                return True
    return False


def _fields(
    config: Mapping[str, Any], skip: tuple[str, ...] = (), within: str = ""
) -> Iterator[tuple[str, str, Any]]:
    """Every field of a configuration and of those nested in it: its full name, its name, its value."""
    for key, value in config.items():
        name = str(key)
        yield f"{within}{name}", name, value
        if isinstance(value, dict) and name not in skip:
            yield from _fields(value, skip, f"{within}{name}.")


def _check_references(config: Mapping[str, Any], file: Path) -> None:
    """Refuse fields that make transformers fetch code or read other files."""
    if "configuration_files" in config:
        raise UnsupportedError(
            f"{file} sends transformers to other files (configuration_files); put the configuration itself there"
        )
    for full, name, value in _fields(config):
        plain = name.strip("_").removesuffix("_internal")
        given = list(value.values()) if isinstance(value, dict) else [value]
        names = [one for one in given if isinstance(one, str)]
        if plain in ("attn_implementation", "experts_implementation"):
            known = ATTENTION if plain == "attn_implementation" else EXPERTS
            wrong = next((one for one in names if one not in known), None)
            if wrong is not None:
                where = "comes from a hub" if "/" in wrong else "is not part of transformers itself"
                raise UnsupportedError(
                    f"{file}: {full} asks for {wrong!r}, which {where}; take the field out, or give one of "
                    f"{', '.join(known)}"
                )
        # Names of vision encoders may be places to load them from.
        if plain in ("architecture", "backbone") and any(re.search("[:/]", one) for one in names):
            raise UnsupportedError(
                f"{file}: {full} names a model elsewhere, {names[0]!r}; nothing is fetched for it"
            )


def _quantization(config: Mapping[str, Any]) -> str | None:
    for _, name, value in _fields(config):
        if name in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method") or value.get("quant_algo") if isinstance(value, dict) else None
            return str(method or "unnamed method")
    return None


def _weight_files(folder: Path, config: Mapping[str, Any]) -> tuple[Path, ...]:
    named = config.get("transformers_weights")
    if named is not None and not is_inside(named):
        raise UnsupportedError(
            f"{folder / 'config.json'}: transformers_weights names {named!r}, outside the folder"
        )
    distributed = next((path.name for path in folder.iterdir() if _DISTRIBUTED_SHARD.fullmatch(path.name)), None)
    if distributed is not None:
        raise UnsupportedError(
            f"{folder} is a distributed checkpoint ({distributed}); load it with transformers and save it whole"
        )
    for name in LOADED if named is None else (named,):
        file = folder / name
        if not os.path.lexists(file):
            continue
        if not file.is_file():
            raise UnsupportedError(f"{file} leads to no file; download or copy the weights again")
        return _shards(folder, file) if name.endswith(".index.json") else (file,)
    if named is not None:
        raise UnsupportedError(f"{folder} lacks {named}, which transformers_weights of its config.json names")
    others = sorted(_other_weights(folder))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UnsupportedError(
            f"{folder} has weights that transformers does not load from there ({', '.join(others[:3])}{more}); "
            f"convert them to {LOADED[0]}, or give a folder with a config.json alone for random weights"
        )
    return ()


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    """The files that an index names."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
        raise UnsupportedError(f"{index} is no index of weights: it needs metadata and a weight_map")
    outside = next((name for name in weight_map.values() if not is_inside(name)), None)
    if outside is not None:
        raise UnsupportedError(f"{index} names {outside!r}, which is outside the folder; nothing is read there")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UnsupportedError(
            f"{folder} lacks {len(missing)} of {len(names)} files that {index.name} names, first {missing[0]}; "
            "download or copy them"
        )
    return tuple(folder / name for name in names)


def _other_weights(folder: Path) -> Iterator[str]:
    for at, folders, names in os.walk(folder):
        # What a version control system keeps is not the model's.
        folders[:] = [name for name in folders if not name.startswith(".git")]
        for name in names:
            index = name.endswith((".safetensors.index.json", ".bin.index.json"))
            suffixes = PurePath(name).suffixes
            if index or (WEIGHT_SUFFIXES & set(suffixes) and suffixes[-1] not in _TEXT):
                yield str(PurePath(at, name).relative_to(folder))


def _stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, from its header: eight bytes of length, JSON, data."""
    try:
        with file.open("rb") as stream:
            begin = stream.read(8)
            length = int.from_bytes(begin, "little")
            size = os.fstat(stream.fileno()).st_size
            header = json.loads(stream.read(length)) if 8 + length <= size else None
        stored = {name: one for name, one in header.items() if name != "__metadata__"}  # type: ignore[union-attr]
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in stored.values()), default=0)
        shapes = {name: tuple(int(count) for count in one["shape"]) for name, one in stored.items()}
    except OSError as error:
        raise UnsupportedError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        if begin == b"version ":
            raise UnsupportedError(f"{file} is a pointer of Git LFS, not the weights; run git lfs pull") from None
        raise UnsupportedError(f"{file} is no safetensors file; download or copy the weights again") from None
    if size != end:
        raise UnsupportedError(f"{file} has {size} bytes, and {end} by its header; download or copy it again")
    return shapes
