"""What is decoded behind a prefill is what generate gives, whatever past, padding or settings a checkpoint has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from kvr_partition import Partition, PartitionError, PartitionTable, UnsupportedError
from kvr_partition.errors import NotFiniteError
from kvr_partition.runtime import check_generation, decode, prefill, probe, stock
from kvr_partition.runtime.chunk import chunk_cache
from kvr_partition.runtime.result import PrefillResult
from kvr_partition.table import Entry
from tests.models import build

CONTEXT, NEW = 24, 10


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: build(name) for name in ("llama-gqa", "mistral-window", "bloom", "gpt2", "mpt")}


@pytest.fixture
def llama(models: dict[str, Any]) -> Iterator[Any]:
    """With settings of its own for each test."""
    model = models["llama-gqa"]
    model.generation_config = GenerationConfig()
    yield model
    model.generation_config = GenerationConfig()


def prompt(batch: int = 1, seed: int = 0, tokens: int = CONTEXT) -> torch.Tensor:
    return torch.randint(1, 257, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generated(
    model: Any, ids: torch.Tensor, new: int = NEW, mask: torch.Tensor | None = None, **settings: Any
) -> Any:
    """The new tokens of the model's own generate."""
    mask = torch.ones_like(ids) if mask is None else mask
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **settings)
    return whole[:, ids.shape[1] :].tolist()


def read(model: Any, ids: torch.Tensor, past: int = 0, **options: Any) -> PrefillResult:
    """A prefill on one rank, the first tokens of it behind a cache."""
    before = None
    if past:
        before = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :past], past_key_values=before, use_cache=True)
    tokens = ids.shape[1] - past
    return prefill(model, ids[:, past:], Partition((tokens,), past), past=before, **options)


# ------------------------------------------------------------------------- past


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "bloom", "gpt2", "mpt"])
@pytest.mark.parametrize("whole", [False, True], ids=["prompt alone", "with its past"])
def test_behind_a_past_it_takes_the_ids_that_prefill_took(models: dict[str, Any], name: str, whole: bool) -> None:
    model, ids = models[name], prompt(2)
    out = read(model, ids, past=9)
    assert decode(model, ids if whole else ids[:, 9:], out, NEW).tolist() == generated(model, ids)


def test_its_length_check_counts_the_past(llama: Any) -> None:
    ids = prompt(tokens=500)
    out = read(llama, ids, past=400)
    with pytest.raises(PartitionError, match="513 tokens are beyond the 512 positions"):
        decode(llama, ids[:, 400:], out, 14)
    # The last token is read by nobody.
    assert decode(llama, ids[:, 400:], out, 13).shape == (1, 13)


def test_ids_of_another_prompt_are_refused(llama: Any) -> None:
    out = read(llama, prompt(), past=9)
    for wrong in (prompt(tokens=14), prompt(2), prompt()[0]):
        with pytest.raises(PartitionError, match=r"must be the prompt, \[1, 15\], or with its past, \[1, 24\]"):
            decode(llama, wrong, out, NEW)


def test_a_result_is_decoded_from_once(llama: Any) -> None:
    ids = prompt()
    out = read(llama, ids)
    decode(llama, ids, out, NEW)
    with pytest.raises(PartitionError, match="was decoded from before"):
        decode(llama, ids, out, NEW)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
@pytest.mark.parametrize("past", [5, 20])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_caches_of_transformers_are_gone_on_with(
    models: dict[str, Any], name: str, past: int, kind: type[Cache]
) -> None:
    model, ids = models[name], prompt(tokens=past + CONTEXT)
    options = {"max_cache_len": 200} if kind is StaticCache else {}
    before: Any = kind(config=model.config, **options)
    with torch.no_grad():
        model(ids[:, :past], past_key_values=before, use_cache=True)
        right = model(ids).logits[:, -1]
    out = prefill(model, ids[:, past:], Partition((CONTEXT,), past), past=before)
    assert out.logits is not None
    torch.testing.assert_close(out.logits, right, rtol=1e-4, atol=1e-5)
    assert decode(model, ids[:, past:], out, NEW).tolist() == generated(model, ids)


