"""What ranks of one GPU answer, and in which order they do things; the device's part is played by the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from kvr_partition import Partition
from kvr_partition.runtime.chunk import chunk_cache, run_chunk
from kvr_partition.runtime.links.plan import LinkLimits, NoLinks
from profiler import messages
from profiler.rank import Rank
from profiler.sm.recordings import Work
from profiler.sm.replay import ReplayTimes
from profiler.sm.worker import SMWorker
from tests.models import write_folder

RANKS = 3
SPLIT = Partition((20, 12, 8))


@dataclass
class Played:
    """A rank of a recording: what it computes, without a graph of it."""

    result: Any
    links: None = None
    gather: None = None


@dataclass
class Recorded:
    method: str
    partition: Partition
    ranks: list[Played]
    host_token: torch.Tensor


@dataclass
class Device:
    """Recordings and their replays: computed at once, each chunk behind the KV that one rank has of its prefix."""

    rank: Rank
    events: list[Any] = field(default_factory=list)
    full: bool = False

    def of(self, work: Work) -> Recorded:
        self.events.append(work)
        partition, ids = work.partition, self.rank.tokens(work.partition.context, seed=1)
        played = []
        for rank, (start, end) in enumerate(zip(partition.starts, partition.ends, strict=True)):
            cache = chunk_cache(self.rank.model, ids[:, start:end], prefix=start)
            known = self.rank.past_cache(ids[:, :start]) if start else None
            for index, layer in cache.kv_layers if known is not None else ():
                layer.store.write(0, known.layers[index].keys, known.layers[index].values)
            ranks = partition.ranks if work.timed is None else rank + 1
            result = run_chunk(self.rank.model, ids[:, start:end], cache, rank=rank, ranks=ranks, links=NoLinks())
            played.append(Played(result))
        return Recorded(work.method, partition, played, torch.zeros((1, 1), dtype=torch.long))

    def forget_rows(self) -> None:
        self.events.append("forget rows")

    def fill_rows(self) -> None:
        self.events.append("fill rows")

    def fill_past(self, recording: Recorded, token_seed: int) -> None:
        self.events.append("fill past")

    def run(self, recording: Recorded, limits: LinkLimits) -> ReplayTimes:
        self.events.append(f"replay {recording.method}")
        if self.full:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        token = recording.ranks[-1].result.first_token
        if token is not None:
            recording.host_token.copy_(token)
        return ReplayTimes(1.0, 1.2, 2.0, [1.5] * len(recording.ranks))


def worker(folder: Path, topology: str = "chain") -> tuple[SMWorker, Device]:
    setup = messages.Setup(
        model=str(folder),
        rank=0,
        ranks=RANKS,
        device="cpu",
        dtype="float32",
        depth="auto",
        layers="auto",
        seed=0,
        batch=1,
        threads=1,
        rendezvous="",
        timeout_s=60,
        backend="sm",
        topology=topology,
    )
    rank = Rank(setup, torch.device("cpu"))
    device = Device(rank)
    return SMWorker(setup, rank, device, device), device  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "llama", "llama-gqa")


def asked(worker: SMWorker, request: messages.Request) -> Any:
    return worker.serve(request, lambda _: None)


def prefill(method: str, split: Partition = SPLIT) -> messages.Prefill:
    return messages.Prefill(method, split.sizes, token_seed=1)


@pytest.mark.parametrize("topology", ["chain", "fanout"])
def test_a_prefill_is_replayed_and_each_rank_answers(folder: Path, topology: str) -> None:
    ranks, device = worker(folder, topology)
    single = asked(ranks, prefill("single", Partition((SPLIT.context,)))).replies
    device.events.clear()
    replies = asked(ranks, prefill("kvr")).replies
    assert device.events == [Work(f"kvr-{topology}", SPLIT), "fill past", f"replay kvr-{topology}"]
    assert [reply.first_token for reply in replies] == [None, None, single[-1].first_token]
    assert [reply.ended for reply in replies] == [1.5, 1.5, 2.0]
    assert single[-1].first_token is not None
    assert [reply.first_token for reply in single[:-1]] == [None, None]


def test_the_bound_is_replayed_in_rows_that_a_real_prefill_has_filled(folder: Path) -> None:
    ranks, device = worker(folder)
    asked(ranks, prefill("bound"))
    replays = [event for event in device.events if isinstance(event, str) and event.startswith("replay")]
    assert replays == ["replay kvr-chain", "replay bound"]


def test_what_an_earlier_replay_left_verifies_nothing(folder: Path) -> None:
    ranks, device = worker(folder)
    found = asked(ranks, messages.Verify("kvr-chain", SPLIT.sizes, token_seed=1)).replies
    assert [event for event in device.events if isinstance(event, str)] == [
        "forget rows",
        "fill past",
        "replay kvr-chain",
        "fill rows",
    ]
    assert [one.same_token for one in found] == [None, None, True]
    assert all(one.deviations for one in found)
    assert max(deviation.split for one in found for deviation in one.deviations) < 1e-5


def test_one_rank_alone_is_compared_too(folder: Path) -> None:
    ranks, device = worker(folder)
    found = asked(ranks, messages.Verify("single", (SPLIT.context,), token_seed=1)).replies
    assert device.events == []
    assert [bool(one.deviations) for one in found] == [False, False, True]
    assert found[-1].same_token is True


def test_after_running_out_of_memory_the_next_request_is_served(folder: Path) -> None:
    ranks, device = worker(folder)
    device.full = True
    failed = asked(ranks, prefill("kvr"))
    assert isinstance(failed, messages.Failed)
    assert (failed.kind, failed.phase) == ("out-of-memory", "prefill")
    device.full = False
    assert asked(ranks, prefill("kvr")).replies[-1].first_token is not None
    assert asked(ranks, messages.Renew()) == messages.Renewed()


def test_a_chunk_is_timed_on_all_ranks_or_on_the_first_alone(folder: Path) -> None:
    ranks, device = worker(folder)
    request = messages.TimeChunk(16, 0)
    assert len(asked(ranks, request).replies) == RANKS
    assert len(asked(ranks, messages.TimeChunk(16, 0, alone=True)).replies) == 1
    # It is the same work, recorded once.
    assert device.events[0] == device.events[2] == Work.of_chunk(request, RANKS)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (prefill("tp"), "ranks of one process cannot run tp"),
        (prefill("ring"), "unknown method 'ring'"),
        (messages.Generate((1, 2), (1, 1), 1), "no answer to Generate"),
    ],
    ids=["tp", "unknown", "generate"],
)
def test_what_they_cannot_do_is_an_answer_too(folder: Path, request_: messages.Request, said: str) -> None:
    ranks, device = worker(folder)
    failed = asked(ranks, request_)
    assert isinstance(failed, messages.Failed)
    assert said in failed.message
    assert device.events == []


def test_they_start_as_many_as_there_are(folder: Path) -> None:
    ranks, _ = worker(folder)
    ready = ranks.ready()
    assert isinstance(ready, messages.Many)
    assert len(ready.replies) == RANKS
    assert ranks.doing.what == "in its wait for a request"
