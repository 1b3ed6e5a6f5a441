"""Groups of real ranks: what they measure, and that they never outlive or silence a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvr_partition import Partition, PartitionError
from kvr_partition.errors import RankError, UnsupportedError
from profiler import Candidate, MeasurementLog, RankGroup, SamplingPlan
from tests.forked import ROOT, ranks_environment
from tests.models import build, config, write_folder

FAST = SamplingPlan(warmup=1, least=2, most=2)


def gone(pids: list[int], within_s: float) -> bool:
    """Whether the processes end in that time."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    # A zombie has ended; whoever adopted it has just not looked yet.
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-llama", "llama-gqa")


@pytest.fixture(scope="module")
def group(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    with (
        MeasurementLog(tmp_path_factory.mktemp("log") / "measurements.jsonl") as log,
        RankGroup(llama, ranks=2, backend="cpu", log=log, timeout_s=120) as group,
    ):
        yield group


def test_it_times_every_method_and_counts_their_traffic(group: RankGroup) -> None:
    candidates = [Candidate.single(47), Candidate.tsp(47, 2), Candidate("kvr", Partition((30, 17)))]
    measurements = group.measure_many(candidates, plan=FAST)
    entry = 3 * 2 * 2 * 16 * 4
    assert [one.samples[0].kv_bytes for one in measurements] == [0, 47 * entry, 30 * entry]
    for one in measurements:
        assert one.ok
        assert len(one.samples) == 2
        for sample in one.samples:
            assert sample.ttft_s > 0
            assert len(sample.ranks) == 2
            # The last rank's own account of its time covers the TTFT, but for leaving the barrier.
            last = sample.ranks[-1]
            assert 0 < last.compute_s + last.wait_s <= sample.ttft_s * 1.05


def test_finished_measurements_are_found_again_and_unfinished_ones_taken_anew(group: RankGroup) -> None:
    partition = Partition((20, 27))
    first = group.measure(partition, plan=FAST, purpose="again")
    assert group.measure(partition, plan=FAST, purpose="again") == first
    assert group.measure(partition, plan=FAST, purpose="other").samples != first.samples


def test_the_log_names_the_conditions(group: RankGroup) -> None:
    assert group.log is not None
    group.measure(Partition((10, 10)), plan=FAST)
    provenance = group.log.provenance[group.run]
    assert provenance.difference(group.provenance) is None
    assert (provenance.ranks, provenance.backend, provenance.depth) == (2, "cpu", "attention")
    assert provenance.model.kv_heads == 2
    assert provenance.link == "gloo over loopback"


def test_any_chunk_is_as_good_as_its_neighbours_on_cpus(group: RankGroup) -> None:
    assert group.tile_rows == 1


def test_chunks_are_timed_on_every_rank(group: RankGroup) -> None:
    assert len(group.time_chunk(8, 100)) == 2
    for seconds, first_kv_s in group.time_chunk(8, 100):
        assert 0 < first_kv_s < seconds
    (times,) = group.time_links(1 << 16, 3)
    assert len(times) == 3
    assert min(times) > 0


def test_decoding_goes_on_from_the_prefill(group: RankGroup) -> None:
    import torch

    from kvr_partition.runtime import decode, single

    ids = list(range(40))
    tokens: list[int] = []
    times: list[float] = []
    group.generate(ids, Partition((25, 15)), 6, lambda token, at_s: (tokens.append(token), times.append(at_s)))
    model = build("llama-gqa")
    right = decode(model, torch.tensor([ids]), single(model, torch.tensor([ids])), 6)
    assert tokens == right[0].tolist()
    assert times == sorted(times)


def test_what_cannot_be_measured_is_refused_without_starting_or_ending_anything(group: RankGroup) -> None:
    group.start()
    pids = group.pids
    with pytest.raises(PartitionError, match="has 3 chunks; kvr on this group needs 2"):
        group.measure(Partition((1, 1, 1)))
    with pytest.raises(PartitionError, match="beyond the 512 positions"):
        group.measure(Partition((512, 1)))
    with pytest.raises(UnsupportedError, match="unknown method 'magic'"):
        group.measure(Partition((5, 5)), method="magic")
    for beyond in (257, -1):
        with pytest.raises(PartitionError, match=f"token id {beyond} is not in the model's vocabulary of 257"):
            group.generate([*range(9), beyond], Partition((5, 5)), 2, lambda token, at_s: None)
    assert group.pids == pids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_group_and_the_next_request_starts_another(llama: Path, rank: int) -> None:
    with RankGroup(llama, ranks=2, backend="cpu", timeout_s=60) as group:
        pids = group.pids
        os.kill(pids[rank], signal.SIGKILL)
        failed = group.measure(Partition((30, 17)), plan=FAST)
        assert failed.failure is not None
        assert failed.failure.kind == "lost"
        assert failed.failure.message == f"rank {rank} was killed by SIGKILL"
        assert gone(pids, 5)
        assert group.measure(Partition((30, 17)), plan=FAST).ok
        assert not set(group.pids) & set(pids)


def test_a_rank_that_hangs_ends_the_group_within_the_time_out(llama: Path) -> None:
    with RankGroup(llama, ranks=2, backend="cpu", timeout_s=60) as group:
        pids = group.pids
        os.kill(pids[1], signal.SIGSTOP)
        group._transport._timeout_s = 3.0  # type: ignore[union-attr]  # starting needs longer than hanging
        with pytest.raises(RankError, match="did not answer within 3 s") as caught:
            group.sample(Candidate("kvr", Partition((30, 17))))
        assert caught.value.kind == "timeout"
        # Rank 0 waits in the barrier for the stopped one, and says so.
        assert "worker.py" in caught.value.traceback
        assert "_barrier" in caught.value.traceback
        assert gone(pids, 5)


def test_an_error_on_a_rank_comes_back_with_its_traceback(llama: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "broken"
    write_folder(checkpoint, "llama-gqa")
    (checkpoint / "pytorch_model.bin").write_bytes(b"these are no weights")
    with pytest.raises(RankError, match="rank 0 failed") as caught:
        RankGroup(checkpoint, ranks=2, backend="cpu", timeout_s=60).start()
    assert "Traceback" in caught.value.traceback
    assert "build_model" in caught.value.traceback
    assert "\n" not in str(caught.value)


DRIVER = """
import sys
from profiler import RankGroup
group = RankGroup(sys.argv[1], ranks=2, backend="cpu")
group.start()
print(*group.pids, flush=True)
sys.stdin.read()
"""


def test_ranks_do_not_outlive_a_killed_driver(llama: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(llama)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) == 2
    assert all(_runs(pid) for pid in pids)
    driver.kill()
    driver.wait()
    assert gone(pids, 10)
    driver.stdin.close()  # type: ignore[union-attr]
    driver.stdout.close()


def test_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from kvr_partition.runtime import decode, single

    fields = config("llama-gqa")
    torch.manual_seed(1234)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    ids = list(range(20))
    right = decode(model, torch.tensor([ids]), single(model, torch.tensor([ids])), 5)[0].tolist()
    tokens: list[int] = []
    with RankGroup(tmp_path / "checkpoint", ranks=2, backend="cpu", timeout_s=60) as group:
        group.generate(ids, Partition((12, 8)), 5, lambda token, _: tokens.append(token))
        assert group.provenance.weights == "checkpoint"
    assert tokens == right


def test_a_checkpoint_with_parts_missing_is_refused_before_any_rank_starts(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build("llama-gqa").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: one for name, one in load_file(file).items() if "layers.1" not in name}, file)
    group = RankGroup(tmp_path, ranks=2, backend="cpu", timeout_s=60)
    with pytest.raises(UnsupportedError, match=r"no weights for model\.layers\.1.* and 8 more tensors"):
        group.start()
    assert group.pids == []


TORCHRUN = """
import json, os, sys
from kvr_partition import Partition
from profiler import Candidate, RankGroup, SamplingPlan
with RankGroup(sys.argv[1], ranks=3, backend="cpu", timeout_s=60) as group:
    assert os.environ["RANK"] == "0"
    plan = SamplingPlan(1, 2, 2)
    found = group.measure_many([Candidate.tsp(47, 3), Candidate("kvr", Partition((20, 15, 12)))], plan=plan)
    print("RESULT", json.dumps([[one.ok, one.samples[0].kv_bytes, len(one.samples[0].ranks)] for one in found]))
"""


def test_inside_torchrun_it_joins_the_world_that_is_there(llama: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    environment = ranks_environment()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=3",
            str(script),
            str(llama),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    entry = 3 * 2 * 2 * 16 * 4
    assert f"RESULT [[true, {2 * 47 * entry}, 3], [true, {(20 + 35) * entry}, 3]]" in done.stdout


def overflowing(folder: Path) -> Path:
    """A checkpoint whose second layer is out of half precision's range."""
    model = build("llama-gqa")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(3e4)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3e5)
    model.save_pretrained(folder)
    return folder


def test_numbers_out_of_range_are_no_measurement_and_no_certificate(tmp_path: Path) -> None:
    folder = overflowing(tmp_path / "overflow")
    with RankGroup(folder, ranks=2, backend="cpu", dtype="float16", timeout_s=60) as group:
        failed = group.measure(Partition((30, 17)), plan=FAST)
        assert failed.failure is not None
        assert failed.failure.kind == "not-finite"
        assert "layer 1" in failed.failure.message
        with pytest.raises(RankError, match="not finite: keys or values of layer 1") as caught:
            group.verify(Candidate("kvr", Partition((30, 17))))
        assert (caught.value.kind, caught.value.rank) == ("not-finite", 0)
    with RankGroup(folder, ranks=2, backend="cpu", timeout_s=60) as group:
        assert group.measure(Partition((30, 17)), plan=FAST).ok


def test_settings_of_a_checkpoint_hold_where_tokens_are_decoded_and_nowhere_else(tmp_path: Path) -> None:
    model = build("llama-gqa")
    model.generation_config.suppress_tokens = [7]
    model.save_pretrained(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "generation_config.json"
    ids = list(range(20))
    import json

    import torch

    given = torch.tensor([ids])
    plain = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=5, do_sample=False)[0, 20:]
    file.write_text(json.dumps({"suppress_tokens": [int(plain[0])], "num_beams": 1}))
    model.generation_config.suppress_tokens = [int(plain[0])]
    right = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=5, do_sample=False)[0, 20:]
    tokens: list[int] = []
    with RankGroup(tmp_path / "checkpoint", ranks=2, backend="cpu", timeout_s=60) as group:
        group.generate(ids, Partition((12, 8)), 5, lambda token, _: tokens.append(token))
        assert tokens == right.tolist()
        assert tokens[0] != int(plain[0])
        pids = group.pids
        file.write_text(json.dumps({"num_beams": 3}))
        # Refused before ranks are asked, and no matter for measuring.
        with pytest.raises(UnsupportedError, match="num_beams=3"):
            group.generate(ids, Partition((12, 8)), 5, lambda *_: None)
        assert group.measure(Partition((12, 8)), plan=FAST).ok
        assert group.pids == pids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stops_is_named_whoever_waits_for_it(llama: Path, rank: int) -> None:
    with RankGroup(llama, ranks=2, backend="cpu", timeout_s=60) as group:
        os.kill(group.pids[rank], signal.SIGSTOP)
        group._transport._timeout_s = 1.0  # type: ignore[union-attr]  # starting needs longer than hanging
        with pytest.raises(
            RankError, match=f"rank {rank} did not answer within 1 s: stopped, or hanging"
        ) as caught:
            group.sample(Candidate("kvr", Partition((30, 17))))
        assert (caught.value.kind, caught.value.rank, caught.value.phase) == ("timeout", rank, "prefill")


def test_what_goes_wrong_at_the_start_is_of_that_kind(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The process of a rank cannot even begin; a forked one has begun.
    monkeypatch.setattr("profiler.transport.subprocess", subprocess)
    monkeypatch.setenv("PYTHONMALLOC", "no such allocator")
    with pytest.raises(RankError) as caught:
        RankGroup(llama, ranks=2, backend="cpu", timeout_s=60).start()
    assert (caught.value.kind, caught.value.phase) == ("start", "start")
