"""How far the schedule is from real gloo ranks, and what the order and the latency of messages have to do with it.

    python -m benchmarks.schedule_error --out data/epyc-2-cores/schedule-error.json

Three parts:

    error    chains of 3 to 5 ranks whose computing is a sleep, over real links that are held to a bandwidth: TTFT
             against the schedule's, for random chunks, speeds and bandwidths and for one split with a small first
             and a large last chunk
    latency  whether a link is busy for a message's latency: what small messages take when each waits for an
             answer, and when they follow each other
    order    the schedule with the order that links keep (own chunk first, then nearest first), and with two that a
             link might have kept instead: "arrival", what is there first, and "urgent", of what is there the one
             that the next rank needs soonest. Simulated, for random chains, and for the best split of each
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarks.agreement import conditions
from kvr_partition.machine.cost import ChunkCost
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.partition import Partition
from tests.ranks.asleep import Case, Seen, shares
from tests.ranks.launch import launch

Order = Literal["plan", "arrival", "urgent"]

COST = ChunkCost(0.05, 1e-3, 1e-6, 1e-6, kv_share=0.25)
LAYERS = 12


def main() -> None:
    """Measure, print and write."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--cases", type=int, default=8, help="random ones for each number of ranks")
    parser.add_argument("--repeats", type=int, default=3, help="prefills of each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    options = parser.parse_args()
    errors = []
    for ranks in (3, 4, 5):
        errors += error_of([*drawn_cases(ranks, options.cases), *issue_cases(ranks)], ranks, options.repeats)
    worst = max(errors, key=lambda one: abs(one["error"]))
    middle = statistics.median(abs(error["error"]) for error in errors)
    print(f"error: median {middle:.1%}, at most {worst['error']:+.1%} with {worst['sizes']}")
    latency = latency_of_links()
    print(
        f"latency: {latency['there_and_back_us'] / 2:.0f} us one way, "
        f"{latency['in_a_row_us']:.0f} us for each of many in a row"
    )
    orders = [other_order(order, best) for order in ("arrival", "urgent") for best in (False, True)]
    for found in orders:
        print(
            f"{found['order']} order, {found['splits']} splits: {found['differ']} of {found['cases']} chains take "
            f"other times, {found['least']:.3f} to {found['most']:.3f} of the plan's, mean {found['mean']:.4f}"
        )
    if options.out:
        document = {
            **conditions("python -m benchmarks.schedule_error", "cpu"),
            "error": {"median": middle, "worst": worst["error"], "prefills": errors},
            "latency": latency,
            "order": orders,
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n")


def drawn_cases(ranks: int, count: int) -> list[Case]:
    """Random chunks, speeds and bandwidths: from links that never matter to links that everything waits for."""
    draw = random.Random(ranks)
    return [
        Case(
            sizes=tuple(draw.choice((64, 128, 256, 512)) for _ in range(ranks)),
            cost=COST,
            layers=LAYERS,
            entry_bytes=1024,
            bandwidth=draw.choice((4e6, 10e6, 40e6)),
            speeds=tuple(draw.choice((0.7, 1.0, 1.4)) for _ in range(ranks)),
        )
        for _ in range(count)
    ]


def issue_cases(ranks: int) -> list[Case]:
    """A small first and a large last chunk, on links about as fast as the ranks."""
    sizes = {3: (64, 128, 512), 4: (64, 128, 512, 512), 5: (64, 128, 128, 512, 512)}[ranks]
    return [Case(sizes, COST, LAYERS, 1024, bandwidth) for bandwidth in (4e6, 10e6)]


def error_of(cases: Sequence[Case], ranks: int, repeats: int) -> list[dict[str, Any]]:
    """Real ranks beside the schedule: of each case the median TTFT."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases.json").write_bytes(msgspec.json.encode([*cases] * repeats))
        launch("tests.ranks.asleep", folder, ranks, timeout_s=600)
        last = msgspec.json.decode((folder / f"seen{ranks - 1}.json").read_bytes(), type=list[Seen])
    found = []
    for at, case in enumerate(cases):
        measured = statistics.median(seen.end_s for seen in last[at :: len(cases)])
        expected = simulate(Partition(case.sizes), case.machine()).ttft_s
        found.append(
            {
                "sizes": case.sizes,
                "speeds": case.speeds,
                "bandwidth": case.bandwidth,
                "measured_s": measured,
                "schedule_s": expected,
                "error": expected / measured - 1,
            }
        )
        print(f"{case.sizes} at {case.bandwidth:g} B/s: {measured:.3f} s, schedule {expected:.3f} s")
    return found


def latency_of_links() -> dict[str, float]:
    """Small messages between two ranks, one at a time and in a row, in microseconds each."""
    import multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        answers: Any = context.SimpleQueue()
        processes = [context.Process(target=_small_messages, args=(rank, folder, answers)) for rank in range(2)]
        for process in processes:
            process.start()
        there_and_back, in_a_row = answers.get()
        for process in processes:
            process.join()
    return {"there_and_back_us": there_and_back * 1e6, "in_a_row_us": in_a_row * 1e6}


def _small_messages(rank: int, folder: str, answers: Any) -> None:
    import os

    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    row, count = torch.zeros(256, dtype=torch.uint8), 500
    singles, rows = [], []
    for _ in range(7):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(count):
            if rank == 0:
                dist.send(row, 1)
                dist.recv(row, 1)
            else:
                dist.recv(row, 0)
                dist.send(row, 0)
        singles.append((time.perf_counter() - began) / count)
        dist.barrier()
        if rank == 1:
            # All are expected before the first is sent, as in a prefill.
            posted = [dist.irecv(torch.empty_like(row), 0, tag=number) for number in range(count)]
        dist.barrier()
        began = time.perf_counter()
        if rank == 0:
            for number in range(count):
                dist.isend(row, 1, tag=number).wait()
            dist.recv(row, 1)
        else:
            for work in posted:
                work.wait()
            dist.send(row, 0)
        rows.append((time.perf_counter() - began) / count)
    if rank == 0:
        answers.put((statistics.median(singles), statistics.median(rows)))
    dist.barrier()
    dist.destroy_process_group()


def other_order(order: Order, best: bool, count: int = 737) -> dict[str, Any]:
    """Random chains of 3 to 6 ranks with another order on their links, relative to the plan's.

    Args:
        order: of messages.
        best: whether chunks are those that the schedule finds best, rather than random.
        count: of chains.
    """
    draw = random.Random(0)
    ratios = []
    for _ in range(count):
        ranks = draw.randint(3, 6)
        case = Case(
            sizes=tuple(draw.randint(1, 512) for _ in range(ranks)),
            cost=ChunkCost(0.0, draw.uniform(1e-5, 1e-3), 0.0, draw.choice((0, 1e-6)), kv_share=draw.random()),
            layers=8,
            entry_bytes=1024,
            bandwidth=10 ** draw.uniform(5.5, 9),
            speeds=tuple(draw.uniform(0.5, 2) for _ in range(ranks)),
        )
        if best:
            split = best_split(sum(case.sizes), ranks, case.machine())
            case = msgspec.structs.replace(case, sizes=split.sizes)
        plan = played(case, "plan")
        scheduled = simulate(Partition(case.sizes), case.machine()).ttft_s
        assert abs(plan / scheduled - 1) < 1e-9, (plan, scheduled)
        ratios.append(played(case, order) / plan)
    return {
        "order": order,
        "splits": "best" if best else "random",
        "cases": count,
        "differ": sum(abs(ratio - 1) > 1e-9 for ratio in ratios),
        "least": min(ratios),
        "mean": statistics.mean(ratios),
        "most": max(ratios),
    }


def played(case: Case, order: Order) -> float:
    """TTFT of a chain, event by event."""
    ranks, layers = len(case.sizes), case.layers
    each = [shares(case, rank) for rank in range(ranks)]
    events: list[tuple[float, int, Any]] = []
    tie = itertools.count()
    # Of each link: when it is free, what is there to be sent, and the next of the plan.
    busy = [False] * ranks
    waiting: list[list[tuple[Any, int, int]]] = [[] for _ in range(ranks)]
    plans = [
        iter([(layer, chunk) for layer in range(layers) for chunk in range(rank, -1, -1)]) for rank in range(ranks)
    ]
    following = [next(plan) for plan in plans]
    here: list[list[int]] = [[0] * layers for _ in range(ranks)]
    at, free_at = [0] * ranks, [0.0] * ranks
    paused = [False] * ranks
    end = 0.0

    def happens(moment: float, *what: Any) -> None:
        heapq.heappush(events, (moment, next(tie), what))

    def ready(moment: float, rank: int, layer: int, chunk: int) -> None:
        if rank + 1 < ranks:
            key = next(tie) if order == "arrival" else (layer, -chunk)
            heapq.heappush(waiting[rank], (key, layer, chunk))
            send(moment, rank)

    def send(moment: float, rank: int) -> None:
        if busy[rank] or not waiting[rank]:
            return
        if order == "plan":
            if waiting[rank][0][1:] != following[rank]:
                return
            following[rank] = next(plans[rank], (-1, -1))
        _, layer, chunk = heapq.heappop(waiting[rank])
        busy[rank] = True
        happens(moment + case.sizes[chunk] * case.entry_bytes / case.bandwidth, "sent", rank, layer, chunk)

    def resume(moment: float, rank: int) -> None:
        layer = at[rank]
        if paused[rank] and here[rank][layer] == rank:
            paused[rank] = False
            happens(max(moment, free_at[rank]) + each[rank][2], "layer", rank, layer)

    for rank in range(ranks):
        happens(each[rank][0], "kv", rank, 0)
    while events:
        moment, _, (what, rank, *more) = heapq.heappop(events)
        if what == "kv":
            ready(moment, rank, more[0], rank)
            free_at[rank], paused[rank] = moment + each[rank][1], True
            resume(moment, rank)
        elif what == "sent":
            layer, chunk = more
            busy[rank] = False
            here[rank + 1][layer] += 1
            ready(moment, rank + 1, layer, chunk)
            resume(moment, rank + 1)
            send(moment, rank)
        else:
            at[rank] += 1
            if at[rank] < layers:
                happens(moment + each[rank][0], "kv", rank, at[rank])
            elif rank == ranks - 1:
                end = moment
    return end


if __name__ == "__main__":
    main()
