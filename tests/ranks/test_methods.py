"""Every method on real CPU ranks: timed, counted, verified, and refused where it cannot be right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvr_partition import Partition
from kvr_partition.errors import UnsupportedError
from kvr_partition.methods import METHODS
from profiler import Candidate, MeasurementLog, RankGroup, SamplingPlan
from tests.models import write_folder

ENTRY = 3 * 2 * 2 * 16 * 4  # bytes of KV a token keeps: layers × (keys, values) × heads × head size × float32
PLAN = SamplingPlan(1, 2, 2)
SPLIT = Partition((30, 18))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "llama", "llama-gqa", vocab_size=256)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasurementLog]:
    with MeasurementLog(tmp_path_factory.mktemp("log") / "measurements.jsonl") as log:
        yield log


@pytest.fixture(scope="module")
def group(folder: Path, log: MeasurementLog) -> Iterator[RankGroup]:
    with RankGroup(folder, ranks=2, backend="cpu", timeout_s=120, log=log) as group:
        yield group


def candidate(method: str, noise: int = 0) -> Candidate:
    if METHODS[method].alone:
        return Candidate(method, Partition((48,)))
    if METHODS[method].chunks == "any":
        return Candidate(method, SPLIT, noise)
    return Candidate("tsp" if method == "tsp" else method, Partition.even(48, 2), noise)


def test_all_methods_are_timed_side_by_side_and_their_bytes_counted(group: RankGroup) -> None:
    measured = dict(
        zip(METHODS, group.measure_many([candidate(method) for method in METHODS], plan=PLAN), strict=True)
    )
    assert all(one.ok for one in measured.values()), {name: one.failure for name, one in measured.items()}
    sent = {method: one.samples[0].kv_bytes for method, one in measured.items()}
    gathered = 48 * ENTRY
    assert sent == {
        "stock": 0,
        "single": 0,
        "tsp": gathered,
        "tsp-causal": gathered,
        "zigzag": gathered,
        "tp": 0,
        "kvr": 30 * ENTRY,
        "kvr-chain": 30 * ENTRY,
        "kvr-fanout": 30 * ENTRY,
        "bound": 0,
    }
    assert all(rank.wait_s < 0.01 for rank in measured["bound"].samples[0].ranks)


@pytest.mark.parametrize("method", [method.name for method in METHODS.values() if method.verifiable])
def test_every_method_equals_one_rank(group: RankGroup, method: str) -> None:
    certificate = group.verify(candidate(method))
    assert certificate.holds, certificate.divergence
    assert certificate.reference == "float64"
    layers = [one.layer for one in certificate.deviations]
    expected = {"kvr": [0, 1, 2, 0, 1, 2, None], "sin": [0, 1, 2, None]}.get(method[:3], [None] * len(layers))
    assert layers == expected
    assert None in layers
    assert 0 < max(one.split for one in certificate.deviations) < 1e-5


def test_links_are_held_and_disturbed_and_the_log_keeps_runs_apart(group: RankGroup, log: MeasurementLog) -> None:
    before = group.run
    group.hold_links(2e6)
    try:
        assert group.run != before
        assert "held to 0.002 GB/s" in group.provenance.link
        quiet, noisy = candidate("kvr"), candidate("kvr", noise=20_000)
        measured = group.measure_many([quiet, noisy, candidate("tsp", noise=20_000)], plan=PLAN, purpose="held")
        assert all(one.ok for one in measured)
        assert [one.noise for one in measured] == [0, 20_000, 20_000]
        # A message is on its way at least as long as the link allows.
        assert measured[0].samples[0].ranks[0].transfer_s >= 30 * ENTRY / 2e6
        assert measured[1].samples[0].ranks[1].wait_s >= 20_000 / 2e6
        assert measured[1].samples[0].kv_bytes == 30 * ENTRY
        assert group.verify(noisy).holds
        with pytest.raises(UnsupportedError, match="cannot be held"):
            group.check(candidate("tp"))
    finally:
        group.hold_links(None)
    assert group.run in log.provenance
    assert len(log.provenance) >= 3
    reread = MeasurementLog(log.path)
    assert reread.finished("held", "kvr", SPLIT, 20_000) == measured[1]
    assert reread.finished("held", "kvr", SPLIT) == measured[0]
    reread.close()
    with pytest.raises(UnsupportedError, match="more than 0"):
        group.hold_links(0.0)


def test_a_prompt_behind_cached_tokens_is_timed_verified_and_kept_apart(
    group: RankGroup, log: MeasurementLog
) -> None:
    behind = Partition((30, 18), past=21)
    candidates = [Candidate.single(48, 21), Candidate("kvr", behind), Candidate("kvr", SPLIT)]
    measured = group.measure_many([*candidates, Candidate("bound", behind)], plan=PLAN, purpose="past")
    assert all(one.ok for one in measured), [one.failure for one in measured]
    assert [one.partition for one in measured[1:3]] == [behind, SPLIT]
    # What every rank has already is not sent.
    assert measured[1].samples[0].kv_bytes == measured[2].samples[0].kv_bytes == 30 * ENTRY
    reread = MeasurementLog(log.path)
    assert reread.finished("past", "kvr", behind) == measured[1]
    assert reread.finished("past", "kvr", SPLIT) == measured[2]
    reread.close()
    certificate = group.verify(Candidate("kvr-fanout", behind))
    assert certificate.holds, certificate.divergence
    assert certificate.past == 21
    with pytest.raises(UnsupportedError, match="without past tokens only"):
        group.check(Candidate.even("zigzag", 48, 2, past=21))


def test_planning_ahead_has_nothing_to_do_on_the_cpu(group: RankGroup) -> None:
    built, seconds = group.plan_ahead(64)
    assert built == 0
    assert seconds >= 0


def test_half_precision_is_certified_against_single_precision(folder: Path) -> None:
    with RankGroup(folder, ranks=3, backend="cpu", dtype="bfloat16", topology="fanout", timeout_s=120) as group:
        certificate = group.verify(Candidate("kvr", Partition((30, 1, 17))))
        assert certificate.reference == "float32"
        assert certificate.holds, certificate.divergence
        assert max(one.single for one in certificate.deviations) > 1e-4
        sample = group.sample(Candidate("kvr", Partition((30, 1, 17))))
        assert sample.kv_bytes == (30 * 2 + 1) * ENTRY // 2


@pytest.mark.parametrize(
    ("model", "method", "reason"),
    [
        ("llama-mha", "tp", "4 heads with 4 KV heads cannot be dealt to 3 ranks"),
        ("mistral-window", "zigzag", "sliding window"),
        ("falcon-alibi", "tsp-causal", "needs the model's attention replaced"),
        ("falcon-mqa", "tp", "no tensor-parallel plan for falcon"),
        ("llama-gqa", "magic", "unknown method 'magic'"),
    ],
)
def test_what_cannot_be_right_is_refused_before_any_rank_starts(
    tmp_path: Path, model: str, method: str, reason: str
) -> None:
    group = RankGroup(write_folder(tmp_path / model, model), ranks=3, backend="cpu")
    with pytest.raises(UnsupportedError, match=reason):
        group.check(Candidate.even(method, 48, 3))
    assert group.pids == []
