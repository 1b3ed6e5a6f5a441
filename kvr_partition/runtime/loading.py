"""Models and tokenizers from folders: no code of a folder runs, and no weight is made up in silence."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvr_partition.checkpoints import Checkpoint, is_inside, read_checkpoint, read_json
from kvr_partition.errors import KVRError, UnsupportedError
from kvr_partition.runtime.support import check_config

_HUB_KERNELS = frozenset({"eetq", "fbgemm_fp8", "fp8", "metal", "mxfp4", "mxfp8", "nvfp4"})
"""Quantisation methods whose kernels transformers fetches where the package ``kernels`` is installed."""


def load_model(
    folder: str | os.PathLike[str] | Checkpoint,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    seed: int | None = None,
) -> Any:
    """A causal LM from a folder, in eval mode on its device, checked for what KV-Runahead needs.

    Args:
        dtype: of the weights, like ``"bfloat16"``; as the checkpoint has it by ``"auto"``.
        seed: draw random weights from it where the folder holds a configuration alone. They are drawn on the
            device: ranks with the same kind of device get the same ones, and nothing large passes through host
            memory. None refuses such a folder.

    Raises:
        UnsupportedError: weights that are missing or of other shapes, a model that needs code of the folder, or
            one that transformers cannot build.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else read_checkpoint(folder)
    if not checkpoint.has_weights and seed is None:
        raise UnsupportedError(
            f"{checkpoint.path} has no weights; give a checkpoint, or a seed for random weights"
        )
    return build(checkpoint, load_config(checkpoint), dtype=dtype, device=device, seed=seed)


