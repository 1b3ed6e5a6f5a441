"""Search, train, predict and export, as a user runs them one after the other."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kvr_partition import Partition, PartitionPredictor, PartitionTable, load
from kvr_partition.schemas import schemas
from kvr_partition.table import Entry
from kvr_partition.training import REGRESSORS, best_method, evaluate, load_dataset
from tests.cli.program import ROOT, one_error, program
from tests.models import write_folder
from tests.profiles import profile_of

CONTEXTS = (96, 160, 256, 400)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Searches on simulated ranks, without and with past tokens, and what was trained on each."""
    folder = tmp_path_factory.mktemp("home")
    profile_of(write_folder(folder / "llama", "llama-gqa", max_position_embeddings=1024)).save(
        folder / "profile.json"
    )
    on = "--model llama --ranks 3 --backend simulate --profile profile.json --samples 1 --budget 3 --quiet"
    searched = f"search {on} --contexts {','.join(map(str, CONTEXTS))} --out out"
    for past in ("", " --past 64"):
        done = program(*(searched + past).split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    line = "train out --out my.json --dataset rows.json --format json --quiet"
    done = program(*line.split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "trained.json").write_text(done.stdout)
    return folder


def run(line: str, home: Path) -> subprocess.CompletedProcess[str]:
    return program(*line.split(), cwd=home)


def test_training_keeps_the_best_way_and_shows_all(home: Path) -> None:
    training = json.loads((home / "trained.json").read_text())["training"]
    overall = {one["method"]: one["regret"] for one in training["scores"] if one["ranks"] is None}
    assert set(overall) == set(REGRESSORS)
    assert (training["rows"], training["measured"]) == (8, 0)
    rows = load_dataset(home / "rows.json").rows
    assert {(row.context, row.past) for row in rows} == {(one, past) for one in CONTEXTS for past in (0, 64)}
    assert {row.origin for row in rows} == {"simulated"}
    assert training["method"] == best_method(evaluate(rows))
    predictor = load(home / "my.json")
    assert isinstance(predictor, PartitionPredictor)
    assert predictor.training.digest == training["digest"]
    assert predictor.provenance is not None
    assert predictor.provenance.backend == "simulate"
    again = run("train --rows rows.json --out again.json --method corrected --quiet", home)
    assert again.returncode == 0, again.stderr
    assert "again.json (corrected)" in again.stdout
    assert "3 ranks: contexts 96 to 400" in again.stdout
    coarse = run("train --rows rows.json --out coarse.json --quantum 16 --quiet", home)
    assert coarse.returncode == 0, coarse.stderr
    in_steps = load(home / "coarse.json")
    assert isinstance(in_steps, PartitionPredictor)
    assert all(boundary % 16 == 0 for boundary in in_steps.predict(304).partition.boundaries)
    # A dataset says where its rows are from, so what is trained on it knows what it is for.
    other = load(home / "again.json")
    assert isinstance(other, PartitionPredictor)
    assert other.provenance == predictor.provenance
    both = run("train out --rows rows.json --rows rows.json --out both.json --quiet --format json", home)
    assert json.loads(both.stdout)["training"] == training


def test_predict_asks_either_and_explains(home: Path) -> None:
    predictor = load(home / "my.json")
    assert isinstance(predictor, PartitionPredictor)
    right = predictor.predict(300, past=64).partition
    found = json.loads(
        run("predict --predictor my.json --context 300 --past 64 --explain --format json", home).stdout
    )
    assert (found["sizes"], found["past"], found["source"]) == (list(right.sizes), 64, "predicted")
    assert found["explanation"]["nearest"] == [256, 400]
    shown = run("predict --predictor my.json --context 300 --explain", home).stdout
    assert "searched at 256 and 400 tokens; on unseen contexts" in shown
    table = load(home / "out" / "table.json")
    assert isinstance(table, PartitionTable)
    with_past = run("predict --table out/table.json --context 300 --past 64", home).stdout
    assert with_past == f"{'/'.join(map(str, table.lookup(300, past=64).partition.sizes))}  (interpolated)\n"
    assert "outside the trained range of 96 to 400" in one_error(
        run("predict --predictor my.json --context 500", home), 1
    )
    beyond = run("predict --predictor my.json --context 500 --fallback cost-model", home).stdout
    assert beyond.endswith("(cost-model)\n")
    message = one_error(run("predict --table out/table.json --context 300 --explain", home), 1)
    assert "need a predictor" in message
    assert "is a predictor; name a table.json" in one_error(run("predict --table my.json --context 300", home), 1)


def test_compare_times_what_a_predictor_says(home: Path) -> None:
    line = "compare --model llama --ranks 3 --backend simulate --profile profile.json --context 300 --samples 1"
    found = json.loads(run(f"{line} --predictor my.json --methods kvr-e,kvr-p --format json --quiet", home).stdout)
    predictor = load(home / "my.json")
    assert isinstance(predictor, PartitionPredictor)
    by_name = {one["method"]: one for one in found[0]["methods"]}
    assert by_name["KVR-P"]["sizes"] == list(predictor.predict(300).partition.sizes)
    assert by_name["KVR-P"]["ttft_s"] <= by_name["KVR-E"]["ttft_s"]
    message = one_error(run(f"{line} --predictor out/table.json --quiet", home), 1)
    assert "is a table; name a predictor" in message


def test_generate_takes_a_predictor_or_says_why_the_bundled_one_does_not_fit(home: Path) -> None:
    line = "generate --model llama --ranks 3 --context 128 --max-new-tokens 2"
    found = json.loads(run(f"{line} --table my.json --format json", home).stdout)
    predictor = load(home / "my.json")
    assert isinstance(predictor, PartitionPredictor)
    assert (found["sizes"], found["partition_source"]) == (
        list(predictor.predict(128).partition.sizes),
        "predicted",
    )
    done = run(line, home)
    assert "even split: no predictor comes with llama" in done.stderr


def test_bad_training_is_told_in_one_line(home: Path, tmp_path: Path) -> None:
    assert "nothing to train on" in one_error(run("train --quiet", home), 1)
    assert "does not exist" in one_error(run("train nowhere --quiet", home), 1)
    # Each past share was searched at one context only, so the published way has nothing to interpolate between.
    message = one_error(run("train out --method interpolation --quiet", home), 2)
    assert "interpolation cannot answer everything inside the searched range" in message
    assert "unknown method 'magic'" in one_error(run("train out --method magic --quiet", home), 2)
    shutil.copytree(home / "out", tmp_path / "out")
    (tmp_path / "out" / "measurements.jsonl").unlink()
    assert "it has no measurements.jsonl" in one_error(program("train", "out", "--quiet", cwd=tmp_path), 1)


# ------------------------------------------------------------------------------------------- export


def test_json_csv_and_markdown_as_ever(home: Path) -> None:
    for name, kind in (("out/table.json", PartitionTable), ("my.json", PartitionPredictor)):
        exported = run(f"export {name} --output copy.json", home)
        assert exported.returncode == 0, exported.stderr
        copy, original = load(home / "copy.json"), load(home / name)
        assert isinstance(copy, kind)
        assert copy.to_json() == original.to_json()
    assert run("export out/table.json --format csv", home).stdout.count("\n") == 1 + 8
    assert "| 3 | 96 |" in run("export out/table.json --format markdown", home).stdout
    assert "export a table, not a predictor" in one_error(run("export my.json --format csv", home), 1)


def weights_to_lengths(weights: list[float], tokens: int) -> tuple[int, ...]:
    """Chunks as the community's vLLM branch makes them from weights: largest remainder, earlier ranks first."""
    total = sum(weights)
    ideal = [tokens * weight / total for weight in weights]
    lengths = [int(value) for value in ideal]
    order = sorted(range(len(weights)), key=lambda at: (lengths[at] - ideal[at], at))
    for at in order[: tokens - sum(lengths)]:
        lengths[at] += 1
    return tuple(lengths)


@pytest.mark.parametrize("source", ["out/table.json", "my.json"])
def test_vllm_gets_static_weights_or_those_of_all_contexts(home: Path, source: str) -> None:
    knows: Any = load(home / source)
    one = json.loads(run(f"export {source} --format vllm --context 300", home).stdout)
    right = knows.predict(300) if isinstance(knows, PartitionPredictor) else knows.lookup(300)
    assert set(one) == {"pcp_partition_weights"}
    assert weights_to_lengths(one["pcp_partition_weights"], 300) == right.partition.sizes
    every = json.loads(run(f"export {source} --format vllm", home).stdout)
    by_context = dict(every["pcp_partition_weights_by_context"])
    assert every["pcp_partition_weights"] == by_context[400]
    assert {96, 160, 256, 400} <= set(by_context)
    for context, weights in by_context.items():
        assert len(weights) == 3
        assert all(weight > 0 for weight in weights)
        assert sum(weights) == pytest.approx(1)
        known = knows.predict(context) if isinstance(knows, PartitionPredictor) else knows.lookup(context)
        assert weights_to_lengths(weights, context) == pytest.approx(known.partition.sizes, abs=1)
    assert "go with --format vllm" in one_error(run(f"export {source} --context 300", home), 1)


def test_several_rank_counts_must_be_told_apart_for_vllm(tmp_path: Path) -> None:
    table = PartitionTable([Entry(8, (5, 3)), Entry(8, (3, 3, 2)), Entry(16, (9, 7))])
    table.save(tmp_path / "table.json")
    message = one_error(program("export", "table.json", "--format", "vllm", cwd=tmp_path), 1)
    assert "there are partitions for 2, 3 ranks; say which" in message
    done = program("export", "table.json", "--format", "vllm", "--ranks", 2, cwd=tmp_path)
    assert json.loads(done.stdout) == {
        "pcp_partition_weights": [0.5625, 0.4375],
        "pcp_partition_weights_by_context": [[8, [0.625, 0.375]], [16, [0.5625, 0.4375]]],
    }


def test_a_router_table_tells_the_same_and_fits_its_schema(home: Path) -> None:
    for source in ("out/table.json", "my.json"):
        document = json.loads(run(f"export {source} --format router", home).stdout)
        jsonschema.validate(document, schemas()["router"])
        assert document["model"] == "llama"
        knows: Any = load(home / source)
        for route in document["routes"]:
            partition = Partition.from_cuts(route["cuts"], route["context"], route["quantum"], route["past"])
            right = (
                knows.predict(route["context"], past=route["past"])
                if isinstance(knows, PartitionPredictor)
                else knows.lookup(route["context"], past=route["past"])
            )
            assert partition == right.partition


def test_published_schemas_are_those_of_the_code_and_fit_the_files(home: Path) -> None:
    for name, schema in schemas().items():
        assert json.loads((ROOT / "docs" / "schema" / f"{name}.schema.json").read_text()) == schema
    for name, file in (("table", "out/table.json"), ("predictor", "my.json")):
        document = json.loads((home / file).read_text())
        jsonschema.validate(document, schemas()[name])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document, "schema": "another"}, schemas()[name])
