"""Prefill figures: one rank, cold contexts, and every method at several rank counts, interleaved.

Each part is one run whose samples go to ``<out>/<part>.jsonl`` and whose figures go to ``<out>/<part>.json``.
Parts that finished are skipped when the same command runs again.

    python benchmarks/prefill.py --model llama-7b --backend sm --dtype float16 --out data/h100-sxm/llama-7b
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from kvr_partition.cli.comparison import Comparison, together
from kvr_partition.cli.options import model_folder, parse_bytes, parse_rate
from kvr_partition.cli.show import print_table
from kvr_partition.errors import KVRError
from kvr_partition.machine.cost import LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import median
from kvr_partition.methods import BASELINES, method_of
from kvr_partition.partition import Partition
from kvr_partition.runtime.kernels.plans import SHORTEST_PIECE
from kvr_partition.search import SearchResult
from kvr_partition.search.beliefs import Beliefs
from profiler import Candidate, MeasurementLog, RankGroup, SamplingPlan, Session
from profiler.listener import Silent

FEW = SamplingPlan(warmup=1, least=3, most=3)
"""For guesses and searches; what is compared is sampled again."""


class Printed(Silent):
    """Partitions and what they took, on the terminal."""

    def say(self, line: str) -> None:
        """Print it."""
        print(line, flush=True)


def searched(
    group: RankGroup, log: MeasurementLog, context: int, quantum: int, budget: int
) -> tuple[SearchResult, Machine]:
    """The split that the informed search finds, and the machine that its measurements led to."""
    session = Session(group, log, [context], budget=budget, quantum=quantum, plan=FEW, listener=Printed())
    found, machine = session.search(context).found, session.machine()
    assert found is not None
    assert machine is not None
    return found, Beliefs.after(machine, context, [trial.measurement for trial in found.trials]).machine


def uneven(context: int, ranks: int) -> Partition:
    """Chunks that get shorter, as good splits have them."""
    return Partition.from_fractions([1.3 - 0.6 * at / ranks for at in range(ranks)], context)


def certified(group: RankGroup, context: int, skipped: set[str]) -> dict[str, Any]:
    """Every method that runs here and equals one rank, with how far it is from it; and why others are left out."""
    found: dict[str, Any] = {}
    for method in (*BASELINES, "kvr-chain", "kvr-fanout"):
        if method in skipped:
            continue
        split = (uneven if method_of(method).splits else Partition.even)(context, group.ranks)
        candidate = Candidate(method, split)
        try:
            group.check(candidate)
            certificate = group.verify(candidate)
            if not certificate.holds:
                raise KVRError(f"does not equal one rank: {certificate.divergence}")
        except KVRError as error:
            print(f"  no {method}: {error}", flush=True)
            found[method] = {"left_out": str(error)}
            continue
        found[method] = {
            "sizes": candidate.partition.sizes,
            "worst": max(deviation.split for deviation in certificate.deviations),
            "worst_of_one_rank": max(deviation.single for deviation in certificate.deviations),
        }
    return found


def compare(
    group: RankGroup, named: list[tuple[str, Candidate]], plan: SamplingPlan, part: str, noise: int
) -> dict[str, Any]:
    """Methods on one context, as `kvr-partition compare` shows them."""
    context = named[0][1].partition.context
    disturbed = [
        (name, dataclasses.replace(candidate, noise=noise))
        for name, candidate in named
        if noise and method_of(candidate.method).limited
    ]
    candidates = [candidate for _, candidate in named + disturbed]
    measured = dict(zip(candidates, group.measure_many(candidates, plan=plan, purpose=part), strict=True))
    comparison = Comparison(
        [(name, measured[candidate]) for name, candidate in named],
        [(name, measured[candidate]) for name, candidate in disturbed],
        ranks=group.ranks,
        shared=group.backend == "sm",
        windows=group.windows,
        depth=group.resolved_depth,
    )
    print_table(*together([(str(context), comparison)]), left=2)
    records = comparison.facts()
    for record, (_, candidate) in zip(records, named, strict=True):
        found = measured[candidate]
        record["samples_s"] = [sample.ttft_s for sample in found.samples]
        record["host_enqueueing_s"] = median([sample.host_s for sample in found.samples]) if found.ok else None
        record["ranks"] = [
            {
                field: median([getattr(sample.ranks[rank], field) for sample in found.samples])
                for field in ("compute_s", "wait_s", "transfer_s")
            }
            for rank in range(len(found.samples[0].ranks) if found.ok else 0)
        ]
    return {"context": context, "methods": records}


def one_rank(group: RankGroup, contexts: list[int], plan: SamplingPlan) -> dict[str, Any]:
    """Our runtime on one rank against stock transformers."""
    found: dict[str, Any] = {}
    for context in contexts:
        pair = [Candidate.stock(context), Candidate.single(context)]
        stock, ours = group.measure_many(pair, plan=plan, purpose=f"one-rank/{context}")
        found[str(context)] = {
            "stock_s": stock.ttft_s if stock.ok else None,
            "stock_failed": None if stock.failure is None else stock.failure.message,
            "ours_s": ours.ttft_s,
            "ours_over_stock": ours.ttft_s / stock.ttft_s if stock.ok else None,
            "stock_samples_s": [sample.ttft_s for sample in stock.samples],
            "ours_samples_s": [sample.ttft_s for sample in ours.samples],
        }
        took = f"{stock.ttft_s * 1e3:.1f} ms" if stock.ok else str(stock.failure)
        print(f"  {context}: stock {took}, ours {ours.ttft_s * 1e3:.1f} ms", flush=True)
    return found


def cold(group: RankGroup, context: int, plan: SamplingPlan) -> dict[str, Any]:
    """Contexts never seen before, then the same again once their plans exist; likewise chunks behind a prefix."""
    built, seconds = group.plan_ahead(context)
    print(f"  {built} plans built ahead in {seconds:.1f} s", flush=True)
    found: dict[str, Any] = {"plans_built_ahead": built, "building_s": seconds}

    def both(what: str, take: Callable[[bool], float]) -> dict[str, Any]:
        first = take(True)
        again = [take(True)]
        take(False)
        warm = [take(False) for _ in range(4)]
        print(f"  {what}: cold {first * 1e3:.1f} ms, warm {median(warm) * 1e3:.1f} ms", flush=True)
        return {"cold_s": first, "cold_again_s": again, "warm_s": warm, "ratio": first / median(warm)}

    def whole(tokens: int) -> Callable[[bool], float]:
        candidate = Candidate("kvr", Partition((tokens,)))
        return lambda cold: group.sample(candidate, cold=cold).ttft_s

    def behind(tokens: int, prefix: int) -> Callable[[bool], float]:
        return lambda cold: group.time_chunk(tokens, prefix, cold=cold)[0][0]

    # Multiples of nothing.
    unseen = [context - 137 - 211 * step for step in range(4)]
    found["contexts"] = {str(tokens): both(str(tokens), whole(tokens)) for tokens in unseen}
    cuts = [(tokens * (step + 4) // 10, tokens) for step, tokens in enumerate(unseen)]
    found["chunks"] = {
        f"{tokens - cut} behind {cut}": both(f"{tokens - cut} behind {cut}", behind(tokens - cut, cut))
        for cut, tokens in cuts
    }
    # As ranks have them whose boundaries are multiples of the shortest plan.
    aligned = [(cut // SHORTEST_PIECE * SHORTEST_PIECE, tokens) for cut, tokens in cuts]
    found["aligned_chunks"] = {
        f"{tokens - cut} behind {cut}": both(f"{tokens - cut} behind {cut}", behind(tokens - cut, cut))
        for cut, tokens in aligned
    }
    return found


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--backend", default="sm", choices=("sm", "cuda", "cpu"))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--one-rank", default="4096,16384,32768", help="contexts; empty for none")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--bandwidth", help="compare at this rate as well, like 10GB/s")
    parser.add_argument("--noise", default="0", help="background traffic per layer at that rate, like 16MB")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--quantum", type=int, default=128)
    parser.add_argument("--skip", default="", help="methods to leave out, like tp")
    parser.add_argument("--budget", type=int, default=6, help="splits that the search measures")
    parser.add_argument(
        "--verify", type=int, default=2048, help="verify each method at this context first; 0: not"
    )
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    least = min(6, options.samples)
    plan = SamplingPlan(warmup=1, least=least, most=options.samples, tolerance=0.01)
    failed = False

    def part(name: str, ranks: int, backend: str, work: Callable[[RankGroup], Any]) -> None:
        nonlocal failed
        file = options.out / f"{name}.json"
        if file.exists():
            return
        print(f"\n{name}", flush=True)
        began = time.monotonic()
        try:
            with (
                MeasurementLog(options.out / f"{name}.jsonl") as log,
                RankGroup(
                    model_folder(options.model),
                    ranks,
                    backend=backend,
                    dtype=options.dtype,
                    topology="chain",
                    log=log,
                    timeout_s=300,
                ) as group,
            ):
                figures = work(group)
                origin = json.loads(json.dumps(group.provenance, default=_fields))
        except KVRError as error:
            failed = True
            traceback.print_exc()
            for note in getattr(error, "__notes__", []):
                print(note)
            return
        document = {
            "command": " ".join(["python benchmarks/prefill.py", *sys.argv[1:]]),
            "provenance": origin,
            "figures": figures,
        }
        file.write_text(json.dumps(document, indent=1) + "\n")
        print(f"  [{time.monotonic() - began:.0f} s]", flush=True)

    contexts = [int(word) for word in options.one_rank.split(",") if word]
    whole = "cpu" if options.backend == "cpu" else "cuda"
    if contexts:
        part("one-rank", 1, whole, lambda group: one_rank(group, contexts, plan))
    if options.cold:
        part("cold", 1, whole, lambda group: cold(group, options.context, plan))
    noise = int(parse_bytes(options.noise, "--noise"))
    for ranks in (int(word) for word in options.ranks.split(",") if word):

        def work(group: RankGroup) -> Any:
            context, quantum = options.context, options.quantum
            skipped = set(options.skip.split(","))
            equal = certified(group, options.verify, skipped) if options.verify else {}
            left_out = skipped | {method for method, one in equal.items() if "left_out" in one}
            assert group.log is not None
            found, machine = searched(group, group.log, context, quantum, options.budget)
            even = Partition.even(context, group.ranks)

            def baselines(*methods: str) -> list[tuple[str, Candidate]]:
                kept = []
                for method in methods:
                    candidate = Candidate.even(method, context, group.ranks)
                    try:
                        group.check(candidate)
                    except KVRError:
                        continue
                    kept.append((method, candidate))
                return [one for one in kept if one[0] not in left_out]

            full = [
                ("stock", Candidate.stock(context)),
                ("single", Candidate.single(context)),
                *baselines(*BASELINES),
                ("KVR-E", Candidate("kvr-chain", even)),
                ("KVR-S", Candidate("kvr-chain", found.best)),
                ("KVR-S fan-out", Candidate("kvr-fanout", found.best)),
                ("TTFT(p) of KVR-S", Candidate("bound", found.best)),
            ]
            figures = {
                "certified": equal,
                "search": {
                    "stopped": found.stopped,
                    "trials": [
                        {"sizes": trial.partition.sizes, "ttft_s": trial.ttft_s, "source": trial.source}
                        for trial in found.trials
                    ],
                },
                "full_bandwidth": compare(group, full, plan, "full-bandwidth", 0),
            }
            if options.bandwidth is None:
                return figures
            bandwidth = parse_rate(options.bandwidth)
            group.hold_links(bandwidth)
            held = replace(machine, link=LinkCost.of(bandwidth))
            chain = best_split(context, group.ranks, held, quantum)
            fanout = best_split(context, group.ranks, replace(held, topology="fanout"), quantum)
            limited = [
                *baselines("tsp", "zigzag"),
                ("KVR-E", Candidate("kvr-chain", even)),
                ("KVR solved", Candidate("kvr-chain", chain)),
                ("KVR solved fan-out", Candidate("kvr-fanout", fanout)),
                ("TTFT(p) of solved", Candidate("bound", chain)),
            ]
            figures["held"] = {
                "bandwidth": options.bandwidth,
                "noise_bytes": noise,
                **compare(group, limited, plan, "held", noise),
            }
            return figures

        usual = options.context == parser.get_default("context")
        name = f"{options.backend}-{ranks}-ranks" + ("" if usual else f"-{options.context}")
        part(name, ranks, options.backend, work)
    sys.exit(1 if failed else 0)


def _fields(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


if __name__ == "__main__":
    main()