def test_caches_that_cannot_be_read_are_refused_by_name(llama: Any) -> None:
    ids = prompt()
    good = stock(llama, ids[:, :9]).cache
    # What a layer keeps besides, or otherwise (quantised, say), only its own class knows.
    fancy = Cache(layers=[type("FancyLayer", (DynamicLayer,), {})() for _ in range(3)])
    with torch.no_grad():
        llama(ids[:, :9], past_key_values=fancy, use_cache=True)
    offloaded = DynamicCache(config=llama.config, offloading=False)
    offloaded.offloading = True
    half = DynamicCache(config=llama.config)
    for index in range(3):
        half.update(*(torch.zeros(1, 2, 9, 16, dtype=torch.bfloat16) for _ in range(2)), index)
    uneven = stock(llama, ids[:, :9]).cache
    uneven.layers[1].keys = uneven.layers[1].keys[:, :, :4]
    for past, error, reason in (
        (fancy, UnsupportedError, "layers of type FancyLayer"),
        (offloaded, UnsupportedError, "offloading"),
        (((torch.zeros(1), torch.zeros(1)),), UnsupportedError, "got tuple"),
        (half, PartitionError, "bfloat16"),
        (uneven, PartitionError, "layer 1 of past holds 4 tokens, and layer 0 9"),
        (stock(llama, prompt(2)[:, :9]).cache, PartitionError, "batch, heads and sizes"),
        (DynamicCache(), PartitionError, "layers"),
    ):
        with pytest.raises(error, match=reason):
            prefill(llama, ids[:, 9:], Partition((15,), 9), past=past)
    assert prefill(llama, ids[:, 9:], Partition((15,), 9), past=good).first_token is not None


def test_rows_that_a_later_prefill_went_on_with_are_not_decoded_from(llama: Any) -> None:
    first, second = prompt(seed=1), prompt(seed=2)
    second[:, :9] = first[:, :9]
    before = chunk_cache(llama, first[:, :0], prefix=9, reserve=30, past=stock(llama, first[:, :9]).cache)
    partition = Partition((15,), 9)
    one = prefill(llama, first[:, 9:], partition, past=before)
    two = prefill(llama, second[:, 9:], partition, past=before)
    with pytest.raises(PartitionError, match="another prefill went on with the same past"):
        decode(llama, first, one, NEW)
    assert decode(llama, second, two, NEW).tolist() == generated(llama, second)
    with pytest.raises(PartitionError, match="another prefill went on with the same past"):
        before.layers[0].append(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))  # type: ignore[attr-defined]


# --------------------------------------------------------------------- settings


def test_a_first_token_that_ends_the_prompt_is_the_only_one(llama: Any) -> None:
    ids = prompt()
    llama.generation_config.eos_token_id = generated(llama, ids, 1)[0][0]
    assert decode(llama, ids, read(llama, ids), NEW).tolist() == generated(llama, ids)


@pytest.mark.parametrize("pad", [0, None])
def test_prompts_of_a_batch_end_each_for_itself(llama: Any, pad: int | None) -> None:
    ids = prompt(3)
    tokens = generated(llama, ids)
    # The first prompt ends at once, the second after some tokens, the third not at all.
    llama.generation_config.eos_token_id = [tokens[0][0], tokens[1][3]]
    llama.generation_config.pad_token_id = pad
    found = decode(llama, ids, read(llama, ids), NEW).tolist()
    assert found == generated(llama, ids)
    assert len(set(found[0][1:])) == 1


