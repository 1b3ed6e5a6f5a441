"""Never a wrong token: ranks that fail, disagree, die, stop or come late are told apart, and told to all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT, ranks_environment
from tests.ranks.playing import Seen, all_told, play, right

TOGETHER = {
    2: ["failed_prefill", "failed_before_its_links", "another_order", "refusals", "own_messages", "not_finite"],
    3: [
        *("failed_prefill", "another_order", "two_threads", "disagreements", "refusals", "other_methods"),
        *("without_agreement", "subgroup", "own_messages", "another_past", "threads_of_one_model", "fuzz"),
        *("early", "mixed_lengths"),
    ],
}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda ranks: f"{ranks} ranks")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """All scenarios that one world can play one after the other: it is fit again after each."""
    found: dict[str, Seen] = play(tmp_path_factory.mktemp("world"), request.param, TOGETHER[request.param])
    return found


def of(seen: dict[str, Seen], name: str) -> Seen:
    """What ranks saw of a scenario, if these many play it."""
    if name not in seen:
        pytest.skip("another number of ranks plays this")
    return seen[name]


def test_a_rank_has_the_first_layer_s_kv_before_those_before_it_are_through(seen: dict[str, Seen]) -> None:
    for topology in ("chain", "fanout"):
        right(of(seen, "early"), topology)


def test_rows_are_a_prompt_s_own_for_as_long_as_it_is_decoded(seen: dict[str, Seen]) -> None:
    assert all(one["wrong"] == [] for one in of(seen, "mixed_lengths"))


@pytest.mark.parametrize("scenario", ["failed_prefill", "failed_before_its_links"])
def test_no_prompt_is_answered_with_kv_of_one_that_failed(seen: dict[str, Seen], scenario: str) -> None:
    ranks = of(seen, scenario)
    # The rank at fault has its own error, the ranks that wait for it are told, and those before it next time.
    assert ranks[1]["first"]["error"] == "OutOfMemoryError"
    where = "layer 0" if scenario == "failed_prefill" else "before the first layer"
    for one in ranks[2:]:
        assert (one["first"]["kind"], one["first"]["rank"]) == ("out-of-memory", 1)
        assert where in one["first"]["phase"]
    after = [one["after"] if isinstance(one["after"], list) else [one["after"]] for one in ranks]
    for at in range(len(after[0])):
        told = [one[at] for one in after]
        all_told(told, "out-of-memory", "unusable", "rank 1 ran out of memory in", where, "renew")
        assert {one["rank"] for one in told} == {1}
    right(ranks, "renewed")


def test_prompts_read_in_another_order_are_answered_by_nobody(seen: dict[str, Seen]) -> None:
    ranks = of(seen, "another_order")
    for at in range(2):
        all_told(
            [one["both"][at] for one in ranks], "disagreement", "the prompt of prefill", f"rank {len(ranks) - 1}"
        )
    right(ranks)


def test_a_second_thread_in_the_same_group_is_refused(seen: dict[str, Seen]) -> None:
    ranks = of(seen, "two_threads")
    assert [one["wrong"] for one in ranks] == [[]] * len(ranks)
    assert all("busy" in one["kinds"] for one in ranks)
    right(ranks)


ITEMS = {
    "sizes": ("the partition", "14/5/13", "15/5/12"),
    "prompt": ("the prompt of",),
    "one token": ("the prompt of",),
    "padding": ("the prompt of",),
    "batch": ("the batch", "have 1", "has 2"),
    "context": ("the length of the prompt", "have 32", "has 31"),
    "topology": ("the topology", "auto", "fanout"),
    "limits": ("the limits of links", "what they can", "1e+09 bytes/s"),
    "weights": ("the weights",),
    "one weight": ("the weights",),
    "signs": ("the weights",),
    "dtype": ("the dtype", "float32", "bfloat16"),
    "KV heads": ("the model's configuration",),
    "layers": ("the model's configuration",),
    "window": ("the model's configuration",),
    "past": ("the past tokens", "have 0", "has 4"),
}


@pytest.mark.parametrize("item", ITEMS)
def test_ranks_that_disagree_all_say_about_what_and_who_it_is(seen: dict[str, Seen], item: str) -> None:
    ranks = of(seen, "disagreements")
    told = [one["seen"][item] for one in ranks]
    all_told(told, "disagreement", "ranks disagree about", *ITEMS[item], "rank 2")
    assert {one["rank"] for one in told} == {2}
    assert all(one["phase"].startswith("agreement of prefill") for one in told)
    # Nothing was sent, so the next prefill is fine.
    assert ranks[-1]["seen"][f"after {item}"] == {"token": ranks[-1]["right"]}


def test_what_one_rank_refuses_none_runs_and_what_all_refuse_is_an_ordinary_error(seen: dict[str, Seen]) -> None:
    ranks = of(seen, "refusals")
    all_told([one["one"] for one in ranks], "disagreement", "rank 1 refused", "outside the searched range")
    assert {one["one"]["rank"] for one in ranks} == {1}
    assert {one["all"]["error"] for one in ranks} == {"OutOfRangeError"}
    assert {one["list"]["error"] for one in ranks} == {"PartitionError"}
    assert "must be a Partition, a table or a predictor; got list" in ranks[0]["list"]["message"]
    right(ranks)


def test_baselines_agree_in_the_same_way(seen: dict[str, Seen]) -> None:
    ranks = of(seen, "other_methods")
    for method in ("tsp", "zigzag"):
        all_told([one["seen"][method] for one in ranks], "disagreement", "rank 1", "the prompt of")
        tokens = [one["seen"][f"{method} again"]["token"] for one in ranks]
        assert tokens[0 if method == "zigzag" else -1] == ranks[-1]["right"]
    all_told([one["seen"]["two methods"] for one in ranks], "disagreement", "the method", "rank 0")
    right(ranks)


def test_agreement_can_be_switched_off_by_name(seen: dict[str, Seen]) -> None:
    right(of(seen, "without_agreement"), "first")


def test_messages_of_the_program_itself_are_not_taken_for_kv(seen: dict[str, Seen]) -> None:
    ranks = of(seen, "own_messages")
    assert ranks[1]["first"]["arrived"]
    assert ranks[-1]["first"]["token"] == ranks[-1]["right"]


def test_some_ranks_of_a_world_agree_among_themselves(seen: dict[str, Seen]) -> None:
    ranks = of(seen, "subgroup")[1:]
    right(ranks, "first")
    all_told([one["odd"] for one in ranks], "disagreement", "the prompt of")


def test_logits_that_are_not_finite_are_an_error_that_says_where_they_arose(seen: dict[str, Seen]) -> None:
    ranks = of(seen, "not_finite")
    for method in ("first", "tsp", "single"):
        error = ranks[-1][method]
        assert error["error"] == "NotFiniteError"
        assert "layer 1" in error["message"]
        assert error["rank"] == 0
    right(ranks)


def test_random_sequences_of_good_failing_and_disagreeing_prefills_give_no_wrong_token(
    seen: dict[str, Seen],
) -> None:
    ranks = of(seen, "fuzz")
    assert [one["wrong"] for one in ranks] == [0] * len(ranks)
    assert ranks[-1]["right"] > 50
    assert all(one["raised"] > 50 for one in ranks)


def test_pasts_of_other_tokens_are_told_apart_and_rounding_is_not(seen: dict[str, Seen]) -> None:
    ranks = of(seen, "another_past")
    all_told([one["first"] for one in ranks], "disagreement", "what the past holds", "rank 2")
    assert ranks[-1]["same"]["token"] is not None
    right(ranks)


def test_threads_with_a_group_each_do_not_share_a_model(seen: dict[str, Seen]) -> None:
    ranks = of(seen, "threads_of_one_model")
    assert [one["wrong"] for one in ranks] == [[]] * len(ranks)
    right(ranks)


def test_a_failure_in_the_first_prefill_of_all_holds_nobody_up(tmp_path: Path) -> None:
    ranks = play(tmp_path, 3, ["first_of_all"])["first_of_all"]
    assert ranks[1]["first"]["error"] == "OutOfMemoryError"
    assert (ranks[2]["first"]["kind"], ranks[2]["first"]["rank"]) == ("out-of-memory", 1)
    assert all(one["seconds"] < 30 for one in ranks)
    right(ranks, "renewed")


def test_a_renewal_that_one_rank_gave_up_on_is_made_up_for(tmp_path: Path) -> None:
    ranks = play(tmp_path, 3, ["late_renewal"], timeout_s=4)["late_renewal"]
    assert [one["given_up"] and one["given_up"]["kind"] for one in ranks] == ["timeout", "timeout", None]
    assert all("error" not in one["again"] for one in ranks)
    assert ranks[-1]["first"]["token"] is not None
    right(ranks)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 3])
def test_two_thousand_of_them_do_not_either(tmp_path: Path, ranks: int) -> None:
    found = play(tmp_path, ranks, ["long_fuzz"])["long_fuzz"]
    assert [one["wrong"] for one in found] == [0] * ranks
    assert found[-1]["right"] > 300


def test_a_rank_that_is_killed_is_named_by_all_others(tmp_path: Path) -> None:
    ranks = play(tmp_path, 3, ["killed"], missing=1)["killed"]
    # The last rank waits for it in the middle of a prefill; the first one finds out when it next agrees.
    assert (ranks[2]["first"]["kind"], ranks[2]["first"]["rank"]) == ("lost", 1)
    # Either it notices itself, or the first rank, which has done its part, tells it.
    assert re.fullmatch("layer [01] of prefill 1|agreement of prefill 2", ranks[2]["first"]["phase"])
    for one in (ranks[0], ranks[2]):
        assert (one["after"]["kind"], one["after"]["rank"]) == ("lost", 1)
        assert (one["renewed"]["kind"], one["renewed"]["rank"]) == ("lost", 1)
        assert "its process ended" in one["after"]["message"]
        assert one["seconds"] < 30


def test_a_rank_that_is_stopped_is_named_also_by_those_that_wait_for_a_third(tmp_path: Path) -> None:
    ranks = play(tmp_path, 3, ["stopped"], timeout_s=4, missing=0)["stopped"]
    for one in ranks[1:]:
        assert (one["first"]["kind"], one["first"]["rank"]) == ("timeout", 0)
        assert re.fullmatch("layer [01] of prefill 2", one["first"]["phase"])
        assert "stopped or hangs" in one["first"]["message"]


def test_a_rank_that_comes_too_late_is_named_and_told(tmp_path: Path) -> None:
    ranks = play(tmp_path, 3, ["late"], timeout_s=4)["late"]
    for one in (ranks[0], ranks[2]):
        assert (one["first"]["kind"], one["first"]["rank"]) == ("timeout", 1)
        assert one["first"]["phase"] == "agreement of prefill 2"
        assert "between two prefills" in one["first"]["message"]
    assert ranks[1]["first"]["error"] == "RankError"
    assert "unusable" in ranks[1]["first"]["message"]


# ------------------------------------------------------------------ rank groups inside torchrun

DRIVER = """
import json, os, signal, sys, time
import torch
from kvr_partition import Partition, RankError
from profiler import Candidate, RankGroup
import profiler.runners

