"""Digests by which ranks find out whether they hold the same prompt, model and weights.

They tell mistakes apart, not attacks: sums of 64-bit words times pseudo-random factors, modulo 2^64, which a GPU
takes of 16 GB of weights in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvr_partition.runtime.positions import text_config
from kvr_partition.runtime.support import probe

_CHUNK = 1 << 22
"""Words that are multiplied at once; the products take as much memory again."""

# Where a model was read from, how it attends and who wrote its file change no token.
_INDIFFERENT = {"_name_or_path", "architectures", "transformers_version", "use_cache", "dtype", "torch_dtype"}


def prompt_digest(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[int, int, int]:
    """Digest of token ids ``[batch, context]`` and of their mask, if there is one; the least and the largest id.

    Waits for the device, once: a dozen small kernels there would take longer than the host takes for a prompt.
    """
    ids = input_ids.reshape(-1).cpu().long()
    total = _weighted_sum(ids + 1)
    if attention_mask is not None:
        # Of past tokens there is a mask, but no ids.
        total = total * 3 + _weighted_sum(attention_mask.reshape(-1).cpu().long() + 1)
    least, most = ids.aminmax()
    digest, low, high = torch.stack((total, least, most)).tolist()
    return digest, low, high


def past_fingerprint(keys: torch.Tensor, values: torch.Tensor) -> tuple[float, ...]:
    """A few sums over the keys and values of cached tokens ``[batch, heads, tokens, dim]``.

    Ranks that computed them apart may differ by rounding, so that bits cannot be compared. Tokens are added with
    pseudo-random signs: what differs adds up, and what is rounded does not.
    """
    sums = []
    for states in (keys, values):
        tokens = states.shape[2]
        signs = 1.0 - (_factors_for(states.device, tokens) >> 40 & 1).to(torch.float32) * 2
        summed = (states.to(torch.float32) * signs[:, None]).sum(dim=2).reshape(-1)
        folded = torch.nn.functional.pad(summed, (0, -summed.numel() % _FOLDS)).view(-1, _FOLDS).sum(dim=0)
        sums += [folded, torch.linalg.vector_norm(states.to(torch.float32)).reshape(1)]
    return tuple(torch.cat(sums).tolist())


def same_past(one: Sequence[float], other: Sequence[float], dtype: str) -> bool:
    """Whether two fingerprints differ by no more than rounding makes them."""
    if len(one) != len(other):
        return False
    tolerance = max(1e-3, 4 * torch.finfo(getattr(torch, dtype)).eps)
    for at in range(0, len(one), _FOLDS + 1):
        scale = max(one[at + _FOLDS], other[at + _FOLDS])
        # Written so that what is not a number is never the same.
        if not all(abs(one[at + fold] - other[at + fold]) <= tolerance * scale for fold in range(_FOLDS)):
            return False
    return True


_FOLDS = 8
"""Sums of a fingerprint."""


def weights_digest(model: Any) -> int:
    """Digest of every parameter and every buffer that a checkpoint keeps, names, shapes and dtypes included."""
    names, sums = [], []
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            # What modules keep besides (quantisation does) is told apart by how it shows itself.
            names.append(f"{name} {type(tensor).__name__}")
            continue
        names.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        if type(tensor.data) is torch.Tensor and tensor.layout is torch.strided and tensor.numel():
            sums.append(_tensor_sum(tensor.detach()))
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for total in sums:
        by_device.setdefault(total.device, []).append(total)
    for device in sorted(by_device, key=str):
        for value in torch.stack(by_device[device]).tolist():
            digest.update(value.to_bytes(8, "little", signed=True))
    return _number(digest.digest())


def geometry_digest(model: Any) -> int:
    """Digest of a model's configuration, but for what changes no token."""
    return _once(_geometries, model, _geometry)


def layers_digest(model: Any) -> int:
    """Digest of what each layer keeps of a token; see `probe`."""
    return _once(_layers, model, lambda one: repr(probe(one).layers))


def _geometry(model: Any) -> str:
    kept = {
        key: value
        for key, value in text_config(model).to_dict().items()
        if key not in _INDIFFERENT and "attn_implementation" not in key
    }
    return json.dumps([type(model).__name__, kept], sort_keys=True, default=str)


def _once(known: weakref.WeakKeyDictionary[Any, int], model: Any, describe: Callable[[Any], str]) -> int:
    digest = known.get(model)
    if digest is None:
        digest = known[model] = _number(hashlib.blake2b(describe(model).encode(), digest_size=8).digest())
    return digest


_geometries: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_layers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_factors: dict[torch.device, torch.Tensor] = {}


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little", signed=True)


def _tensor_sum(tensor: torch.Tensor) -> torch.Tensor:
    words = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = words.numel() // 8 * 8
    total = _weighted_sum(words[whole:].long() + 1)
    if words.data_ptr() % 8 == 0:
        words = words[:whole].view(torch.int64)
    for position, part in enumerate(words.split(_CHUNK)):
        total = total + _weighted_sum(part.long()) * (2 * position + 3)
    return total


def _weighted_sum(words: torch.Tensor) -> torch.Tensor:
    # A change of the top bit alone would be the same whatever it is multiplied with.
    words = words ^ ((words >> 32) & 0xFFFFFFFF)
    return (words * _factors_for(words.device, words.numel())).sum()


def _factors_for(device: torch.device, count: int) -> torch.Tensor:
    known = _factors.get(device)
    if known is None or known.numel() < count:
        size = max(1 << 12, 1 << (count - 1).bit_length()) if count else 1 << 12
        known = _factors[device] = _mixed(torch.arange(1, size + 1, device=device))
    return known[:count]


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Odd pseudo-random words: the finaliser of SplitMix64, in arithmetic that wraps on every device alike."""
    words = words * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        words = (words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (words ^ ((words >> 31) & ((1 << 33) - 1))) | 1
