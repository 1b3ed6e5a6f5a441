"""Every example does what it says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvr_partition import Partition, PartitionPredictor, PartitionTable, load
from kvr_partition.table import Entry
from tests.cli.program import ROOT, environment, program
from tests.interpreter import HEAVY
from tests.models import build, config, write_folder

EXAMPLES = ROOT / "examples"


def run(command: list[str], cwd: Path, given: str = "") -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment(), input=given, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_of_them_are_tried() -> None:
    tried = Path(__file__).read_text()
    assert all(f'"{file.name}"' in tried for file in EXAMPLES.iterdir() if file.suffix in (".py", ".js"))


def test_serving_under_torchrun_equals_one_rank(tmp_path: Path) -> None:
    import torch

    from kvr_partition.runtime import decode, single

    write_folder(tmp_path / "llama", "llama-gqa")
    PartitionTable([Entry(16, (10, 6)), Entry(64, (36, 28))]).save(tmp_path / "table.json")
    prompts = [[(7 * at) % 257 for at in range(length)] for length in (16, 40, 9)]
    output = run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend=c10d",
         "--rdzv-endpoint=localhost:0", str(EXAMPLES / "serve.py"), "llama", "table.json"],
        tmp_path,
        "\n".join(" ".join(map(str, prompt)) for prompt in prompts) + "\n",
    )  # fmt: skip
    model = build("llama-gqa")
    right = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        right.append(" ".join(map(str, decode(model, ids, single(model, ids), 8)[0].tolist())))
    assert output.splitlines() == right
    assert config("llama-gqa")["vocab_size"] == 257


@pytest.fixture
def table(tmp_path: Path) -> Path:
    PartitionTable([Entry(1000, (600, 400)), Entry(4000, (2600, 1400))]).save(tmp_path / "table.json")
    return tmp_path


def test_a_router_needs_nothing_heavy(table: Path) -> None:
    lines = run([sys.executable, str(EXAMPLES / "router.py"), "table.json", "2"], table, "1000\n2500\n9000\n7 3\n")
    between = load(table / "table.json")
    assert isinstance(between, PartitionTable)
    assert lines.splitlines() == [
        "600/400 searched",
        f"{between.lookup(2500).partition} interpolated",
        "4500/4500 even",
        "4/3+past3 even",
    ]
    code = (
        "import runpy, sys, io; sys.argv = ['router.py', 'table.json', '2']; sys.stdin = io.StringIO('1500\\n')\n"
        f"runpy.run_path({str(EXAMPLES / 'router.py')!r}, run_name='__main__')\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    assert not set(run([sys.executable, "-c", code], table).split()) & set(HEAVY)


def test_retraining_on_ones_own_measurements(tmp_path: Path) -> None:
    write_folder(tmp_path / "llama", "llama-gqa", num_hidden_layers=2)
    printed = run([sys.executable, str(EXAMPLES / "retrain.py"), "llama", "64,128,256", "."], tmp_path)
    predictor = load(tmp_path / "predictor.json")
    assert isinstance(predictor, PartitionPredictor)
    assert predictor.training.measured == 3
    assert printed.split() == [str(predictor.predict(160).partition), predictor.training.method]
    assert predictor.provenance is not None
    assert predictor.provenance.backend == "cpu"


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
@pytest.mark.parametrize("quantum", [1, 64])
def test_another_language_cuts_where_the_table_does(table: Path, quantum: int) -> None:
    sizes = {1000: (600, 400), 4000: (2600, 1400)} if quantum == 1 else {1000: (640, 360), 4000: (2560, 1440)}
    PartitionTable(Entry(context, one, quantum=quantum) for context, one in sizes.items()).save(
        table / "table.json"
    )
    assert (
        program("export", "table.json", "--format", "router", "--output", "router.json", cwd=table).returncode == 0
    )
    for context in (1000, 1001, 2500, 3999, 4000):
        found = run(["node", str(EXAMPLES / "read_table.js"), "router.json", "2", str(context)], table).strip()
        knows = load(table / "table.json")
        assert isinstance(knows, PartitionTable)
        assert Partition.parse(found, context) == knows.lookup(context).partition
