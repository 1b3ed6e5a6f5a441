"""KV-Runahead on real ranks equals one rank: logits, KV of every layer and what is decoded after."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvr_partition import Partition
from tests.models import ALL, CORE, OTHERS, config
from tests.ranks.launch import launch

METHODS = ("attention", "cache", "tsp")
GATHERING = ("tsp", "tsp-causal", "zigzag", "tsp-limited")
# Besides those, on three ranks, for the core models.
MORE_METHODS = ("tsp-causal", "zigzag", "fanout")
LIMITED_METHODS = ("chain-limited", "fanout-limited", "tsp-limited")

# A prime context cut as evenly as it goes, chunks of one token, and very uneven ones.
SPLITS: dict[int, list[tuple[int, ...]]] = {
    2: [(24, 23), (1, 46), (46, 1)],
    3: [(16, 16, 15), (1, 44, 2)],
    5: [(10, 10, 9, 9, 9), (1, 1, 42, 1, 2)],
}
CASES = [
    {"model": model, "method": method, "sizes": sizes, "batch": batch}
    for ranks, splits in SPLITS.items()
    for model in [*CORE, *(OTHERS if ranks == 3 else [])]
    for method in METHODS
    for sizes in splits
    for batch in ([1, 2] if ranks == 3 and sizes == splits[0] else [1])
    if method != "tsp" or sizes == splits[0]
]
CASES += [
    {"model": model, "method": method, "sizes": sizes, "batch": batch}
    for models, methods in ((CORE, MORE_METHODS), (["llama-gqa", "mistral-window"], LIMITED_METHODS))
    for model in models
    for method in methods
    for sizes in (SPLITS[3] if method.startswith("fanout") else SPLITS[3][:1])
    for batch in ([1, 2] if sizes == SPLITS[3][0] and method in MORE_METHODS else [1])
]
CASES += [{"model": "llama-gqa", "method": "zigzag", "sizes": (12, 12), "batch": 1}]  # equal chunks: a collective
CASES += [{"model": "llama-gqa", "method": "fanout", "sizes": SPLITS[5][1], "batch": 1}]

# Every part that can be replaced, in every way in which a model is run.
CASES += [
    {"model": model, "method": method, "sizes": sizes, "batch": batch, "layers": "fused"}
    for model in CORE
    for method, sizes, batch in (
        ("attention", SPLITS[3][0], 1),
        ("attention", SPLITS[3][1], 1),
        ("attention", SPLITS[3][0], 2),
        ("cache", SPLITS[3][0], 1),
        ("tsp", SPLITS[3][0], 1),
        ("tsp-causal", SPLITS[3][0], 1),
        ("zigzag", SPLITS[3][0], 1),
    )
]

CASES += [
    {"model": model, "method": "padded", "sizes": SPLITS[3][0], "batch": 2}
    for model in ("llama-gqa", "mistral-window", "falcon-alibi", "gpt2", "mpt", "gemma2", "deepseek-v3")
]

PAST_CASES = [
    {"model": model, "method": method, "sizes": sizes, "batch": batch, "past": past}
    for model in ALL
    for method in ("past", "past-in-place", "past-cache-depth")
    for sizes, past, batch in (((16, 16, 15), 31, 2), ((1, 44, 2), 5, 1))
]


def name(case: dict[str, Any]) -> str:
    past = f"-past{case['past']}" if "past" in case else ""
    layers = f"-{case['layers']}" if "layers" in case else ""
    sizes = "/".join(map(str, case["sizes"]))
    return f"{case['model']}-{case['method']}-{sizes}-batch{case['batch']}{past}{layers}"


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case, each rank count started once: starting ranks takes far longer than a case."""
    found = {}
    for ranks in SPLITS:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        cases = [case for case in [*CASES, *PAST_CASES] if len(case["sizes"]) == ranks]
        (folder / "cases.json").write_text(json.dumps(cases))
        launch("tests.ranks.exactness", folder, ranks)
        for file in folder.glob("results*.json"):
            found.update({name(case): case for case in json.loads(file.read_text())})
    return found


