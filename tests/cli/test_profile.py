"""``profile`` and ``--backend simulate`` as a user runs them."""

from __future__ import annotations

import json
import math
import random
import subprocess
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from kvr_partition import PartitionPredictor, PartitionTable, load
from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.profile import ChunkSample, LinkSample, Profile, load_profile
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.training import load_dataset
from profiler import RankGroup
from profiler.calibrate import LINK_BYTES, chunk_design, machine_of_log
from profiler.models import open_model
from profiler.store import MeasurementLog
from tests.cli.program import one_error, patched, program
from tests.models import provenance, write_folder
from tests.profiles import profile_of


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return program(*line.split(), cwd=folder)


@pytest.fixture
def simulated(tmp_path: Path) -> Path:
    """A folder with a model and a profile of three ranks of it."""
    profile_of(write_folder(tmp_path / "llama", "llama-gqa")).save(tmp_path / "profile.json")
    return tmp_path


ON = "--model llama --ranks 3 --backend simulate --profile profile.json"


def test_profile_times_real_ranks_and_keeps_the_samples(tmp_path: Path) -> None:
    # Wide enough that a chunk's time grows with its length.
    write_folder(tmp_path / "llama", "llama-gqa", hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
    done = run("profile --model llama --context 512 --log log.jsonl", tmp_path)
    with MeasurementLog(tmp_path / "log.jsonl") as log:
        kept = [one for one in log.chunks if not one.warmup]
        links = [one for one in log.links if not one.warmup]
    assert kept
    if done.returncode:
        # On a busy machine the gates may refuse the fit, which is what they are for. Nothing measured is lost.
        assert "fit" in one_error(done, 1) or "quieter" in done.stderr
        return
    profile = load_profile(tmp_path / "profile.json")
    assert profile.provenance.backend == "cpu"
    shape = profile.provenance.model
    assert (profile.layers, profile.entry_bytes) == (2, 2 * shape.kv_heads * shape.head_dim * 4)
    assert len(profile.links) == 1
    assert len(profile.chunk_samples) == len(kept)
    assert len(profile.link_samples) == len(links) == 4
    assert "--backend simulate" in done.stdout
    assert "weights: random(seed=0)\n" in done.stdout


@pytest.fixture
def profiled(tmp_path: Path) -> tuple[Path, Profile]:
    """A folder with a model and a profile of two CPU ranks of it, as if they had been timed."""
    folder = write_folder(tmp_path / "llama", "llama-gqa")
    with RankGroup(folder, 2, backend="cpu") as group:
        origin = group.provenance
    cost = ChunkCost(1e-3, 2e-5, 2e-9, 1.5e-9, 0.25)
    machine = Machine(cost, 3, group.entry_bytes, link=(LinkCost.of(2e9, 1e-4),), speeds=(1.0, 1.25))
    samples = tuple(
        ChunkSample(chunk, prefix, (taken := cost.seconds(chunk, prefix), taken / 1.25), (1e-3, 1e-3))
        for chunk, prefix in chunk_design(256, 2)
    )
    links = tuple(LinkSample(nbytes, ((machine.links(2)[0].seconds(nbytes),) * 3,)) for nbytes in LINK_BYTES)
    profile = Profile.of(machine, 256, origin, samples, links)
    profile.save(tmp_path / "profile.json")
    return tmp_path, profile


def test_a_profile_seeds_a_search_on_the_ranks_that_it_is_of(profiled: tuple[Path, Profile]) -> None:
    folder, profile = profiled
    line = "search --model llama --contexts 128,256 --budget 2 --samples 2 --profile profile.json --out out"
    done = run(line, folder)
    assert done.returncode == 0, done.stderr
    assert "timing a few chunks" not in done.stderr
    with MeasurementLog(folder / "out" / "measurements.jsonl") as log:
        assert [(one.chunk, one.prefix, one.seconds) for one in log.chunks] == [
            (one.chunk, one.prefix, one.seconds) for one in profile.chunk_samples
        ]
        assert len(log.links) == len(profile.link_samples)
        (origin,) = log.provenance.values()
        assert machine_of_log(log, origin).speeds == pytest.approx(profile.machine().speeds, rel=0.2)
    # Without a cost to correct, the sampler would be another one.
    assert "informed" in done.stderr
    again = run(line, folder)
    assert again.returncode == 0, again.stderr
    with MeasurementLog(folder / "out" / "measurements.jsonl") as log:
        assert len(log.chunks) == len(profile.chunk_samples)


def test_a_profile_of_other_ranks_seeds_nothing(profiled: tuple[Path, Profile]) -> None:
    folder, profile = profiled
    longer = run("search --model llama --contexts 512 --profile profile.json", folder)
    assert "the profile tells of contexts up to 256 tokens, not of 512" in one_error(longer, 1)
    other = msgspec.structs.replace(profile.provenance, threads_per_rank=2)
    msgspec.structs.replace(profile, provenance=other).save(folder / "profile.json")
    unlike = run("search --model llama --contexts 256 --out other --profile profile.json", folder)
    assert "the profile is of other ranks: threads_per_rank: 1, 2 (now, then)" in one_error(unlike, 1)


def test_a_search_on_the_simulator_says_so_everywhere(simulated: Path) -> None:
    done = run(f"search {ON} --contexts 256,512 --out out", simulated)
    assert done.returncode == 0, done.stderr
    assert "on 3 simulate ranks" in done.stdout
    table = load(simulated / "out" / "table.json")
    assert table.provenance is not None
    assert table.provenance.backend == "simulate"
    with MeasurementLog(simulated / "out" / "measurements.jsonl") as log:
        assert {one.backend for one in log.provenance.values()} == {"simulate"}
    sizes = table.lookup(512, ranks=3).partition.sizes
    # The second rank is the fastest, and work per token grows.
    assert sizes[1] > sizes[2]
    assert sizes[0] > sizes[2]


def test_a_range_of_contexts_is_searched_as_far_as_needed(simulated: Path) -> None:
    done = run(f"search {ON} --contexts 128..512 --until 5% --out out", simulated)
    assert done.returncode == 0, done.stderr
    assert "128 to 512 tokens: searched 128, 256, 512 (3 contexts" in done.stdout
    assert "asked for: 5.00%" in done.stdout
    document = json.loads(
        run(f"search {ON} --contexts 128..512 --until 5% --out out --format json", simulated).stdout
    )
    assert document["covered"]["reached"]
    assert document["covered"]["contexts"] == [128, 256, 512]
    assert [one["context"] for one in document["contexts"]] == [128, 256, 512]
    more = f"search {ON} --contexts 128..512 --until 0.0001% --most-contexts 4 --held-out 300 --out out"
    document = json.loads(run(f"{more} --format json", simulated).stdout)
    assert not document["covered"]["reached"]
    assert [one["context"] for one in document["contexts"] if one["held_out"]] == [300]
    said = run(more, simulated).stdout
    assert "It ended there since 4 contexts were searched" in said
    assert run("train out --out my.json", simulated).returncode == 0


def test_a_context_that_is_searched_and_held_out_is_shown_as_both(simulated: Path) -> None:
    asked = f"search {ON} --contexts 128,256,512 --held-out 256 --out out --format json"
    found = json.loads(run(asked, simulated).stdout)["contexts"]
    methods = {(one["context"], one["held_out"]): [each["method"] for each in one["methods"]] for one in found}
    assert methods[256, False][-1] == "KVR-S"
    assert methods[256, True][-1] == "KVR-P"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "--contexts 1024..256",
            "a range of contexts is written as 4096..65536, the shorter one first; got '1024..256'",
        ),
        ("--contexts 256..", "got '256..'"),
        ("--contexts 256..512..1024", "got '256..512..1024'"),
        ("--contexts 256..1024 --until 0.5", "--until is a share in percent, like 0.5%; got '0.5'"),
        ("--contexts 256..1024 --until 0%", "--until is a share in percent, like 0.5%; got '0%'"),
        ("--contexts 256..1024 --most-contexts 2", "--most-contexts must be at least 3"),
        (
            "--contexts 256,1024 --until 1%",
            "--until and --most-contexts are for a range, like --contexts 4096..65536",
        ),
    ],
)
def test_ranges_that_make_no_sense_are_refused(asked: str, message: str, simulated: Path) -> None:
    badly_written = "got '" in message and "--until" not in message
    assert message in one_error(run(f"search {ON} {asked}", simulated), 2 if badly_written else 1)


