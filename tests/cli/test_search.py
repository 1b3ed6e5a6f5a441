"""The main job, from measuring to serving, on real ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvr_partition import Partition, PartitionPredictor, load
from profiler.store import MeasurementLog
from tests.cli.program import begun, environment, one_error, patched, program
from tests.models import write_folder

SEARCH = [
    "search",
    "--model",
    "llama",
    "--contexts",
    "96,128,160",
    "--held-out",
    "144",
    "--budget",
    "4",
    "--samples",
    "2",
    "--out",
    "out",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search in ``out``."""
    folder = tmp_path_factory.mktemp("home")
    write_folder(folder / "llama", "llama-gqa", num_hidden_layers=2)
    done = program(*SEARCH, "--format", "json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "first.json").write_text(done.stdout)
    assert json.loads(done.stdout)["weights"] == "random(seed=0)"
    return folder


def test_it_measures_every_method_and_writes_the_best(home: Path) -> None:
    document = json.loads((home / "first.json").read_text())
    methods = {one["context"]: {m["method"]: m for m in one["methods"]} for one in document["contexts"]}
    assert set(methods) == {96, 128, 160, 144}
    for context in (96, 128, 160):
        assert set(methods[context]) == {"single", "TSP", "KVR-E", "KVR-S"}
    assert set(methods[144]) == {"single", "TSP", "KVR-E", "KVR-P"}
    # A search ends short of its budget where it says why: on a busy machine noise hides what could be won.
    stopped = {one["context"]: one["stopped"] for one in document["contexts"]}
    table = load(home / "out" / "table.json")
    assert table.contexts(2) == (96, 128, 160)
    for entry in table.entries:
        searched = methods[entry.context]["KVR-S"]
        assert (list(entry.sizes), entry.ttft_s) == (searched["sizes"], searched["ttft_s"])
        assert (entry.measured == 4) == (stopped[entry.context] == "budget")
        # It was timed side by side with the even split; how that decides, test_decision.py tells.
        with MeasurementLog(home / "out" / "measurements.jsonl") as log:
            timed = log.measurements(f"compare/{entry.context}")
        confirmed = {one.sizes: one.ttft_s for one in timed if one.method == "kvr"}
        assert confirmed[entry.sizes] == entry.ttft_s
        assert Partition.even(entry.context, 2).sizes in confirmed
    for named in methods.values():
        assert named["TSP"]["speedup_over_tsp"] == 1
        assert all(one["ttft_s"] > 0 and one["samples"] == 2 for one in named.values())
    assert methods[144]["KVR-P"]["sizes"] == list(table.lookup(144).partition.sizes)
    assert table.provenance is not None
    assert (table.provenance.model.name, table.provenance.backend) == ("llama", "cpu")


def test_every_sample_is_in_the_log(home: Path) -> None:
    document = json.loads((home / "first.json").read_text())
    with MeasurementLog(home / "out" / "measurements.jsonl") as log:
        for entry in load(home / "out" / "table.json").entries:
            context = entry.context
            assert len(log.measurements(f"search/{context}")) == entry.measured
            compared = {(one.method, one.sizes): one for one in log.measurements(f"compare/{context}")}
            shown = next(one for one in document["contexts"] if one["context"] == context)
            for method in shown["methods"]:
                name = {"single": "single", "TSP": "tsp"}.get(method["method"], "kvr")
                assert compared[name, tuple(method["sizes"])].ttft_s == method["ttft_s"]
        assert len(log.provenance) == 1
        assert len(log.chunks) >= 9


def test_the_same_command_measures_nothing_twice(home: Path) -> None:
    before = (home / "out" / "measurements.jsonl").read_text().splitlines()
    done = program(*SEARCH, "--format", "json", cwd=home)
    assert done.stdout == (home / "first.json").read_text()
    after = (home / "out" / "measurements.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert [json.loads(line)["type"] for line in after[len(before) :]] == ["run"]


def test_the_study_database_can_be_lost(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "copy")
    out = tmp_path / "copy" / "out"
    (out / "study.db").write_bytes(b"torn" * 500)
    assert "move the database away" in one_error(program(*SEARCH, "--quiet", cwd=tmp_path / "copy"), 1)
    (out / "study.db").unlink()
    before = len(load(out / "table.json").entries)
    seeds_before = sum('"purpose":"search/96"' in line for line in (out / "measurements.jsonl").open())
    done = program(*SEARCH, "--budget", "1", "--quiet", cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert len(load(out / "table.json").entries) == before
    # The even split of the new study had been measured; it was found in the log.
    assert sum('"purpose":"search/96"' in line for line in (out / "measurements.jsonl").open()) == seeds_before


def test_a_torn_line_is_set_aside_and_other_damage_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "copy")
    log = tmp_path / "copy" / "out" / "measurements.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"type":"sample","run":"abc","purp')
    done = program(*SEARCH, cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert "a torn last line was set aside" in done.stderr
    assert log.read_bytes().startswith(whole)
    lines = whole.splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:4], b"garbage\n", *lines[5:]]))
    assert "line 5 is not a measurement" in one_error(program(*SEARCH, cwd=tmp_path / "copy"), 1)


