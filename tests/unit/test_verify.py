"""The comparison behind a certificate finds what went wrong, on real models with real damage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvr_partition.certificate import Certificate, Deviation
from kvr_partition.errors import NotFiniteError
from kvr_partition.runtime.cache import RunaheadCache
from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.links.plan import NoLinks
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.runtime.verify import SingleRun, compare, run_reference, run_single
from tests.models import build, provenance

IDS = torch.randint(0, 257, (1, 47), generator=torch.Generator().manual_seed(2))


def behind(model: Any, alone: SingleRun, damage: int | None, dtype: torch.dtype) -> PrefillResult:
    """The second of two ranks, its prefix taken from the single run, one layer of it damaged."""

    def fill(cache: RunaheadCache) -> None:
        for index, layer in cache.kv_layers:
            kept = layer.kept_prefix
            source = alone.cache.layers[index]
            layer.store.write(0, source.keys[:, :, 24 - kept : 24], source.values[:, :, 24 - kept : 24])
            if index == damage:
                layer.store.rows[kept // 2] += 0.1

    cache = chunk_cache(model, IDS[:, 24:], prefix=24)
    fill(cache)
    return run_chunk(model, IDS[:, 24:], cache, rank=1, ranks=2, links=NoLinks())


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "falcon-alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damage_shows_in_the_layer_where_it_is(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    alone, reference = run_single(model, IDS), run_reference(model, IDS)
    assert reference.logits.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
    assert model.dtype == dtype
    found = compare(behind(model, alone, None, dtype), 47, alone, reference)
    label = str(dtype).removeprefix("torch.")
    assert [one.layer for one in found] == [0, 1, 2, None]
    assert all(one.within(label) and one.rank == 1 for one in found)
    assert any(one.split > 0 for one in found)
    found = compare(behind(model, alone, 1, dtype), 47, alone, reference)
    assert found[0].within(label)
    assert not found[1].within(label)


def test_missing_kv_is_infinitely_far() -> None:
    model = build("llama-gqa")
    alone, reference = run_single(model, IDS), run_reference(model, IDS)
    result = behind(model, alone, None, torch.float32)
    result.cache.layers[2].store.rows[3] = float("nan")
    assert compare(result, 47, alone, reference)[2].split == float("inf")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_certificate_of_what_is_not_finite_never_holds(value: float) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        for split, single in ((value, value), (0.0, value), (value, 0.0)):
            deviation = Deviation(0, None, split, single)
            assert not deviation.within(dtype)
            certificate = Certificate("kvr", (24, 23), "float32", True, (deviation,), provenance(dtype=dtype))
            assert certificate.divergence == deviation or value != value
            assert not certificate.holds


def test_a_single_run_that_overflows_is_nothing_to_compare_with() -> None:
    model = build("llama-gqa")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="keys or values of layer 2"):
        run_single(model, IDS)