what, rank = sys.argv[2], int(os.environ["RANK"])
with open(f"{os.path.dirname(__file__)}/pid{rank}", "w") as file:
    file.write(str(os.getpid()))
real = profiler.runners.prefill
calls = [0]

def prefill(*args, **options):
    calls[0] += 1
    if calls[0] == 2 and rank == 1:
        if what == "fails":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        os.kill(os.getpid(), signal.SIGKILL if what == "killed" else signal.SIGSTOP)
    return real(*args, **options)

profiler.runners.prefill = prefill
told = []
with RankGroup(sys.argv[1], ranks=3, backend="cpu", timeout_s=6 if what == "stopped" else 60) as group:
    for _ in range(4):
        try:
            group.sample(Candidate("kvr", Partition((20, 15, 12))))
            told.append("fine")
        except RankError as error:
            told.append([error.kind, error.rank, error.phase, str(error)])
        if what == "driver raises":
            raise ValueError("of the program's own")
    print("TOLD", json.dumps(told), flush=True)
"""


def under_torchrun(tmp_path: Path, what: str) -> subprocess.CompletedProcess[str]:
    from tests.models import write_folder

    script = tmp_path / "script.py"
    script.write_text(DRIVER)
    folder = write_folder(tmp_path / "llama", "llama-gqa")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    process = subprocess.Popen(
        [*command, str(script), str(folder), what],
        cwd=ROOT,
        env=ranks_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 120
        printed = ""
        assert process.stdout is not None
        # Torchrun waits for a rank that is stopped; the driver has told by then.
        while time.monotonic() < until and (line := process.stdout.readline()):
            printed += line
            if line.startswith("TOLD") and what == "stopped":
                process.kill()
                for pid in tmp_path.glob("pid*"):
                    os.kill(int(pid.read_text()), signal.SIGKILL)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, printed + rest, errors)


def told(done: subprocess.CompletedProcess[str]) -> list[Any]:
    line = next((line for line in done.stdout.splitlines() if line.startswith("TOLD")), None)
    assert line is not None, done.stderr[-3000:]
    found: list[Any] = json.loads(line.removeprefix("TOLD "))
    return found


def test_a_follower_that_fails_is_told_by_kind_and_the_group_goes_on(tmp_path: Path) -> None:
    first, second, *others = told(under_torchrun(tmp_path, "fails"))
    assert first == "fine"
    assert second[:2] == ["out-of-memory", 1]
    assert "rank 1 ran out of memory" in second[3]
    assert others == ["fine", "fine"]


@pytest.mark.parametrize(("what", "kind"), [("killed", "lost"), ("stopped", "timeout")])
def test_a_follower_that_is_gone_is_named_at_once_and_from_then_on(tmp_path: Path, what: str, kind: str) -> None:
    first, second, *others = told(under_torchrun(tmp_path, what))
    assert first == "fine"
    assert second[:2] == [kind, 1]
    assert second[2]
    assert all(one[:2] == [kind, 1] and "start it anew" in one[3] for one in others)


def test_followers_end_with_a_driver_that_raises(tmp_path: Path) -> None:
    done = under_torchrun(tmp_path, "driver raises")
    assert done.returncode != 0
    assert "ValueError: of the program's own" in done.stderr
    assert "DistStoreError" not in done.stderr
    assert "RuntimeError" not in done.stderr
