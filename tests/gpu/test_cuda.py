"""The runtime on a CUDA device. Skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvr_partition import Partition
from kvr_partition.errors import UnsupportedError
from kvr_partition.runtime import decode, prefill, probe, stock
from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.links.plan import NoLinks
from kvr_partition.runtime.result import PrefillResult
from profiler import Candidate, RankGroup, SamplingPlan
from profiler.rank import random_prefix
from tests.models import CORE, build, write_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.float() - right.float()).abs().max() / right.float().abs().max()).item()


def in_turn(model: Any, input_ids: torch.Tensor, partition: Partition, depth: Any) -> PrefillResult:
    """All ranks of a partition one after the other on one device, each prefix copied from the rank before."""
    before: RunaheadCache | None = None
    result: PrefillResult | None = None
    for rank, (start, end) in enumerate(zip(partition.starts, partition.ends, strict=True)):
        chunk = input_ids[:, start:end]
        cache = chunk_cache(model, chunk, prefix=start, past=before)
        result = run_chunk(model, chunk, cache, rank=rank, ranks=partition.ranks, links=NoLinks(), depth=depth)
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
    right = stock(exact, input_ids)
    for depth in ("attention", "cache") if probe(model).attention_depth else ("cache",):
        out = in_turn(model, input_ids, Partition(sizes), depth)
        assert out.logits is not None
        assert right.logits is not None
        assert relative(out.logits, right.logits) < tolerance
        for index, layer in out.cache.kv_layers:
            assert relative(layer.keys, right.cache.layers[index].keys) < tolerance
        if dtype == torch.float32:
            assert torch.equal(
                decode(model, input_ids, out, 16), decode(exact, input_ids, stock(exact, input_ids), 16)
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
    right = stock(model, input_ids)
    assert out.logits is not None
    assert right.logits is not None
    assert relative(out.logits, right.logits) < 5e-3
    timeline = out.timeline
    assert len(timeline.layers) == 3
    assert timeline.compute_s > 0


SM_METHODS = ("kvr-chain", "kvr-fanout", "tsp", "tsp-causal", "zigzag")


@pytest.mark.parametrize("name", ["llama-gqa", "falcon-mqa", "mistral-window"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_sm_partition_ranks_equal_the_single_run(name: str, ranks: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / name, name, hidden_size=256, num_attention_heads=4)
    uneven = {2: (301, 99), 3: (200, 150, 50)}[ranks]
    for dtype in ("float32", "float16"):
        with RankGroup(folder, ranks=ranks, backend="sm", dtype=dtype, timeout_s=200) as group:
            assert group.tile_rows == 128
            group.hold_links(None)
            for method in SM_METHODS:
                sizes = uneven if method.startswith("kvr") else Partition.even(400, ranks).sizes
                candidate = Candidate(method, Partition(sizes))
                try:
                    group.check(candidate)
                except UnsupportedError:
                    continue
                certificate = group.verify(candidate)
                assert certificate.holds, (method, dtype, certificate.divergence)
                assert certificate.deviations
            group.hold_links(5e9)
            disturbed = Candidate("kvr", Partition(uneven), noise=100_000)
            assert group.verify(disturbed).holds
            sample = group.sample(disturbed)
            entry = probe(build(name, hidden_size=256, num_attention_heads=4)).entry_elements()
            if name != "mistral-window":
                width = 4 if dtype == "float32" else 2
                assert sample.kv_bytes == sum(Partition(uneven).ends[:-1]) * entry * width
            assert all(rank.compute_s > 0 for rank in sample.ranks)
            assert group.sample(Candidate("bound", Partition(uneven))).kv_bytes == 0
            assert [seconds > 0 for seconds, _ in group.time_chunk(100, 50)] == [True] * ranks
            assert [seconds > 0 for seconds, _ in group.time_chunk(100, 50, alone=True)] == [True]
            part = [seconds for seconds, _ in group.time_chunk(100, 50, layers=1)]
            assert [seconds > 0 for seconds in part] == [True] * ranks


def test_sm_partition_ranks_survive_a_candidate_that_does_not_fit(tmp_path: Path) -> None:
    # Stock Falcon keeps the scores of all heads.
    folder = write_folder(tmp_path / "falcon", "falcon-mqa", max_position_embeddings=400_000)
    with RankGroup(folder, ranks=2, backend="sm", dtype="float16", timeout_s=200) as group:
        group.start()
        pids = group.pids
        plan = SamplingPlan(warmup=0, least=1, most=1)
        too_long, fits = group.measure_many(
            [Candidate.stock(300_000), Candidate("kvr", Partition((300, 200)))], plan=plan
        )
        assert too_long.failure is not None
        assert too_long.failure.kind == "out-of-memory"
        assert fits.ok
        assert group.pids == pids


@pytest.mark.parametrize("rows", [64, 256, 300, 1000, 1792, 1793])
@pytest.mark.parametrize("prefix", [0, 70, 2200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (7, 1)])
def test_a_shape_never_seen_is_put_together_from_plans_that_exist(
    rows: int, prefix: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvr_partition.runtime.attention import attend_chunk
    from kvr_partition.runtime.kernels import CudnnPlans, attend
    from kvr_partition.runtime.kernels import plans as kernel_plans
    from tests.attention_reference import close, reference

    torch.manual_seed(rows + prefix)
    like: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}

    def chunk(tokens: int, before: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query = torch.randn(1, tokens, heads, 64, **like).transpose(1, 2)
        stored = torch.randn(before + tokens, 2, kv_heads, 64, **like)
        key, value = (stored[:, at].unsqueeze(1).permute(1, 2, 0, 3) for at in (0, 1))
        return query, key, value

    query, key, value = chunk(256, 256)
    attend(query, key[:, :, :256], value[:, :, :256], scale=0.1)
    real = kernel_plans.cudnn_call
    # A plan is kept by shapes and strides.
    calls: set[Any] = set()

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> Any:
        calls.add((causal, *((one.shape, one.stride()) for one in (q, k, v))))
        return real(q, k, v, scale, causal)

    monkeypatch.setattr(kernel_plans, "cudnn_call", spy)
    # What other tests have planned on this thread does not count.
    plans = CudnnPlans()
    plans._seen.update(CudnnPlans.here()._seen)
    monkeypatch.setattr(CudnnPlans._threads, "plans", plans)
    plans.build_ahead(4096)
    planned, calls = calls, set()
    query, key, value = chunk(rows, prefix)
    output = attend_chunk(
        query,
        key[:, :, prefix:],
        value[:, :, prefix:],
        lambda: (key[:, :, :prefix], value[:, :, :prefix]) if prefix else None,
        scale=0.1,
        window=None,
    )
    assert calls <= planned
    visible = torch.ones(rows, prefix + rows, dtype=torch.bool).tril(prefix)
    assert close(output, reference(query, key, value, 0.1, visible)[0], torch.float16)


def test_merging_on_the_device_equals_merging_on_the_host() -> None:
    from kvr_partition.runtime.kernels import merge_

    torch.manual_seed(0)
    # Enough rows to fill the device several times over: a race would not show on a few.
    for dim, rows, others in (
        (64, 33, 1),
        (80, 33, 2),
        (128, 33, 7),
        (128, 48, 9),
        (64, 20_000, 1),
        (64, 9999, 3),
    ):
        output, *more = torch.randn(1 + others, 2, rows, 6, dim).transpose(2, 3).unbind(0)
        lse, *more_lse = torch.randn(1 + others, 2, 6, rows).mul(20).unbind(0)
        right, right_lse = output.clone(), lse.clone()
        merge_(right, right_lse, *zip(more, more_lse, strict=True))
        found, found_lse = output.cuda(), lse.cuda()
        # Padded rows leave strides of their own behind.
        wide = torch.empty(2, 6, rows + 7, device="cuda")[:, :, :rows].copy_(more_lse[0])
        merge_(
            found,
            found_lse,
            (more[0].cuda(), wide),
            *((one.cuda(), one_lse.cuda()) for one, one_lse in zip(more[1:], more_lse[1:], strict=True)),
        )
        assert relative(found.cpu(), right) < 1e-5
        assert relative(found_lse.cpu(), right_lse) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_chosen_for_a_group_of_sms_are_right_and_can_be_recorded(dtype: torch.dtype) -> None:
    from profiler.experiments.sm_products import LEAST_ROWS, GroupProducts, chosen_products
    from profiler.sm.groups import split_sms

    groups, _ = split_sms(4)
    streams = [group.stream() for group in groups]
    products = GroupProducts(groups[0].sms, streams)
    torch.manual_seed(0)
    weight = torch.randn(1024, 512, device="cuda", dtype=dtype)
    many, few, wide = (torch.randn(rows, 512, device="cuda", dtype=dtype) for rows in (1500, LEAST_ROWS - 1, 640))
    stream = streams[0]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), chosen_products(products, choosing=True), torch.no_grad():
        found = [torch.nn.functional.linear(rows, weight) for rows in (many[None], few, wide)]
    assert len(products.chosen) == 2  # a few rows are left to torch
    # Whatever was the fastest: each candidate must be right.
    for shape, rows in zip(list(products.chosen), (many, wide), strict=True):
        candidates = products._best[shape.columns, shape.inner, dtype]
        assert candidates
        for candidate in candidates:
            products.chosen[shape] = candidate
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream), chosen_products(products, choosing=False), torch.no_grad():
                torch.nn.functional.linear(rows, weight)
                torch.cuda.synchronize()
                graph.capture_begin()
                output = torch.nn.functional.linear(rows, weight)
                graph.capture_end()
                graph.replay()
            torch.cuda.synchronize()
            assert relative(output, rows.double() @ weight.t().double()) < 5e-3
    torch.cuda.synchronize()
    for rows, output in zip((many[None], few, wide), found, strict=True):
        assert output.shape[:-1] == rows.shape[:-1]
        assert relative(output, rows.double() @ weight.t().double()) < 5e-3


def test_sm_partition_ranks_with_chosen_products_equal_the_single_run(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "llama", "llama-gqa", hidden_size=512, intermediate_size=1024, max_position_embeddings=2048
    )
    with RankGroup(folder, ranks=4, backend="sm", dtype="float16", timeout_s=120) as group:
        for candidate in (
            Candidate("kvr-chain", Partition((600, 500, 300, 260))),
            Candidate.even("tsp", 1660, 4),
            Candidate.even("zigzag", 1660, 4),
        ):
            certificate = group.verify(candidate)
            assert certificate.holds, certificate.divergence


def test_a_rank_needs_its_weights_its_visible_kv_and_a_stated_bound() -> None:
    model = build("llama-gqa", num_hidden_layers=8, hidden_size=256, intermediate_size=512).to(
        "cuda", torch.float16
    )
    chunk, prefix = 512, 1024
    ids = torch.zeros((1, chunk), dtype=torch.long, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        # Memory that nobody wrote to may hold numbers that are none.
        cache = random_prefix(chunk_cache(model, ids, prefix=prefix))
        result = run_chunk(model, ids, cache, rank=1, ranks=2, links=NoLinks())
        peak = torch.cuda.max_memory_allocated() - before
        kv = result.cache.kv_bytes
        del result, cache
    # Activations do not grow with the prefix or with layers: a chunk's width in the MLP and a dozen times
    # its hidden state, the cuDNN and cuBLAS workspaces besides.
    bound = chunk * 2 * (3 * 512 + 12 * 256) + (16 << 20)
    assert kv == 8 * (chunk + prefix) * 2 * 2 * 64 * 2
    assert peak <= kv + bound, (peak, kv, bound)