def rugged(folder: Path, spread: float) -> Machine:
    """A folder with a model and a profile of three ranks on a GPU whose kernels like some sizes better."""
    model = write_folder(folder / "llama", "llama-gqa", num_hidden_layers=6, max_position_embeddings=32768)
    draw = random.Random(2)
    steps = tuple((size, math.exp(draw.gauss(0.0, spread))) for size in range(128, 8192, 128))
    links = (LinkCost.of(2e11, 1e-5),) * 2
    machine = Machine(ChunkCost(1e-3, 2e-5, 2e-9, 1.5e-9, 0.25, steps), 6, 512, link=links)
    origin = provenance(ranks=3, model=open_model(model).geometry, backend="sm")
    Profile.of(machine, 16384, origin).save(folder / "profile.json")
    return machine


def test_a_profile_says_which_sizes_kernels_like(tmp_path: Path) -> None:
    true = dict(rugged(tmp_path, 0.02).cost.size_effects)
    done = run(f"profile {ON} --context 12288 --out mine.json", tmp_path)
    assert done.returncode == 0, done.stderr
    profile = load_profile(tmp_path / "mine.json")
    found = dict(profile.cost.size_effects)
    assert {one.chunk for one in profile.chunk_samples if one.layers} == set(found)
    assert min(found) <= 12288 // 4 // 3
    assert max(found) >= 12288 // 3
    worst, best = (end(found, key=lambda size: found[size]) for end in (max, min))
    assert found[worst] / found[best] == pytest.approx(true[worst] / true[best], rel=0.1)
    (line,) = [one for one in done.stdout.splitlines() if one.startswith("Against a smooth cost")]
    assert f"{best} tokens {found[best] - 1:+.1%} to {worst} tokens {found[worst] - 1:+.1%}" in line
    assert run(f"compare {ON.replace('profile.json', 'mine.json')} --context 6144", tmp_path).returncode == 0