def load_config(checkpoint: Checkpoint) -> Any:
    """The configuration of a causal LM that can be split.

    Raises:
        UnsupportedError: not a causal LM of transformers, or one that keeps something else than KV.
    """
    file = checkpoint.path / "config.json"
    kind = checkpoint.config["model_type"]
    if "auto_map" in checkpoint.config and kind not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{file}: model type {kind!r} needs code of its folder (auto_map), which is never run; give a "
            "checkpoint of a model type that transformers has"
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers finds wrong with it, it is the file that is wrong
        raise UnsupportedError(f"{file} is not accepted by transformers: {first_line(error)}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(f"{file}: {config.model_type} is no causal LM of transformers")
    for part in _parts(config):
        # Transformers never gets to see that there is code, wherever it passes a part of a configuration on.
        part.__dict__.pop("auto_map", None)
        _check_attention_package(part, checkpoint)
    try:
        check_config(config)
    except KVRError:
        raise
    except Exception as error:  # a field with values that its own class cannot work with
        raise UnsupportedError(f"{file} is not accepted by transformers: {first_line(error)}") from None
    if checkpoint.quantization in _HUB_KERNELS and importlib.util.find_spec("kernels") and not _offline():
        raise UnsupportedError(
            f"{file}: transformers fetches kernels from a hub for weights quantised by {checkpoint.quantization}; "
            "set HF_HUB_OFFLINE=1 to use those that are already here"
        )
    return config


def build(
    checkpoint: Checkpoint,
    config: Any,
    *,
    dtype: str,
    device: str | torch.device,
    seed: int | None,
    **options: Any,
) -> Any:
    """The model of a configuration: with the checkpoint's weights, or random ones where it has none.

    Args:
        options: more for transformers' ``from_pretrained``.

    Raises:
        UnsupportedError: weights that are missing or of other shapes, or transformers cannot build the model.
    """
    with _one_line(f"transformers cannot build the model of {checkpoint.path}"):
        if checkpoint.has_weights:
            model = _from_pretrained(
                AutoModelForCausalLM,
                checkpoint,
                checkpoint.path,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
            # Transformers itself has put layers that ranks share, and quantised weights, where they belong.
            placed = bool(options) or model.device == torch.device(device)
            return (model if placed else model.to(torch.device(device))).eval()
        torch.manual_seed(seed or 0)
        wanted = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False).eval()


def check_tensors(model: Any, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors are not those of the model, from their names and shapes alone.

    Transformers itself fits them in, as it will when it loads them, but without data (on the meta device).
    Where it needs a package for that which is not there, or the format does not tell shapes, loading will tell.

    Args:
        model: of the same configuration, on any device.

    Raises:
        UnsupportedError: tensors are missing or have other shapes.
    """
    if not checkpoint.shapes or checkpoint.quantization or not importlib.util.find_spec("accelerate"):
        return
    state = {name: torch.empty(shape, device="meta") for name, shape in checkpoint.shapes.items()}
    with _one_line(f"transformers cannot build the model of {checkpoint.path}"):
        _from_pretrained(
            type(model), checkpoint, None, config=model.config, state_dict=state, device_map={"": "meta"}
        )


def load_tokenizer(folder: str | os.PathLike[str] | Checkpoint) -> Any:
    """The tokenizer of a model folder.

    Raises:
        UnsupportedError: none that transformers can load, or one that needs code of the folder.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else read_checkpoint(folder)
    path = checkpoint.path
    config = load_config(checkpoint)
    file = path / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise UnsupportedError(f"{file} is no configuration of a tokenizer")
    versions = settings.get("fast_tokenizer_files") or []
    if not isinstance(versions, list) or not all(map(is_inside, versions)):
        raise UnsupportedError(f"{file} names files outside the folder (fast_tokenizer_files); they are not read")
    try:
        return AutoTokenizer.from_pretrained(path, config=config, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises many kinds for the one fact that there is none
        if "auto_map" in settings:
            raise UnsupportedError(
                f"the tokenizer of {path} needs code of its folder (auto_map), which is never run; "
                "give token ids instead of text (--prompt-ids)"
            ) from None
        raise UnsupportedError(
            f"{path} has no tokenizer that transformers can load; give token ids instead of text (--prompt-ids)"
        ) from None


def load_generation_config(checkpoint: Checkpoint) -> GenerationConfig | None:
    """The generation settings of a checkpoint; None where it has none, or has no weights to generate with.

    Raises:
        UnsupportedError: settings that transformers does not accept.
    """
    file = checkpoint.path / "generation_config.json"
    if not checkpoint.has_weights or not file.is_file():
        return None
    read_json(file)
    try:
        return GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:  # any setting may be one that some version of transformers does not accept
        raise UnsupportedError(f"{file} is not accepted by transformers: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """An error's message in one line, with its type where that says more."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if line and not isinstance(error, KeyError) else f"{type(error).__name__} {line}".strip()


def _from_pretrained(model_class: Any, checkpoint: Checkpoint, path: Any, **options: Any) -> Any:
    """What transformers loads, refused unless every tensor was there and fitted."""
    report = _LoadReport()
    logger = logging.getLogger("transformers.modeling_utils")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logger.addFilter(report)
    transformers.utils.logging.disable_progress_bar()
    try:
        # Tensors that do not fit are told by name, where transformers would only say that there are some.
        model, info = model_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except RuntimeError as error:
        if report.unconverted:
            raise UnsupportedError(
                f"{checkpoint.path} has tensors for {report.unconverted} that do not fit the model of its "
                "config.json; give the configuration that belongs to the weights"
            ) from error
        raise
    finally:
        logger.removeFilter(report)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UnsupportedError(
            f"{checkpoint.path} has no weights for {missing[0]}{more} of the model its config.json describes; "
            "give a complete checkpoint"
        )
    mismatched = sorted(info["mismatched_keys"], key=lambda one: str(one[0]))
    if mismatched:
        name, stored, needed = mismatched[0]
        more = f"; {len(mismatched) - 1} more tensors do not fit" if len(mismatched) > 1 else ""
        raise UnsupportedError(
            f"{checkpoint.path}: {name} is {list(stored)}, and {list(needed)} by config.json{more}; give the "
            "configuration that belongs to the weights"
        )
    return model


class _LoadReport(logging.Filter):
    """Takes over transformers' table of tensors that are not as they should be: one line says it."""

    def __init__(self) -> None:
        super().__init__()
        self.unconverted = ""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return True
        for line in text.splitlines():
            name, _, status = line.partition("|")
            if status.strip().startswith("CONVERSION"):
                self.unconverted = self.unconverted or name.strip()
        return not any(word in text for word in ("MISSING", "MISMATCH", "CONVERSION"))


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What goes wrong in transformers, as an error of ours; memory that does not suffice stays what it is."""
    try:
        yield
    except (KVRError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # any configuration can fail in any way where nobody has tried it
        raise UnsupportedError(f"{what}: {first_line(error)}") from error


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _check_attention_package(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse FlashAttention where it is not installed: transformers would take it from a hub."""
    name = config._attn_implementation
    if isinstance(name, str) and name.startswith("flash_attention_"):
        there = getattr(transformers.utils, f"is_flash_attn_{name[-1]}_available", lambda: False)()
        if not there:
            raise UnsupportedError(
                f"{checkpoint.path / 'config.json'} asks for attention implementation {name!r}, which is not "
                "installed here; take the field out to use sdpa"
            )


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