def test_another_search_does_not_mix_with_it(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "copy")
    folder = tmp_path / "copy"
    write_folder(folder / "other", "qwen2")
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.name != ".lock"}
    message = one_error(program("search", "--model", "other", "--contexts", "96", "--out", "out", cwd=folder), 1)
    assert "out belongs to a search with model name=llama, not name=other" in message
    message = one_error(program(*SEARCH, "--ranks", "3", cwd=folder), 1)
    assert "out belongs to a search with ranks 2, not 3" in message
    message = one_error(program(*SEARCH, "--dtype", "bfloat16", cwd=folder), 1)
    assert "dtype float32, not bfloat16; choose another --out, or --fresh" in message
    table = json.loads((folder / "out" / "table.json").read_text())
    (folder / "out" / "table.json").write_text(json.dumps({**table, "schema": "kvr-partition/table/0"}))
    assert "has schema 'kvr-partition/table/0'" in one_error(program(*SEARCH, cwd=folder), 1)
    (folder / "out" / "table.json").write_bytes(before["table.json"])
    after = {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.name != ".lock"}
    assert after == before


def test_fresh_sets_aside_and_loses_nothing(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "copy")
    folder = tmp_path / "copy"
    before = (folder / "out" / "measurements.jsonl").read_bytes()
    done = program(*SEARCH, "--contexts", "96", "--budget", "1", "--fresh", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.old1" / "measurements.jsonl").read_bytes() == before
    assert load(folder / "out" / "table.json").contexts(2) == (96,)


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "optuna", "sklearn", "transformers", "numpy", "scipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_serving_needs_neither_torch_nor_optuna_nor_scikit_learn(home: Path) -> None:
    table = home / "out" / "table.json"
    right = load(table).lookup(144)
    code = WITHOUT + (
        "from kvr_partition import load\n"
        f"found = load({str(table)!r}).lookup(144)\n"
        "print(*found.partition.sizes, found.source)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(), cwd=home
    )
    assert done.stdout.split() == [*map(str, right.partition.sizes), "interpolated"]
    arguments = ["predict", "--table", str(table), "--context", "144", "--format", "json"]
    code = WITHOUT + f"from kvr_partition.cli.main import main; main({arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(), cwd=home
    )
    assert json.loads(done.stdout)["sizes"] == list(right.partition.sizes)
    code = WITHOUT + "from kvr_partition.cli.main import main; main(['search'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment(), cwd=home
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'kvr-partition[" in done.stderr