def test_a_search_where_kernels_like_some_sizes_tells_a_predictor_of_all(tmp_path: Path) -> None:
    machine = rugged(tmp_path, 0.05)
    done = run(f"search {ON} --contexts 6144,12288 --budget 4 --samples 1 --out out --quiet", tmp_path)
    assert done.returncode == 0, done.stderr
    with MeasurementLog(tmp_path / "out" / "measurements.jsonl") as log:
        timed = {line.chunk for line in log.chunks if line.layers}
    table = load(tmp_path / "out" / "table.json")
    assert isinstance(table, PartitionTable)
    found = {context: table.lookup(context, ranks=3).partition for context in (6144, 12288)}
    assert {size for one in found.values() for size in one.sizes} <= timed
    done = run("train out --method corrected --out my.json --dataset rows.json --quiet", tmp_path)
    assert done.returncode == 0, done.stderr
    for row in load_dataset(tmp_path / "rows.json").rows:
        assert {size for size, _ in row.prior.cost.size_effects} == timed
    predictor = load(tmp_path / "my.json")
    assert isinstance(predictor, PartitionPredictor)
    for context in (7680, 9216, 10752):
        predicted = predictor.predict(context).partition
        smooth = replace(machine, cost=replace(machine.cost, size_effects=()))
        balanced = best_split(context, 3, smooth, quantum=128)
        assert simulate(predicted, machine).ttft_s < simulate(balanced, machine).ttft_s


def test_compare_on_the_simulator(simulated: Path) -> None:
    done = run(f"compare {ON} --context 504 --format json", simulated)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["backend"] == "simulate"
    names = [one["method"] for one in found["methods"]]
    assert {"single", "TSP", "zigzag", "KVR-E"} <= set(names)
    assert "tensor parallel" not in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 2 --backend simulate --profile profile.json", "of ranks 3, not 2"),
        ("--ranks 3 --backend simulate", "with a profile"),
        ("--ranks 3 --backend simulate --profile llama/config.json", "not one of our JSON files"),
        ("--ranks 3 --backend simulate --profile nowhere.json", "does not exist"),
    ],
)
def test_a_profile_that_does_not_fit_is_told_in_one_line(simulated: Path, arguments: str, message: str) -> None:
    assert message in one_error(run(f"compare --model llama --context 96 {arguments}", simulated), 1)


