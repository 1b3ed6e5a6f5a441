"""Digests differ where prompts, models or weights do, and agree where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition.runtime.digests import (
    geometry_digest,
    layers_digest,
    past_fingerprint,
    prompt_digest,
    same_past,
    weights_digest,
)
from tests.models import build

ids = st.lists(st.integers(0, 200_000), min_size=1, max_size=40)


@given(ids, ids)
def test_prompts_have_one_digest_only_if_they_are_one(one: list[int], other: list[int]) -> None:
    same = prompt_digest(torch.tensor([one]))[0] == prompt_digest(torch.tensor([other]))[0]
    assert same == (one == other)


@given(ids, st.randoms(use_true_random=False))
def test_the_order_of_tokens_matters_and_their_type_does_not(tokens: list[int], random: Any) -> None:
    digest, least, most = prompt_digest(torch.tensor([tokens]))
    assert (least, most) == (min(tokens), max(tokens))
    assert prompt_digest(torch.tensor([tokens], dtype=torch.int32))[0] == digest
    turned = random.sample(tokens, len(tokens))
    assert (prompt_digest(torch.tensor([turned]))[0] == digest) == (turned == tokens)


def test_a_mask_counts_with_its_past() -> None:
    prompt = torch.arange(12).reshape(2, 6)
    seen = {prompt_digest(prompt)[0]}
    for columns in (6, 9):
        for padded in range(3):
            mask = torch.ones(2, columns, dtype=torch.long)
            mask[0, :padded] = 0
            seen.add(prompt_digest(prompt, mask)[0])
    assert len(seen) == 7


def test_pasts_are_the_same_as_far_as_rounding_goes_and_never_where_they_are_no_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(2))
    one = past_fingerprint(keys, values)
    rounded = past_fingerprint(keys.bfloat16(), values.bfloat16())
    assert same_past(one, one, "float32")
    assert same_past(one, rounded, "bfloat16")
    other = values.clone()
    other[:, :, 7:] = torch.randn(1, 2, 33, 16, generator=generator)
    assert not same_past(one, past_fingerprint(keys, other), "bfloat16")
    assert not same_past(one, past_fingerprint(keys, values.flip(2)), "bfloat16")
    other[0, 0, 3, 2] = float("nan")
    spoilt = past_fingerprint(keys, other)
    assert not same_past(one, spoilt, "float32")
    assert not same_past(spoilt, spoilt, "float32")
    assert not same_past(one, (), "float32")


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama-gqa")


def test_a_single_bit_of_a_weight_changes_the_digest(model: Any) -> None:
    digest = weights_digest(model)
    assert weights_digest(build("llama-gqa")) == digest
    for name, parameter in list(model.named_parameters())[::5]:
        kept = parameter.data.clone()
        bits = parameter.data.reshape(-1).view(torch.int32)
        bits[-1] ^= 1
        assert weights_digest(model) != digest, name
        parameter.data.copy_(kept)
        if not torch.equal(kept, kept.flip(0)):
            parameter.data.copy_(kept.flip(0))
            assert weights_digest(model) != digest, name
            parameter.data.copy_(kept)
    assert weights_digest(model) == digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_weights_counts(model: Any, dtype: torch.dtype) -> None:
    assert weights_digest(build("llama-gqa").to(dtype)) != weights_digest(model)


def test_buffers_that_a_checkpoint_keeps_count_and_others_do_not(model: Any) -> None:
    other = build("llama-gqa")
    digest = weights_digest(other)
    other.model.rotary_emb.inv_freq[0] += 1
    assert weights_digest(other) == digest
    other.register_buffer("kept", torch.ones(3, dtype=torch.bool))
    assert weights_digest(other) != digest


def test_configurations_differ_in_what_changes_tokens(model: Any) -> None:
    assert geometry_digest(build("llama-gqa")) == geometry_digest(model)
    assert geometry_digest(build("llama-mha")) != geometry_digest(model)
    assert geometry_digest(build("llama-gqa", rope_theta=5e5)) != geometry_digest(model)
    assert layers_digest(build("llama-gqa", rope_theta=5e5)) == layers_digest(model)
    assert layers_digest(build("mistral-window")) != layers_digest(model)
    elsewhere = build("llama-gqa")
    elsewhere.config._name_or_path = "another/folder"
    elsewhere.config.use_cache = False
    assert geometry_digest(elsewhere) == geometry_digest(model)