SETTINGS: dict[str, dict[str, Any]] = {
    "what does not matter": {
        "cache_implementation": "static", "return_dict_in_generate": True, "output_scores": True, "top_p": 0.5,
        "temperature": 0.2, "prompt_lookup_num_tokens": 3, "length_penalty": 2.0, "use_cache": False,
        "max_length": 3,
    },
    "suppressed": {"suppress_tokens": [1, 2, 3]},
    "suppressed at the beginning": {"begin_suppress_tokens": [1, 2, 3]},
    "repetition": {"repetition_penalty": 1.7},
    "repetition of the prompt": {"encoder_repetition_penalty": 1.7},
    "n-grams": {"no_repeat_ngram_size": 1},
    "n-grams of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[1], [2], [3, 4]]},
    "biased": {"sequence_bias": [[[7], 8.0], [[1], -9.0]]},
    "at least so many": {"min_new_tokens": 7},
    "at least so long": {"min_length": CONTEXT + 6},
    "forced end": {"forced_eos_token_id": 9},
    "dearer with length": {"exponential_decay_length_penalty": (2, 1.6)},
    "all at once": {
        "repetition_penalty": 1.3, "suppress_tokens": [5], "begin_suppress_tokens": [6], "min_new_tokens": 4,
        "no_repeat_ngram_size": 2, "renormalize_logits": True, "remove_invalid_values": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_settings_that_change_greedy_decoding_hold_from_the_first_token_on(
    llama: Any, name: str, seed: int
) -> None:
    ids = prompt(2, seed)
    plain = generated(llama, ids)
    fields = dict(SETTINGS[name])
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        if key in fields:
            # Tokens that would come: both first ones, so that settings show at once.
            fields[key] = [plain[0][0], plain[1][0]]
    # The end token is one that comes.
    ends = {"eos_token_id": plain[0][2], "pad_token_id": 0}
    llama.generation_config = GenerationConfig(**({} if name == "what does not matter" else fields), **ends)
    right = generated(llama, ids)
    llama.generation_config = GenerationConfig(**fields, **ends)
    out = read(llama, ids)
    found = decode(llama, ids, out, NEW)
    assert found.tolist() == right
    assert out.first_token is not None
    if "forced" not in name:
        assert out.first_token.tolist() == [row[:1] for row in right]
    if name != "what does not matter":
        # The only token is not the first of many where its end is forced.
        assert decode(llama, ids, read(llama, ids), 1).tolist() == generated(llama, ids, 1)


def test_a_checkpoint_that_says_use_cache_false_decodes_the_same(llama: Any) -> None:
    ids = prompt()
    right = generated(llama, ids)
    llama.config.use_cache = False
    llama.generation_config.use_cache = False
    try:
        assert decode(llama, ids, read(llama, ids), NEW).tolist() == right
    finally:
        llama.config.use_cache = True


REFUSED: dict[str, Any] = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "guidance_scale": 2.0,
    "constraints": [1],
    "force_words_ids": [[1]],
    "token_healing": True,
    "stop_strings": ["x"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_followed_are_refused_before_the_prompt_is_read(llama: Any, name: str) -> None:
    ids = prompt()
    llama.generation_config = GenerationConfig()
    setattr(llama.generation_config, name, REFUSED[name])
    with pytest.raises(UnsupportedError, match=f"{name}="):
        read(llama, ids)
    with pytest.raises(UnsupportedError, match=f"{name}="):
        check_generation(llama.generation_config)
    llama.generation_config = GenerationConfig()
    with pytest.raises(UnsupportedError, match=f"{name}="):
        decode(llama, ids, read(llama, ids), NEW, **{name: REFUSED[name]})


def test_settings_given_to_decode_go_first(llama: Any) -> None:
    ids = prompt()
    right = generated(llama, ids, repetition_penalty=1.9)
    assert decode(llama, ids, read(llama, ids), NEW, repetition_penalty=1.9).tolist() == right
    assert llama.generation_config.repetition_penalty is None
    for wrong in ({"do_sample": True}, {"max_length": 3}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(UnsupportedError):
            decode(llama, ids, read(llama, ids), NEW, **wrong)
    with pytest.raises(PartitionError, match="max_new_tokens must be at least 1"):
        decode(llama, ids, read(llama, ids), 0)


def test_settings_that_look_at_ids_which_nobody_has_are_refused(llama: Any) -> None:
    ids = prompt()
    out = read(llama, ids, past=9)
    with pytest.raises(UnsupportedError, match="repetition_penalty looks at all token ids of the prompt, and 9"):
        decode(llama, ids[:, 9:], out, NEW, repetition_penalty=1.5)
    with pytest.raises(PartitionError, match="9 of them are known from the cache only"):
        decode(llama, ids[:, 9:], out, NEW, logits_processor=[lambda ids, scores: scores])
    right = generated(llama, ids, repetition_penalty=1.5)
    assert decode(llama, ids, out, NEW, repetition_penalty=1.5).tolist() == right


def test_a_penalty_behind_a_past_is_read_with_the_ids_of_the_past_in_front(llama: Any) -> None:
    ids = prompt()
    llama.generation_config.repetition_penalty = 1.6
    with pytest.raises(UnsupportedError, match="give input_ids of all 24 tokens"):
        read(llama, ids, past=9)
    before = stock(llama, ids[:, :9]).cache
    out = prefill(llama, ids, Partition((15,), 9), past=before)
    right = generated(llama, ids)
    assert out.first_token is not None
    assert out.first_token.tolist() == [row[:1] for row in right]
    assert decode(llama, ids, out, NEW).tolist() == right


def test_settings_of_one_thread_that_decodes_are_not_those_of_another_that_prefills(llama: Any) -> None:
    ids = prompt()
    banned = generated(llama, ids, 1)[0][0]
    llama.generation_config.suppress_tokens = [banned]
    right = generated(llama, ids)
    seen: list[list[int]] = []

    def meanwhile(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        first = read(llama, ids).first_token
        assert first is not None
        seen.append(first[0].tolist())
        return scores

    assert decode(llama, ids, read(llama, ids), NEW, logits_processor=[meanwhile]).tolist() == right
    assert seen == [right[0][:1]] * (NEW - 1)


# ------------------------------------------------------------- padding and modes


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "bloom", "gpt2", "mpt"])
@pytest.mark.parametrize("past", [0, 7])
def test_prompts_padded_on_the_left_are_read_as_generate_reads_them(
    models: dict[str, Any], name: str, past: int
) -> None:
    model, ids = models[name], prompt(3)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :17] = 0, 0
    before = None
    if past:
        mask[:, :] = 1
        mask[0, :5] = 0
        before = stock(model, ids[:, :past], attention_mask=mask[:, :past]).cache
    right = generated(model, ids, mask=mask)
    out = prefill(model, ids[:, past:], Partition((CONTEXT - past,), past), past=before, attention_mask=mask)
    assert decode(model, ids[:, past:], out, NEW).tolist() == right
    assert stock(model, ids, attention_mask=mask).first_token.tolist() == [row[:1] for row in right]  # type: ignore[union-attr]
    # A row that is alone has no padding, and the same tokens where positions come from the mask.
    if name != "mpt":
        assert right[0] == generated(model, ids[:1, 5:])[0]


def test_other_padding_is_refused(llama: Any) -> None:
    ids = prompt(2)
    split = Partition((CONTEXT,))
    for columns, error, reason in (
        ((slice(-3, None),), PartitionError, "pad prompts on the left only"),
        ((slice(4, 6),), PartitionError, "pad prompts on the left only"),
        ((slice(None),), PartitionError, "a prompt of nothing else"),
    ):
        mask = torch.ones_like(ids)
        mask[0, columns[0]] = 0
        with pytest.raises(error, match=reason):
            prefill(llama, ids, split, attention_mask=mask)
    with pytest.raises(PartitionError, match=r"attention_mask must be \[2, 24\]"):
        prefill(llama, ids, split, attention_mask=torch.ones(2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(UnsupportedError, match="attention depth knows no padding"):
        prefill(llama, ids, split, attention_mask=mask, depth="attention")
    assert (
        prefill(llama, ids, split, attention_mask=torch.ones_like(ids), depth="attention").attention_mask is None
    )


def test_a_model_that_is_not_exact_in_pieces_with_padding_refuses_it(llama: Any) -> None:
    model = build("llama-gqa")
    real = model.forward

    def forward(*args: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        # Padding is taken for tokens as soon as something is cached.
        cached = options["past_key_values"].get_seq_length()
        return real(*args, attention_mask=None if cached else attention_mask, position_ids=position_ids, **options)

    probe(model)
    model.forward = forward
    mask = torch.ones_like(prompt())
    mask[0, :3] = 0
    with pytest.raises(UnsupportedError, match="reads padded prompts otherwise in pieces than whole"):
        prefill(model, prompt(), Partition((CONTEXT,)), attention_mask=mask)


def test_a_model_in_training_mode_is_refused(llama: Any) -> None:
    llama.train()
    try:
        for run in (lambda: read(llama, prompt()), lambda: stock(llama, prompt())):
            with pytest.raises(UnsupportedError, match=r"in training mode.*model\.eval\(\)"):
                run()
    finally:
        llama.eval()


# ------------------------------------------------------------------ what is no prompt


def test_what_is_no_prompt_is_refused_in_one_line(llama: Any) -> None:
    split = Partition((CONTEXT,))
    for ids, reason in (
        (prompt()[0], r"tensor \[batch, context\]"),
        (prompt().tolist(), "got list"),
        (prompt().float(), "whole numbers; got torch.float32"),
        (prompt()[:, :0], "at least one token"),
        (prompt().index_fill(1, torch.tensor([3]), 257), "token id 257 is not in the model's vocabulary of 257"),
        (prompt().index_fill(1, torch.tensor([3]), -1), "token id -1 is not"),
        (prompt(tokens=9), r"must be \[batch, 24\]"),
    ):
        with pytest.raises(PartitionError, match=reason):
            prefill(llama, ids, split)
    for wrong in ([12, 12], (24,), 24, None):
        with pytest.raises(
            PartitionError, match=r"must be a Partition, a table or a predictor; got .*Partition\(\("
        ):
            prefill(llama, prompt(), wrong)  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match="topology must be one of"):
        prefill(llama, prompt(), split, topology="ring")  # type: ignore[arg-type]
    table = PartitionTable([Entry(CONTEXT, (14, 10))])
    assert prefill(llama, prompt(), table).first_token is not None


# ------------------------------------------------------------------ numbers that are none


def test_logits_that_are_not_finite_name_the_layer_and_the_rank(llama: Any) -> None:
    model = build("llama-gqa")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match="keys or values of layer 2 are not, from token 0 on") as caught:
        read(model, prompt())
    assert (caught.value.layer, caught.value.rank) == (2, 0)
    model = build("llama-gqa")
    model.lm_head.weight.data[7, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="overflow behind those of the last layer") as caught:
        read(model, prompt())
    assert caught.value.layer is None


def test_a_masked_vocabulary_is_no_overflow(llama: Any) -> None:
    model = build("llama-gqa")
    real = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        out.logits[..., 5] = -torch.inf
        return out

    probe(model)
    model.forward = forward
    out = read(model, prompt())
    assert out.first_token is not None
    assert int(out.first_token) != 5


def test_logits_that_overflow_while_decoding_are_an_error(llama: Any) -> None:
    ids = prompt()
    out = read(llama, ids)

    kept = llama.lm_head.weight.data.clone()
    llama.lm_head.weight.data[3] = float("nan")
    try:
        with pytest.raises(NotFiniteError, match="logits of new token 2 are not finite"):
            decode(llama, ids, out, NEW)
    finally:
        llama.lm_head.weight.data.copy_(kept)


# ------------------------------------------------------------------ the README's words


def test_going_on_with_ones_own_generate_is_right_as_the_readme_shows_it(llama: Any) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "model.generate(" in block)
    ids = prompt()
    names = {"model": llama, "input_ids": ids, "out": read(llama, ids), "torch": torch}
    exec(block, names)
    whole: Any = names["tokens"]
    assert whole.tolist() == [ids[0].tolist() + generated(llama, ids, 64)[0]]