def test_advice_says_what_is_worth_it_and_what_is_not(simulated: Path) -> None:
    done = run("advise --profile profile.json --contexts 64,4096 --format json", simulated)
    assert done.returncode == 0, done.stderr
    short, long = json.loads(done.stdout)
    assert (long["method"], long["ranks"]) in {("kvr-chain", 3), ("kvr-fanout", 3)}
    slow = run("advise --profile profile.json --contexts 4096 --bandwidth 100kB/s", simulated)
    assert slow.returncode == 0, slow.stderr
    assert "one rank alone (more ranks are not worth it" in slow.stdout
    assert {one["ranks"] for one in short["options"]} == {1, 2, 3}
    assert all(sum(one["sizes"]) == 64 for one in short["options"] if one["sizes"])


def test_advice_shows_what_a_table_has_measured(simulated: Path) -> None:
    run(f"search {ON} --contexts 256,512 --out out", simulated)
    done = run("advise --profile profile.json --contexts 512 --table out/table.json --format json", simulated)
    (found,) = json.loads(done.stdout)
    measured = [one for one in found["options"] if one["measured_ttft_s"] is not None]
    assert [(one["method"], one["ranks"]) for one in measured] == [("kvr-chain", 3)]
    assert measured[0]["measured_ttft_s"] == pytest.approx(measured[0]["predicted_ttft_s"], rel=0.01)


SERIALISED = """
import profiler.life, profiler.simulate, msgspec
from kvr_partition.measurement import RankTimes

class Serialised(profiler.simulate.Simulated):
    '''A rank passes nothing on before it has all that it receives: one message at a time, receives first.'''

    def _prefill(self, request):
        replies = super()._prefill(request)
        if not request.method.startswith("kvr"):
            return replies
        late, out = 0.0, []
        for rank, reply in enumerate(replies):
            times = reply.times
            if rank > 1:
                before = out[rank - 1]
                late = max(late, before.times.compute_s + before.times.wait_s)
            out.append(msgspec.structs.replace(
                reply,
                ended=reply.ended + late,
                times=RankTimes(times.compute_s, times.wait_s + late, times.transfer_s, times.first_wait_s + late),
            ))
        return [msgspec.structs.replace(one, ended=out[-1].ended) for one in out]

profiler.life.Simulated = Serialised
"""


def test_links_that_carry_one_message_at_a_time_are_told_and_end_a_search(simulated: Path) -> None:
    arguments = f"search {ON} --contexts 512 --budget 12 --out {{}} --format json"
    right = json.loads(run(arguments.format("right"), simulated).stdout)["contexts"][0]
    assert right["findings"] == []
    done = patched(SERIALISED, *arguments.format("serial").split(), cwd=simulated)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["contexts"][0]
    assert [(one["kind"], one["rank"]) for one in found["findings"]] == [("late", 2)]
    assert found["findings"][0]["text"].endswith("links carry one message at a time?")
    assert found["stopped"] == "enough"
    assert found["partitions_measured"] == 2
    assert "no more partitions are measured" in done.stderr
    assert (simulated / "serial" / "table.json").is_file()
    # The same command does not go on where there is nothing to be learnt, and says the same.
    again = patched(SERIALISED, *arguments.format("serial").split(), cwd=simulated)
    assert json.loads(again.stdout)["contexts"][0]["partitions_measured"] == 2


def test_compare_tells_the_same(simulated: Path) -> None:
    arguments = f"compare {ON} --context 512 --methods single,kvr-e,bound"
    assert "Noticed" not in run(arguments, simulated).stdout
    done = patched(SERIALISED, *arguments.split(), cwd=simulated)
    assert "Noticed" in done.stdout
    assert "rank 2 began" in done.stdout
    report = json.loads(patched(SERIALISED, *f"{arguments} --format json".split(), cwd=simulated).stdout)
    assert report[0]["findings"][0]["kind"] == "late"
