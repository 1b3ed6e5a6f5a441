"""Bad input gets one clear line: what is wrong, where, what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvr_partition import PartitionTable
from kvr_partition.cli.doctor import link_lines
from kvr_partition.table import Entry
from tests.cli.program import one_error, program
from tests.models import write_folder, write_tokenizer

TABLE = PartitionTable([Entry(64, (40, 24)), Entry(128, (72, 56))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "llama", "llama-gqa")
    write_folder(tmp_path / "mamba", "llama-gqa")
    (tmp_path / "mamba" / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 2}')
    (tmp_path / "empty").mkdir()
    TABLE.save(tmp_path / "table.json")
    (tmp_path / "torn.json").write_bytes(TABLE.to_json()[:-30])
    write_folder(tmp_path / "gguf", "llama-gqa")
    (tmp_path / "gguf" / "model-q4.gguf").write_bytes(b"GGUF")
    write_folder(tmp_path / "mrope", "llama-gqa", rope_scaling={"type": "mrope", "mrope_section": [2, 2, 4]})
    write_folder(tmp_path / "small", "llama-gqa", vocab_size=200)
    write_tokenizer(tmp_path / "small")
    background = tmp_path / "background"
    background.mkdir()
    (background / "thesis.tex").write_text("precious")
    return tmp_path


CASES = [
    (
        "search --model llama --ranks 5 --contexts 4",
        2,
        "4 tokens cannot give each of 5 ranks a token; use fewer ranks",
    ),
    ("search --model llama --contexts 600", 2, "600 tokens are beyond the 512 positions"),
    ("search --model llama --contexts many", 2, "contexts are written as 4096,8192 or start:stop:step"),
    ("search --model llama --contexts 64:32:8", 2, "contexts are written as"),
    ("search --model llama --contexts 0,64", 2, "contexts are written as"),
    ("search --model empty --contexts 64", 1, "model folder empty has no config.json"),
    ("search --model nowhere --contexts 64", 1, "model folder nowhere does not exist"),
    ("search --model mamba --contexts 64", 1, "layer 0 of mamba keeps a LinearAttentionLayer"),
    (
        "search --model llama --contexts 64 --sampler luck",
        1,
        "unknown sampler 'luck'; there are informed, hierarchical, gp, tpe, cmaes",
    ),
    ("search --model llama --contexts 64 --backend tpu", 1, "unknown backend 'tpu'; there are auto, cpu, cuda"),
    ("search --model llama --contexts 64 --dtype int3", 1, "unknown dtype 'int3'; there are float32"),
    ("search --model llama --contexts 64 --depth deep", 1, "unknown depth 'deep'"),
    ("search --model llama --contexts 64 --ranks 1", 1, "--ranks must be at least 2"),
    ("search --model llama --contexts 64 --budget 0", 1, "--budget must be at least 1"),
    ("search --model llama --contexts 64 --out background", 1, "background holds something else than a search"),
    ("search --model llama --contexts 64 --out table.json", 1, "table.json is a file; name a folder with --out"),
    ("search --ranks two", 2, "invalid int value: 'two'"),
    ("compare --model llama --context 64 --partition 40/25", 2, "40/25 sum to 65, not to the context of 64"),
    ("compare --model llama --context 64,65 --partition 40/24", 2, "--partition goes with a single --context"),
    ("compare --model llama --context 64 --table torn.json", 1, "torn.json is not"),
    ("predict --table table.json --context 129", 1, "outside the searched range of 64 to 128 tokens"),
    ("predict --table table.json --context 64 --ranks 3", 1, "nothing was searched for 3 ranks; the table has 2"),
    ("predict --table torn.json --context 64", 1, "torn.json is not"),
    ("predict --table missing.json --context 64", 1, "missing.json does not exist"),
    ("predict --context 64", 2, "one of the arguments --table --predictor is required"),
    ("export table.json --format xml", 2, "invalid choice: 'xml'"),
    (
        "export table.json --output nowhere/out.csv",
        1,
        "nowhere/out.csv cannot be written: No such file or directory",
    ),
    ("generate --model llama --prompt hello", 1, "has no tokenizer that transformers can load; give token ids"),
    ("generate --model llama --prompt-ids 1,x", 2, "token ids are written as 1,17,42"),
    ("generate --model llama --prompt-ids 1,999", 2, "token id 999 is not in the model's vocabulary of 257"),
    ("generate --model small --prompt 1984", 1, "which is not in the model's vocabulary of 200"),
    (
        "generate --model gguf --context 16",
        1,
        "weights that transformers does not load from there (model-q4.gguf)",
    ),
    ("verify --model mrope --context 16", 1, "transformers cannot build the model of mrope: KeyError 'mrope'"),
    ("generate --model llama --context 1", 2, "1 tokens cannot give each of 2 ranks a token"),
    ("generate --model llama --context 64 --table table.json --ranks 3", 1, "nothing was searched for 3 ranks"),
    ("dance", 2, "invalid choice: 'dance'"),
    ("", 2, "required: COMMAND"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), CASES, ids=[case[0] or "nothing" for case in CASES])
def test_one_line_says_what_is_wrong(folder: Path, arguments: str, code: int, says: str) -> None:
    assert says in one_error(program(*arguments.split(), cwd=folder), code)
    assert (folder / "background" / "thesis.tex").read_text() == "precious"


def test_a_prompt_answers_no_question_of_a_folder(folder: Path) -> None:
    mine = write_folder(folder / "mine", "llama-gqa", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    (mine / "mine.py").write_text("print('code of the folder ran')")
    done = program("generate", "--model", "mine", "--prompt", "-", cwd=folder, stdin="y\nhello\n")
    assert "needs code of its folder (auto_map), which is never run" in one_error(done, 1)
    assert "ran" not in done.stdout


def test_nccl_without_enough_gpus(folder: Path) -> None:
    done = program(
        "search", "--model", "llama", "--contexts", "64", "--ranks", "64", "--backend", "cuda", cwd=folder
    )
    assert "backend 'cuda' (NCCL) needs one GPU a rank: 64 ranks" in one_error(done, 1)


def test_help_has_an_example_for_every_command(folder: Path) -> None:
    for command in ("search", "compare", "predict", "export", "generate", "doctor"):
        done = program(command, "--help", cwd=folder)
        assert done.returncode == 0
        assert f"kvr-partition {command}" in done.stdout
        assert "Example" in done.stdout
    assert program("--help", cwd=folder).stdout.count("\n") > 10
    assert program("--version", cwd=folder).stdout.startswith("kvr-partition ")


def test_doctor_looks_at_this_machine(folder: Path) -> None:
    report = json.loads(program("doctor", "--format", "json", cwd=folder).stdout)
    assert report["backends"]["cpu"] == "ready (gloo)"
    assert report["packages"]["run"]["torch"] is not None
    cpu = [kernel for kernel in report["kernels"] if kernel["device"] == "cpu"]
    assert cpu
    assert all(kernel["state"] == "works" for kernel in cpu)
    printed = program("doctor", "--links", cwd=folder).stdout
    assert "kvr-partition search" in printed
    for pair in ("0→1", "0→2", "1→2"):
        assert f"{pair}: gloo" in printed
    assert "1→2 moves while 0→1 is held" in printed


def test_doctor_says_of_a_link_that_waits_for_another_that_it_does() -> None:
    found = {"pairs": [], "held": [{"link": "1→2", "while": "0→1", "moves": False}], "failed": "rank 2 is gone"}
    assert link_lines(found) == [
        "link     1→2 does NOT move while 0→1 is held",
        "link     could not be tried: rank 2 is gone",
    ]