def test_predict_export_compare_and_generate_use_the_table(home: Path) -> None:
    table = load(home / "out" / "table.json")
    sizes = "/".join(map(str, table.lookup(96).partition.sizes))
    assert (
        program("predict", "--table", "out/table.json", "--context", 96, cwd=home).stdout
        == f"{sizes}  (searched)\n"
    )
    csv = program("export", "out/table.json", "--format", "csv", cwd=home).stdout
    assert csv.count("\n") == 4
    assert sizes in csv
    assert program("export", "out/table.json", "--output", "again.json", cwd=home).returncode == 0
    assert load(home / "again.json").entries == table.entries

    compare = (
        "compare --model llama --context 128,144 --table out/table.json --samples 1 --format json --log c.jsonl "
        "--methods single,tsp,kvr-e,kvr-s,kvr-p"
    )
    shown = json.loads(program(*compare.split(), cwd=home).stdout)
    names = [[method["method"] for method in one["methods"]] for one in shown]
    assert names == [["single", "TSP", "KVR-E", "KVR-S", "KVR-P"], ["single", "TSP", "KVR-E", "KVR-P"]]
    left_out = table.without(128, 2).lookup(128).partition.sizes
    assert shown[0]["methods"][4]["sizes"] == list(left_out)
    with MeasurementLog(home / "c.jsonl") as log:
        distinct = {
            (m["method"] in ("single", "TSP") and m["method"], *m["sizes"])
            for one in shown
            for m in one["methods"]
        }
        assert len(log.measurements()) == len(distinct)

    generate = [
        "generate",
        "--model",
        "llama",
        "--context",
        "144",
        "--table",
        "out/table.json",
        "--max-new-tokens",
        "5",
    ]
    document = json.loads(program(*generate, "--format", "json", cwd=home).stdout)
    assert document["partition_source"] == "interpolated"
    assert len(document["tokens"]) == 5
    assert document["ttft_s"] > 0
    streamed = program(*generate, cwd=home)
    assert streamed.stdout.split() == [str(token) for token in document["tokens"]]
    assert "first token after" in streamed.stderr


def test_what_it_says_to_run_next_runs(home: Path) -> None:
    printed = program(*SEARCH, cwd=home).stdout
    assert "weights: random(seed=0)\n" in printed
    lines = [line.split() for line in printed.partition("Next:")[2].splitlines()]
    commands = [line[3:] for line in lines if line[:3] == ["python", "-m", "kvr_partition"]]
    # A predictor can be trained only where the machine was quiet enough to tell what a chunk costs.
    assert [one[0] for one in commands] in (
        ["predict", "export", "generate"], ["predict", "export", "generate", "train"]
    )  # fmt: skip
    for one in commands:
        done = program(*one, cwd=home)
        assert done.returncode == 0, done.stderr
    assert (home / "my.predictor.json").exists() == (commands[-1][0] == "train")


