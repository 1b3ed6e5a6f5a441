"""Whoever reads a result is told whether real or random weights are behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvr_partition.provenance import random_weights
from tests.cli.program import program
from tests.models import build, provenance, write_folder, write_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("weights")
    write_folder(home / "routed", "gpt-oss", num_hidden_layers=2)
    build("llama-gqa").save_pretrained(home / "real")
    write_tokenizer(home / "real")
    return home


def test_generate_says_that_its_text_means_nothing(home: Path) -> None:
    line = ["generate", "--model", "routed", "--context", "16", "--max-new-tokens", "2", "--seed", "3", "--quiet"]
    assert json.loads(program(*line, "--format", "json", cwd=home).stdout)["weights"] == "random(seed=3), routed"
    done = program(*line, cwd=home)
    assert "weights: random(seed=3), routed" in done.stderr
    assert "the tokens mean nothing" in done.stderr
    assert len(done.stdout.split()) == 2


def test_generate_says_nothing_of_real_weights(home: Path) -> None:
    line = ["generate", "--model", "real", "--prompt", "a zebra", "--max-new-tokens", "2", "--quiet"]
    assert program(*line, cwd=home).stderr == ""
    assert json.loads(program(*line, "--format", "json", cwd=home).stdout)["weights"] == "checkpoint"


def test_verify_and_compare_say_it(home: Path) -> None:
    ranks = ["--model", "routed", "--dtype", "bfloat16", "--quiet"]
    verified = program("verify", "--context", "16", "--out", "out", *ranks, cwd=home)
    assert "routed on 2 cpu ranks, bfloat16\nweights: random(seed=0), routed: experts get other" in verified.stdout
    certificate = json.loads((home / "out" / "kvr.certificate.json").read_text())
    assert certificate["provenance"]["weights"] == "random(seed=0), routed"
    compare = ["compare", "--context", "32", "--methods", "kvr-e", "--samples", "2", *ranks]
    assert "weights: random(seed=0), routed" in program(*compare, cwd=home).stdout
    (compared,) = json.loads(program(*compare, "--format", "json", cwd=home).stdout)
    assert compared["weights"] == "random(seed=0), routed"


def test_results_from_before_weights_were_marked_go_on() -> None:
    before = provenance(weights="random(seed=0)")
    now = provenance(weights=random_weights(0, routed=True))
    assert now.weights != before.weights
    assert now.difference(before) is None
    assert now.difference(provenance(weights="random(seed=1)")) == "weights: random(seed=0), random(seed=1)"
    assert now.difference(provenance(weights="checkpoint")) is not None
