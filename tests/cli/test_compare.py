"""``compare`` and ``verify`` as a user runs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from kvr_partition import PartitionTable
from kvr_partition.table import Entry
from profiler.store import MeasurementLog
from tests.cli.program import one_error, program
from tests.models import provenance, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "llama", "llama-gqa", vocab_size=256)
    PartitionTable([Entry(64, (40, 24)), Entry(96, (56, 40)), Entry(128, (72, 56))]).save(tmp_path / "table.json")
    return tmp_path


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return program(*line.split(), cwd=folder)


def test_compare_shows_every_method_verified_and_under_noise(folder: Path) -> None:
    done = run(
        "compare --model llama --context 96 --table table.json --samples 2 --noise 20kB --bandwidth 50MB/s "
        "--log log.jsonl --format json",
        folder,
    )
    assert done.returncode == 0, done.stderr
    (context,) = json.loads(done.stdout)
    methods = {one["method"]: one for one in context["methods"]}
    assert list(methods) == [
        "stock",
        "single",
        "TSP",
        "TSP causal",
        "zigzag",
        "KVR-E",
        "KVR-S",
        "KVR-P",
        "KVR-S fanout",
        "TTFT(p) of KVR-S",
    ]
    assert "no tensor parallel" in done.stderr
    assert "verifying KVR-S fanout" in done.stderr
    assert methods["KVR-S"]["sizes"] == [56, 40]
    assert methods["TSP"]["speedup_over_tsp"] == 1.0
    assert methods["TSP"]["attention_dot_products"] == 3 * 96 * 96
    assert methods["KVR-S"]["attention_dot_products"] == 3 * 96 * 97 // 2
    assert methods["KVR-S"]["kv_bytes"] == 56 * 3 * 2 * 2 * 16 * 4
    assert methods["KVR-S"]["over_bound"] is not None
    for name, one in methods.items():
        quiet = name in ("stock", "single", "TTFT(p) of KVR-S")
        assert (one["loss_under_noise"] is None) == quiet
        assert one["ttft_s"] > 0
    with MeasurementLog(folder / "log.jsonl") as log:
        assert {one.noise for one in log.measurements()} == {0, 20_000}
        assert all("held to 0.05 GB/s" in origin.link for origin in log.provenance.values())


def test_compare_takes_the_methods_it_is_given(folder: Path) -> None:
    done = run(
        "compare --model llama --context 64,96 --methods tsp,kvr-e,tp --samples 2 --topology fanout", folder
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0][:2] == ["llama", "on"]
    assert lines[1] == ["weights:", "random(seed=0)"]
    assert lines[3][:2] == ["context", "method"]
    # A busy machine may be noticed behind the table.
    table = lines[5 : lines.index([], 5) if [] in lines[5:] else None]
    assert [line[0] for line in table] == ["64", "tensor", "KVR-E", "96", "tensor", "KVR-E"]


def test_verify_prints_and_writes_certificates(folder: Path) -> None:
    done = run("verify --model llama --context 48 --partition 30/18 --methods kvr,zigzag --out certified", folder)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1] == ["weights:", "random(seed=0)"]
    assert lines[2] == ["layers:", "stock"]
    rows = lines[6:]
    assert [row[:3] for row in rows] == [["kvr", "30/18", "holds"], ["zigzag", "24/24", "holds"]]
    certificate = json.loads((folder / "certified" / "kvr.certificate.json").read_text())
    assert certificate["schema"] == "kvr-partition/certificate/2"
    assert certificate["provenance"]["model"]["name"] == "llama"
    assert len(certificate["deviations"]) == 2 * 3 + 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("verify --model llama --context 48 --partition 30/10/8", 2, "has 3 chunks, but there are 2 ranks"),
        ("verify --model llama --methods magic", 1, "unknown method 'magic'"),
        ("verify --model llama --methods stock", 1, "leave it out"),
        ("compare --model llama --context 64 --methods kvr-x", 1, "unknown method 'kvr-x' in --methods"),
        ("compare --model llama --context 64 --bandwidth fast", 1, "like 64MB"),
        ("compare --model llama --context 64 --noise lots", 1, "like 64MB"),
        (
            "compare --model llama --context 64 --topology ring",
            1,
            "unknown topology 'ring'; there are auto, chain, fanout",
        ),
        ("compare --model llama --context 64 --backend sm", 1, "cuts one NVIDIA GPU into ranks"),
    ],
)
def test_bad_input_is_told_in_one_line(folder: Path, arguments: str, code: int, message: str) -> None:
    if "--backend sm" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    assert message in one_error(run(arguments, folder), code)


def test_a_table_of_other_layers_is_told(folder: Path) -> None:
    PartitionTable([Entry(96, (56, 40))], provenance()).save(folder / "other.json")
    line = "compare --model llama --context 96 --table other.json --methods kvr-s --samples 2 --no-verify"
    done = run(f"{line} --layers fused", folder)
    assert done.returncode == 0, done.stderr
    told = "--table is from other measurements: layers stock, not fused(norm, rotary, activation, residual)"
    assert told in " ".join(done.stderr.split())
    assert "layers stock" not in run(line, folder).stderr
