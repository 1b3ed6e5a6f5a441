"""Fused layers and recorded short chunks on a GPU. Skipped without one."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from kvr_partition import Partition
from kvr_partition.runtime import decode, prefill, stock, warm_up
from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.fused import FusedModel, fused_model, ops, recorded
from kvr_partition.runtime.fused.recorded import RecordedLayers
from kvr_partition.runtime.links.plan import NoLinks
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.verify import run_reference
from tests.models import CORE, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDE = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 4096}
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}


def on_gpu(name: str, dtype: torch.dtype = torch.float16, **changes: Any) -> Any:
    model = build(name, **{**WIDE, **changes}).to("cuda")
    generator = torch.Generator(device="cuda").manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, device="cuda"))
    return model.to(dtype)


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(1, 257, (1, tokens), generator=torch.Generator().manual_seed(tokens)).cuda()


def relative(found: torch.Tensor | None, right: torch.Tensor | None) -> float:
    assert found is not None
    assert right is not None
    return float((found.double() - right.double()).norm() / right.double().norm())


def behind(model: Any, ids: torch.Tensor, past: int, layers: Any) -> PrefillResult:
    """The tokens after the first ``past`` ones as a chunk of their own."""
    before: RunaheadCache | None = None
    result: PrefillResult | None = None
    for start, end in ((0, past), (past, ids.shape[1])):
        chunk = ids[:, start:end]
        cache = chunk_cache(model, chunk, prefix=start, past=before)
        result = run_chunk(model, chunk, cache, rank=0, ranks=1, links=NoLinks(), layers=layers)
        before = result.cache
    assert result is not None
    return result


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_fused_layers_are_as_exact_as_the_models_own(name: str, dtype: torch.dtype) -> None:
    model, ids = on_gpu(name, dtype), prompt(171)
    # Weights rounded to the dtype are those of the model; what is left is what computing costs.
    exact = run_reference(model, ids).logits
    own = relative(stock(model, ids).logits, exact)
    found = prefill(model, ids, Partition((171,)), layers="fused")
    # In single precision tokens are to be equal; the last digit may be another.
    allowed = 2 * own if dtype == torch.float32 else 1.1 * own + torch.finfo(dtype).eps / 2
    assert relative(found.logits, exact) <= allowed
    assert relative(behind(model, ids, 100, "fused").logits, exact) <= allowed
    if dtype == torch.float32:
        assert torch.equal(found.first_token, stock(model, ids).first_token)  # type: ignore[arg-type]


def test_a_gpu_has_all_parts_of_a_llama() -> None:
    assert ops.missing_kernels(torch.device("cuda")) == ""
    assert fused_model(on_gpu("llama-gqa")).name == "fused(norm, rotary, activation, residual)"


@pytest.mark.parametrize("heads", [(4, 2), (71, 1)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("tokens", [1, 37])
def test_rotation_equals_that_on_the_cpu(heads: tuple[int, int], normed: bool, tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query, key = drawn(tokens, heads[0], 64), drawn(tokens, heads[1], 64)
    angle = drawn(tokens, 64)
    norms = (drawn(64), drawn(64), 1e-5) if normed else None
    to = torch.zeros(tokens, 3 * heads[1], 64)
    there = [one.clone().cuda() for one in (query, key, to, angle.cos(), angle.sin())]
    on_device = None if norms is None else (norms[0].cuda(), norms[1].cuda(), norms[2])
    ops.rotate_(query, key, to[:, : heads[1]], angle.cos(), angle.sin(), norms)
    ops.rotate_(there[0], there[1], there[2][:, : heads[1]], there[3], there[4], on_device)
    torch.testing.assert_close(there[0].cpu(), query)
    torch.testing.assert_close(there[2].cpu(), to)


# ---------------------------------------------------------------------------------------- recorded layers


@pytest.fixture(scope="module")
def warm() -> Any:
    model = on_gpu("llama-gqa")
    made = warm_up(model, 600)
    assert made.graphs > 0
    assert made.graph_bytes > 0
    return model


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the recordings that are used from here on."""
    used: list[int] = []
    forwards = RecordedLayers.forwards

    def noting(self: RecordedLayers, size: int, *rest: Any) -> Any:
        used.append(size)
        return forwards(self, size, *rest)

    monkeypatch.setattr(RecordedLayers, "forwards", noting)
    return used


