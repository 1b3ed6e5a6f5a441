"""The runtime on a CUDA device. Skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvr_partition import Partition
from kvr_partition.errors import UnsupportedError
from kvr_partition.runtime import decode, prefill, probe, single
from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.links import NoLinks
from kvr_partition.runtime.prefill import PrefillResult, run_chunk
from profiler import Candidate, RankGroup, SamplingPlan
from tests.models import CORE, build, write_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.float() - right.float()).abs().max() / right.float().abs().max()).item()


def in_turn(model: Any, input_ids: torch.Tensor, partition: Partition, depth: Any) -> PrefillResult:
    """All ranks of a partition one after the other on one device, each prefix copied from the rank before."""
    before: RunaheadCache | None = None
    result: PrefillResult | None = None
    for rank, (start, end) in enumerate(zip(partition.starts, partition.ends, strict=True)):

        def fill(cache: RunaheadCache, source: RunaheadCache | None = before) -> None:
            if source is None:
                return
            for (_, layer), (_, earlier) in zip(cache.kv_layers, source.kv_layers, strict=True):
                layer.store.rows[: layer.kept_prefix] = earlier.store.rows[-layer.kept_prefix :]

        result = run_chunk(
            model,
            input_ids[:, start:end],
            prefix=start,
            rank=rank,
            ranks=partition.ranks,
            links=NoLinks(),
            depth=depth,
            fill=fill,
        )
        before = result.cache
    assert result is not None
    return result


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
@pytest.mark.parametrize("sizes", [(24, 23), (1, 44, 2)])
def test_chunks_on_the_device_equal_the_single_run(
    name: str, dtype: torch.dtype, tolerance: float, sizes: tuple[int, ...]
) -> None:
    model = build(name).to(device="cuda", dtype=dtype)
    exact = build(name).to("cuda")
    input_ids = torch.randint(0, 257, (1, sum(sizes)), generator=torch.Generator().manual_seed(5)).cuda()
    right = single(exact, input_ids)
    for depth in ("attention", "cache") if probe(model).attention_depth else ("cache",):
        out = in_turn(model, input_ids, Partition(sizes), depth)
        assert out.logits is not None
        assert right.logits is not None
        assert relative(out.logits, right.logits) < tolerance
        for index, layer in out.cache.kv_layers:
            assert relative(layer.keys, right.cache.layers[index].keys) < tolerance
        if dtype == torch.float32:
            assert torch.equal(
                decode(model, input_ids, out, 16), decode(exact, input_ids, single(exact, input_ids), 16)
            )


def test_one_rank_over_nccl(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "llama-gqa")
    with RankGroup(folder, ranks=1, backend="cuda", dtype="float16", timeout_s=120) as group:
        measured = group.measure_many(
            [Candidate.single(47), Candidate("kvr", Partition((47,)))], plan=SamplingPlan(1, 6, 6)
        )
        assert all(one.ok for one in measured)
        origin = group.provenance
        assert (origin.backend, origin.depth) == ("cuda", "attention")
        assert origin.nccl is not None
        assert origin.driver is not None
        assert measured[1].samples[0].ranks[0].compute_s > 0


def test_more_ranks_than_gpus_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "llama-gqa")
    many = torch.cuda.device_count() + 1
    with pytest.raises(UnsupportedError, match="needs one GPU a rank"):
        RankGroup(folder, ranks=many, backend="cuda")


def test_the_whole_prompt_at_once_matches_stock_attention_in_half_precision() -> None:
    model = build("llama-gqa").to(device="cuda", dtype=torch.float16)
    input_ids = torch.arange(200).cuda()[None] % 257
    out = prefill(model, input_ids, Partition((200,)))
    right = single(model, input_ids)
    assert out.logits is not None
    assert right.logits is not None
    assert relative(out.logits, right.logits) < 5e-3
    timeline = out.timeline
    assert len(timeline.layers) == 3
    assert timeline.compute_s > 0
