"""Compare what a rank holds after a prefill with the single run, against higher precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from kvr_partition.certificate import Deviation
from kvr_partition.dtypes import DTYPES
from kvr_partition.partition import Partition
from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.chunk import not_finite
from kvr_partition.runtime.decoding import top_is_finite
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.support import first_token, forward


@dataclass(frozen=True)
class SingleRun:
    """The whole prompt on one rank, with every layer's KV kept in full, windows or not."""

    logits: torch.Tensor
    token: torch.Tensor
    cache: Any


@torch.no_grad()
def run_single(model: Any, input_ids: torch.Tensor) -> SingleRun:
    """The prompt through the model's stock attention.

    Raises:
        NotFiniteError: its logits are NaN or infinite, so that nothing can be compared with them.
    """
    cache = DynamicCache()  # without a configuration no layer forgets what its window has passed
    logits, token, top = first_token(forward(model, input_ids, cache))
    if not top_is_finite(top):
        raise not_finite(cache, Partition((input_ids.shape[1],)))
    return SingleRun(logits, token, cache)


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision to compare with."""
    return getattr(torch, DTYPES[str(dtype).removeprefix("torch.")].reference)  # type: ignore[no-any-return]


def run_reference(model: Any, input_ids: torch.Tensor) -> SingleRun:
    """The prompt in higher precision, on the same weights."""
    higher = copy.deepcopy(model).to(reference_dtype(model.dtype))
    if getattr(higher.config, "_experts_implementation", None) is not None:
        # Grouped products of experts are there for single and half precision only.
        higher.set_experts_implementation("eager")
    return run_single(higher, input_ids)


def compare(result: PrefillResult, first: int, single: SingleRun, reference: SingleRun) -> list[Deviation]:
    """How far a rank's KV, layer by layer, and its logits are from the reference, beside the single run.

    Args:
        result: of a KV-Runahead prefill, or of one whose cache is no `RunaheadCache` in the order of
            positions; of that only the logits are compared.
        first: absolute position after the rank's last token.
        single, reference: of the whole prompt.
    """
    found = []
    if isinstance(result.cache, RunaheadCache):
        for index, layer in result.cache.kv_layers:
            stored = layer.filled
            ours = (layer.store.keys(0, stored), layer.store.values(0, stored))
            alone, right = (
                (run.cache.layers[index].keys, run.cache.layers[index].values) for run in (single, reference)
            )
            low = first - stored
            pairs = [
                (_distance(one, exact[:, :, low:first]), _distance(same[:, :, low:first], exact[:, :, low:first]))
                for one, same, exact in zip(ours, alone, right, strict=True)
            ]
            found.append(Deviation(result.rank, index, max(p[0] for p in pairs), max(p[1] for p in pairs)))
    if result.logits is not None:
        found.append(
            Deviation(
                result.rank,
                None,
                _distance(result.logits, reference.logits),
                _distance(single.logits, reference.logits),
            )
        )
    return found


def _distance(found: torch.Tensor, right: torch.Tensor) -> float:
    right = right.double()
    distance = (torch.linalg.vector_norm(found.double() - right) / torch.linalg.vector_norm(right)).item()
    return distance if distance == distance else float("inf")  # NaN is as far as can be