def test_killed_at_any_moment_it_goes_on_and_loses_nothing(home: Path, tmp_path: Path) -> None:
    """kill -9 of the program itself, three times at random moments of its measuring; then to the end."""
    write_folder(tmp_path / "llama", "llama-gqa", num_hidden_layers=2)
    log = tmp_path / "out" / "measurements.jsonl"
    draw = random.Random(2024)
    for _ in range(3):
        before = log.read_bytes() if log.exists() else b""
        running = begun(*SEARCH, "--quiet", cwd=tmp_path, output=tmp_path / "printed")
        wanted = before.count(b"\n") + draw.randrange(2, 12)
        until = time.monotonic() + 120
        while time.monotonic() < until and running.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        assert log.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    done = program(*SEARCH, "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with MeasurementLog(log) as measured:
        counts = [len(measured.measurements(f"search/{context}")) for context in (96, 128, 160)]
    # A search ends short of its budget only where it says why.
    told = {one["context"]: one["stopped"] for one in json.loads(done.stdout)["contexts"]}
    assert [count == 4 for count in counts] == [told[context] == "budget" for context in (96, 128, 160)]
    finished = [line for line in log.read_text().splitlines() if '"type":"measurement"' in line]
    keys = [(line["purpose"], line["method"], *line["sizes"]) for line in map(json.loads, finished)]
    assert len(keys) == len(set(keys)), "something finished was measured again"
    with sqlite3.connect(tmp_path / "out" / "study.db") as database:
        kept = database.execute("select count(*) from trial_user_attributes where key = 'measurement'").fetchone()
    assert kept == (sum(counts),)
    assert load(tmp_path / "out" / "table.json").contexts(2) == (96, 128, 160)


NOISY = """
import profiler.prior
from kvr_partition.machine.cost import FitError
def refused(*_):
    raise FitError("the fitted costs are only good to 30%")
profiler.prior.measured_machine = refused
"""


def test_where_noise_hides_costs_the_search_goes_on_from_a_guess(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "llama", tmp_path / "llama")
    done = patched(NOISY, *SEARCH, "--verbose", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from a guess of what chunks cost: the fitted costs are only good to 30%" in done.stderr
    assert "informed" in done.stderr
    assert load(tmp_path / "out" / "table.json").contexts(2) == (96, 128, 160)
    with MeasurementLog(tmp_path / "out" / "measurements.jsonl") as log:
        assert [one.sizes for one in log.measurements("guess")] == [(160,)]
        assert log.operations is not None
    # Measurements correct a guess as they correct a fit, so a predictor can be trained on both.
    assert "train out --out my.predictor.json" in done.stdout
    trained = program("train", "out", "--out", "my.predictor.json", "--quiet", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    predictor = load(tmp_path / "my.predictor.json")
    assert isinstance(predictor, PartitionPredictor)
    assert predictor.predict(112).partition.context == 112


def test_two_runs_do_not_write_to_the_same_folder(home: Path) -> None:
    import fcntl

    with (home / "out" / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "out is in use by another run" in one_error(program(*SEARCH, cwd=home), 1)


FULL_DISK = """
import os, resource, signal
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import profiler.ranks
start = profiler.ranks.RankGroup.start
def limited(self):
    start(self)
    size = Path("out/measurements.jsonl").stat().st_size + 1500
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
profiler.ranks.RankGroup.start = limited
"""


def test_no_room_for_results_is_one_line_and_the_search_goes_on_later(home: Path, tmp_path: Path) -> None:
    """The ranks run as ever; only files of the program itself may not grow any more."""
    write_folder(tmp_path / "llama", "llama-gqa", num_hidden_layers=2)
    shutil.copytree(home / "out", tmp_path / "out")
    os.truncate(tmp_path / "out" / "measurements.jsonl", _half(tmp_path / "out" / "measurements.jsonl"))
    (tmp_path / "out" / "study.db").unlink()
    before = (tmp_path / "out" / "measurements.jsonl").read_bytes()
    done = patched(FULL_DISK, *SEARCH, "--quiet", cwd=tmp_path)
    message = one_error(done, 1)
    assert "run the same command again" in message
    assert (tmp_path / "out" / "measurements.jsonl").read_bytes().startswith(before)
    assert program(*SEARCH, "--quiet", cwd=tmp_path).returncode == 0


def _half(path: Path) -> int:
    """Where the line in the middle of a file ends."""
    content = path.read_bytes()
    return content.find(b"\n", len(content) // 2) + 1


def test_a_folder_of_the_first_schema_is_gone_on_with(tmp_path: Path) -> None:
    old = Path(__file__).parent.parent / "fixtures" / "schema-1"
    for name in ("run", "llama"):
        shutil.copytree(old / name, tmp_path / name)
    before = (tmp_path / "run" / "measurements.jsonl").read_bytes()
    line = "search --model llama --ranks 2 --contexts 96 --budget 1 --samples 3 --out run"
    done = program(*line.split(), cwd=tmp_path)
    # Measured on another machine, so that it cannot be mixed with what this one would measure; or on this one.
    log = (tmp_path / "run" / "measurements.jsonl").read_bytes()
    assert log.startswith(before)
    if done.returncode:
        assert "layers" not in done.stderr
        assert "--fresh" in done.stderr
