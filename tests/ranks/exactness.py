"""Runs on real gloo ranks, in processes of its own: compares every method with the single run.

``python -m tests.ranks.exactness FOLDER RANK RANKS`` reads ``FOLDER/cases.json`` and writes what it found,
on the rank that has the first token, to ``FOLDER/results<rank>.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from kvr_partition import Partition
from kvr_partition.errors import UnsupportedError
from kvr_partition.runtime import LinkLimits, PrefillResult, decode, prefill, probe, stock, tsp, zigzag
from kvr_partition.runtime.chunk import chunk_cache
from kvr_partition.runtime.gathering import check_gathering, parts_of
from kvr_partition.runtime.links.group import links_of
from tests.models import build
from tests.ranks.launch import rank_device

NEW_TOKENS = 16
LIMITS = LinkLimits(bandwidth=20e6, noise=30_000, seed=3)


class LargestAllocation(TorchDispatchMode):
    """Notes the largest storage that any operation made for a result, in bytes; bare ``empty`` is not one."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.op = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            made = storage.data_ptr() not in given and "aten.empty" not in str(func)
            if made and storage.nbytes() > self.bytes:
                self.bytes, self.op = storage.nbytes(), str(func)
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference as a share of the largest value; infinite for NaN or another shape."""
    if found.shape != right.shape or not torch.isfinite(found).all():
        return float("inf")
    return ((found - right).abs().max() / right.abs().max()).item()


_references: dict[Any, tuple[PrefillResult, torch.Tensor]] = {}
"""Of prompts that several methods read, by what they depend on."""


def reference(
    name: str, model: Any, input_ids: torch.Tensor, mask: torch.Tensor | None
) -> tuple[PrefillResult, torch.Tensor]:
    """What one rank has of a prompt, and what transformers generates."""
    key = name, str(input_ids.tolist()), None if mask is None else str(mask.tolist())
    if key not in _references:
        generated = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids) if mask is None else mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        right = stock(model, input_ids, attention_mask=mask)
        _references[key] = right, generated[:, input_ids.shape[1] :]
    return _references[key]


def run(case: dict[str, Any], model: Any) -> dict[str, Any] | None:
    """One case on this rank; what the last rank found out."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes, batch = case["sizes"], case["batch"]
    past: int = case.get("past", 0)
    context = past + sum(sizes)
    generator = torch.Generator().manual_seed(context)
    input_ids = torch.randint(0, 257, (batch, context), generator=generator).to(model.device)
    partition = Partition(sizes, past)
    before: Any = stock(model, input_ids[:, :past]).cache if past else None
    links_of_all = links_of(None, model.device)
    if case["method"] == "past-in-place":
        room = partition.ends[rank] - past
        execution = links_of_all.execution
        before = chunk_cache(model, input_ids[:, :0], prefix=past, reserve=room, past=before, execution=execution)
    layers: Any = case.get("layers", "auto")
    out: PrefillResult
    with LargestAllocation() as largest:
        match case["method"]:
            case "tsp" | "tsp-causal":
                out = tsp(model, input_ids, layers=layers, causal=case["method"] == "tsp-causal")
            case "tsp-limited":
                out = tsp(model, input_ids, layers=layers, limits=LIMITS)
            case "zigzag":
                out = zigzag(model, input_ids, layers=layers)
            case "chain-limited":
                out = prefill(model, input_ids, partition, layers=layers, limits=LIMITS)
            case "fanout-limited":
                out = prefill(model, input_ids, partition, layers=layers, topology="fanout", limits=LIMITS)
            case "past" | "past-in-place" | "past-cache-depth":
                depth = "cache" if case["method"] == "past-cache-depth" else "auto"
                out = prefill(model, input_ids[:, past:], partition, layers=layers, depth=depth, past=before)
            case "chain":
                out = prefill(model, input_ids, partition, layers=layers, topology="chain")
            case "fanout":
                out = prefill(model, input_ids, partition, layers=layers, topology="fanout")
            case "padded":
                # All of the first rank's chunk and half of the second one's is padding, in one of the prompts.
                mask = torch.ones_like(input_ids)
                mask[0, : partition.ends[0] + sizes[1] // 2] = 0
                out = prefill(model, input_ids, partition, layers=layers, attention_mask=mask)
            case depth:
                out = prefill(model, input_ids, partition, layers=layers, depth=depth)
    sent = torch.tensor([out.kv_bytes])
    dist.all_reduce(sent)
    held = torch.zeros(ranks, dtype=torch.long)
    held[rank] = out.cache.kv_bytes
    dist.all_reduce(held)
    assert out.is_last == (rank == ranks - 1)
    finishes = rank == (0 if case["method"] == "zigzag" else ranks - 1)
    assert (out.logits is None) == (out.first_token is None) == (not finishes)
    if out.timeline.layers:
        assert all(layer.wait_s >= 0 for layer in out.timeline.layers)
    if not finishes:
        return None
    assert out.logits is not None
    right, generated = reference(case["model"], model, input_ids, out.attention_mask)
    # Decoding needs more room, so this is asked first.
    shared = before is not None and any(
        getattr(layer, "store", None) is earlier.store
        for layer, earlier in zip(out.cache.layers, before.layers, strict=True)
        if hasattr(earlier, "store")
    )
    kv_errors = []
    order = torch.arange(context)
    if case["method"] == "zigzag":
        for part in (part for of_rank in parts_of("zigzag", context, ranks) for part in of_rank):
            order[part.start : part.end] = torch.arange(part.rows, part.rows + part.tokens)
    for index, layer in out.cache.kv_layers:
        keys, values = (
            (layer.keys[:, :, order], layer.values[:, :, order])
            if case["method"] == "zigzag"
            else (layer.keys, layer.values)
        )
        # What padding leaves in a cache is seen by nobody.
        real = (
            torch.ones(batch, context, device=model.device) if out.attention_mask is None else out.attention_mask
        )
        kept = real[:, None, -keys.shape[2] :, None]
        kv_errors.append(relative(keys * kept, right.cache.layers[index].keys * kept))
        kv_errors.append(relative(values * kept, right.cache.layers[index].values * kept))
    assert right.logits is not None
    error = relative(out.logits, right.logits)
    support = probe(model)
    one_layer = next(layer for layer in support.layers if layer is not None)
    return {
        **case,
        "logits_error": error,
        "kv_error": max(kv_errors),
        "kv_layers": len(kv_errors) // 2,
        "same_tokens": torch.equal(decode(model, input_ids, out, NEW_TOKENS), generated),
        "sent_bytes": int(sent),
        "held_bytes": held.tolist(),
        "entry_bytes": support.entry_elements(batch) * 4,
        "layer_keys_bytes": context * batch * one_layer.key_heads * one_layer.key_dim * 4,
        "largest_allocation": largest.bytes,
        "largest_allocation_op": largest.op,
        "attention_depth": support.attention_depth,
        "past_rows_shared": shared,
        "link": links_of_all.link,
        "full_layers": any(layer is not None and layer.window is None for layer in support.layers),
    }


@contextmanager
def group(folder: Path, rank: int, ranks: int) -> Iterator[None]:
    """A gloo world that meets in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=ranks)
    yield
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """One rank."""
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    results = []
    with group(folder, rank, ranks):
        built: dict[str, Any] = {}
        asked = folder / "device"
        device = rank_device(asked.read_text() if asked.exists() else "cpu", rank)
        for case in json.loads((folder / "cases.json").read_text()):
            model = built.get(case["model"])
            if model is None:
                built.clear()
                model = built[case["model"]] = build(case["model"]).to(device)
                model.generation_config.pad_token_id = 0
            support = probe(model)
            if case["method"] == "attention" and not support.attention_depth:
                continue
            if case["method"] in ("tsp-causal", "zigzag"):
                try:
                    check_gathering(support, case["method"])
                except UnsupportedError:
                    continue
            results.append(run(case, model))
    found = [result for result in results if result is not None]
    (folder / f"results{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