@pytest.mark.parametrize("case", CASES, ids=name)
def test_it_equals_the_single_run(results: dict[str, dict[str, Any]], case: dict[str, Any]) -> None:
    result = results.get(name(case))
    if result is None:
        assert case["method"] in ("attention", "tsp-causal", "zigzag")
        if case["method"] == "zigzag" and not whole_context(case):
            pytest.skip("zigzag is for full attention")
        assert not any(found["attention_depth"] for found in results.values() if found["model"] == case["model"])
        pytest.skip("its attention cannot be replaced; exact through the cache")
    assert result["logits_error"] < 1e-5
    assert result["kv_error"] < 1e-5
    assert result["kv_layers"] == config(case["model"])["num_hidden_layers"]
    assert result["same_tokens"]


@pytest.mark.parametrize("case", PAST_CASES, ids=name)
def test_a_prompt_behind_cached_tokens_equals_reading_all_of_it(
    results: dict[str, dict[str, Any]], case: dict[str, Any]
) -> None:
    result = results[name(case)]
    assert result["logits_error"] < 1e-5
    assert result["kv_error"] < 1e-5
    assert result["same_tokens"]
    assert result["past_rows_shared"] == (case["method"] == "past-in-place" and result["full_layers"])
    if whole_context(case):
        # What was cached everywhere is not sent.
        entries = case["sizes"][0] + sum(case["sizes"][:2])
        assert result["sent_bytes"] == entries * result["entry_bytes"]


@pytest.mark.parametrize(
    "model", ["llama-mha", "llama-gqa", "mistral-full", "qwen2", "qwen3", "falcon-mqa", "falcon-new"]
)
def test_models_whose_attention_can_be_replaced_run_at_attention_depth(
    results: dict[str, dict[str, Any]], model: str
) -> None:
    assert all(found["attention_depth"] for found in results.values() if found["model"] == model)


def whole_context(case: dict[str, Any]) -> bool:
    """Whether every layer sees everything, so that the published formulas hold."""
    fields = config(case["model"])
    return fields.get("sliding_window") is None


@pytest.mark.parametrize("case", [case for case in CASES if whole_context(case)], ids=name)
def test_the_wire_carries_what_the_paper_counts(results: dict[str, dict[str, Any]], case: dict[str, Any]) -> None:
    result = results.get(name(case))
    if result is None:
        pytest.skip("does not run at attention depth")
    partition = Partition(case["sizes"])
    if case["method"] in GATHERING:
        entries = (partition.ranks - 1) * partition.context
    elif case["method"].startswith("fanout"):
        entries = sum(size * (partition.ranks - 1 - rank) for rank, size in enumerate(partition.sizes))
    else:
        entries = sum(partition.ends[:-1])
    assert result["sent_bytes"] == entries * result["entry_bytes"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if whole_context(case) and case["method"] not in GATHERING], ids=name
)
def test_a_rank_holds_its_visible_kv_once(results: dict[str, dict[str, Any]], case: dict[str, Any]) -> None:
    result = results.get(name(case))
    if result is None:
        pytest.skip("does not run at attention depth")
    assert result["held_bytes"] == [end * result["entry_bytes"] for end in Partition(case["sizes"]).ends]
    if case["method"] == "attention" and case["sizes"][-1] <= 2:
        # The chunk is a token or two, so every result is small, unless one copies the keys it sees.
        assert result["largest_allocation"] < result["layer_keys_bytes"] / 2, result["largest_allocation_op"]


def test_a_window_carries_and_holds_no_more_than_it_sees(results: dict[str, dict[str, Any]]) -> None:
    result = results["mistral-window-attention-16/16/15-batch1"]
    seen = config("mistral-window")["sliding_window"] - 1
    assert result["sent_bytes"] == 2 * seen * result["entry_bytes"]
    assert result["held_bytes"] == [tokens * result["entry_bytes"] for tokens in (16, seen + 16, seen + 15)]