@pytest.mark.parametrize("tokens", [1, 2, 100, 128, 129, 500, 600])
def test_a_recorded_chunk_is_what_it_is_at_once(warm: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = counted(monkeypatch)
    ids = prompt(tokens)
    # What an earlier chunk left in the rows that are padding now must not be seen.
    prefill(warm, prompt(640)[:, :640], Partition((640,)))
    used.clear()
    found = prefill(warm, ids, Partition((tokens,)))
    assert used == [-(-tokens // recorded.STEP) * recorded.STEP]
    right = stock(warm, ids)
    assert relative(found.logits, right.logits) < TOLERANCE[torch.float16]
    for index, layer in found.cache.kv_layers:
        assert relative(layer.keys, right.cache.layers[index].keys) < TOLERANCE[torch.float16]
        assert relative(layer.values, right.cache.layers[index].values) < TOLERANCE[torch.float16]
    assert torch.equal(decode(warm, ids, found, 8)[:, :1], right.first_token.cuda())  # type: ignore[union-attr]


@pytest.mark.parametrize("past", [1, 77, 300])
def test_a_recorded_chunk_sees_its_prefix(warm: Any, past: int) -> None:
    ids = prompt(past + 230)
    assert relative(behind(warm, ids, past, "fused").logits, stock(warm, ids).logits) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("name", ["falcon-mqa", "mistral-window", "qwen2", "qwen3"])
def test_other_models_are_recorded_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_gpu(name, **({"sliding_window": 200} if name == "mistral-window" else {}))
    assert warm_up(model, 600).graphs > 0
    used = counted(monkeypatch)
    for tokens in (90, 333):
        ids = prompt(tokens)
        right = stock(model, ids).logits
        assert relative(prefill(model, ids, Partition((tokens,))).logits, right) < TOLERANCE[torch.float16]
        assert relative(behind(model, ids, 40, "fused").logits, right) < TOLERANCE[torch.float16]
    assert len(used) == 6


def test_weights_that_moved_are_not_read_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = on_gpu("llama-gqa"), prompt(200)
    warm_up(model, 300)
    used = counted(monkeypatch)
    prefill(model, ids, Partition((200,)))
    assert used == [256]
    projection = model.model.layers[1].mlp.down_proj
    projection.weight = torch.nn.Parameter(projection.weight * -2, requires_grad=False)
    found = prefill(model, ids, Partition((200,)))
    assert used == [256]
    assert relative(found.logits, stock(model, ids).logits) < TOLERANCE[torch.float16]


def test_weights_that_change_in_place_are_read_as_they_are(warm: Any) -> None:
    model, ids = on_gpu("llama-gqa"), prompt(200)
    warm_up(model, 300)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-2)
    found = prefill(model, ids, Partition((200,)))
    assert relative(found.logits, stock(model, ids).logits) < TOLERANCE[torch.float16]


def test_runs_on_two_streams_do_not_meet(warm: Any) -> None:
    prompts = [prompt(300), prompt(301)]
    right = [stock(warm, ids).logits for ids in prompts]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for stream, ids in zip(streams, prompts, strict=True):
            with torch.cuda.stream(stream):
                found.append(prefill(warm, ids, Partition((ids.shape[1],))).logits)
        torch.cuda.synchronize()
        for one, exact in zip(found, right, strict=True):
            assert relative(one, exact) < TOLERANCE[torch.float16]


def test_nothing_is_recorded_during_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_gpu("llama-gqa")
    prefill(model, prompt(100), Partition((100,)))
    assert fused_model(model).recorded is None


def test_what_cannot_be_recorded_runs_without() -> None:
    model = on_gpu("falcon-new")
    assert warm_up(model, 300).graphs == 0
    found: FusedModel = fused_model(model)
    assert found.recorded is None
    ids = prompt(90)
    out = prefill(model, ids, Partition((90,)))
    assert relative(out.logits, stock(model, ids).logits) < TOLERANCE[torch.float16]


def test_decoding_builds_no_plan_for_a_new_length(warm: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    ids = prompt(333)
    out = prefill(warm, ids, Partition((333,)), reserve=32)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        new = decode(warm, ids, out, 6)
        torch.cuda.synchronize()
    assert not any("cudnn" in event.name for event in profiled.events())
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
    right = warm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert new.shape == right[:, 333:].shape


def test_a_recorded_run_lets_go_of_its_cache(warm: Any) -> None:
    out = prefill(warm, prompt(200), Partition((200,)))
    gone = weakref.ref(out.cache)
    del out
    gc.collect()
    assert gone() is None
