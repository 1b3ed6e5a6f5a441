"""Prefill figures: one rank, cold contexts, and every method at several rank counts, interleaved.

Each part is one run whose samples go to ``<out>/<part>.jsonl`` and whose figures go to ``<out>/<part>.json``.
Parts that finished are skipped when the same command runs again.

    python benchmarks/prefill.py --model llama-7b --backend sm --dtype float16 --out data/h100-sxm/llama-7b
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvr_partition.cli.comparison import Comparison, together
from kvr_partition.cli.options import model_folder, parse_bytes, parse_rate
from kvr_partition.cli.show import print_table
from kvr_partition.cost import ChunkCost, LinkCost
from kvr_partition.errors import KVRError
from kvr_partition.measurement import median
from kvr_partition.partition import Partition
from kvr_partition.schedule import Setting, balanced, best_split
from profiler import Candidate, MeasurementLog, RankGroup, SamplingPlan

BASELINES = ("tsp", "tsp-causal", "zigzag", "tp")


@dataclass(frozen=True)
class Balance:
    """What balancing found: the split, and the setting that explains what it measured."""

    split: Partition
    setting: Setting
    rounds: list[dict[str, Any]]


def balance(group: RankGroup, context: int, quantum: int, rounds: int) -> Balance:
    """The split in which all ranks compute equally long, by running it and moving work from slow ranks to fast.

    Each round runs a split, fits a cost to what every rank computed in all rounds so far, sets each rank's
    speed to what it did in this round, and balances anew. The split with the shortest TTFT is kept.
    """
    import numpy as np
    from scipy.optimize import nnls

    split = Partition.even(context, group.ranks, quantum=quantum)
    terms: list[list[float]] = []
    measured: list[float] = []
    log: list[dict[str, Any]] = []
    found: list[tuple[float, Partition]] = []
    cost, speeds = ChunkCost(0.0, 1.0, 0.0, 0.0), (1.0,) * group.ranks
    for _ in range(rounds):
        samples = [group.sample(Candidate("kvr-chain", split)) for _ in range(4)][1:]
        took = [median([sample.ranks[rank].compute_s for sample in samples]) for rank in range(group.ranks)]
        ttft_s = median([sample.ttft_s for sample in samples])
        log.append({"sizes": split.sizes, "ttft_s": ttft_s, "compute_s": took})
        found.append((ttft_s, split))
        print(f"  balancing: {split} {ttft_s * 1e3:.1f} ms, ranks compute", end=" ")
        print(", ".join(f"{seconds * 1e3:.0f}" for seconds in took), "ms", flush=True)
        terms += [[c, c * (s + c / 2)] for c, s in zip(split.sizes, split.starts, strict=True)]
        measured += took
        (token, pair), _ = nnls(np.array(terms) / np.array(measured)[:, None], np.ones(len(measured)))
        cost = ChunkCost(0.0, float(token), float(pair), float(pair), kv_share(group))
        speeds = tuple(
            cost.seconds(c, s) / seconds for c, s, seconds in zip(split.sizes, split.starts, took, strict=True)
        )
        split = balanced(cost, context, group.ranks, quantum=quantum, speeds=speeds)
    setting = Setting(cost, len(group.windows), group.entry_bytes, speeds=speeds)
    return Balance(min(found, key=lambda one: one[0])[1], setting, log)


def kv_share(group: RankGroup) -> float:
    """Share of a layer's matrix products that come before its KV is ready: those of Q, K and V."""
    shape = group.geometry
    config = json.loads((model_folder(str(group.model)) / "config.json").read_text())
    heads = (shape.attention_heads + 2 * shape.kv_heads) * shape.head_dim
    # Llama's MLP has three matrices, Falcon's two of four times the width.
    inner = 3 * config["intermediate_size"] if "intermediate_size" in config else 8 * shape.hidden_size
    return heads / (heads + shape.attention_heads * shape.head_dim + inner)


def compare(
    group: RankGroup,
    context: int,
    splits: list[tuple[str, Candidate]],
    plan: SamplingPlan,
    part: str,
    noise: int,
    verify: int,
) -> dict[str, Any]:
    """Every method on one context, as `kvr-partition compare` shows them."""
    wanted = [("single", Candidate.single(context))]
    wanted += [(method, Candidate.even(method, context, group.ranks)) for method in BASELINES]
    wanted += [("KVR-E", Candidate("kvr-chain", Partition.even(context, group.ranks))), *splits]
    named, left_out, certified = [], {}, {}
    for name, candidate in wanted:
        try:
            group.check(candidate)
            if verify and candidate.method not in ("single", "bound"):
                shape = Partition.from_fractions(candidate.partition.fractions, verify)
                certificate = group.verify(Candidate(candidate.method, shape))
                if not certificate.holds:
                    raise KVRError(f"does not equal one rank: {certificate.divergence}")
                certified[name] = {
                    "sizes": shape.sizes,
                    "worst": max(deviation.split for deviation in certificate.deviations),
                    "worst_of_one_rank": max(deviation.single for deviation in certificate.deviations),
                }
        except KVRError as error:
            left_out[name] = str(error)
            continue
        named.append((name, candidate))
    undisturbed = ("single", "tp", "bound", "tsp-causal")
    disturbed = [
        (name, replace(candidate, noise=noise))
        for name, candidate in named
        if noise and candidate.method not in undisturbed
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
    for name, why in left_out.items():
        print(f"  no {name}: {why}")
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
    return {"context": context, "left_out": left_out, "certified": certified, "methods": records}


def one_rank(group: RankGroup, contexts: list[int], plan: SamplingPlan) -> dict[str, Any]:
    """Our runtime on one rank against stock transformers."""
    found: dict[str, Any] = {}
    for context in contexts:
        pair = [Candidate.single(context), Candidate("kvr", Partition((context,)))]
        stock, ours = group.measure_many(pair, plan=plan, purpose=f"one-rank/{context}")
        found[str(context)] = {
            "stock_s": stock.ttft_s,
            "ours_s": ours.ttft_s,
            "ours_over_stock": ours.ttft_s / stock.ttft_s,
            "stock_samples_s": [sample.ttft_s for sample in stock.samples],
            "ours_samples_s": [sample.ttft_s for sample in ours.samples],
        }
        print(f"  {context}: stock {stock.ttft_s * 1e3:.1f} ms, ours {ours.ttft_s * 1e3:.1f} ms", flush=True)
    return found


def cold(group: RankGroup, context: int, plan: SamplingPlan) -> dict[str, Any]:
    """Contexts never seen before, then the same again once their plans exist; likewise chunks behind a prefix."""
    built, seconds = group.plan_ahead(context)
    print(f"  {built} plans built ahead in {seconds:.1f} s", flush=True)
    found: dict[str, Any] = {"plans_built_ahead": built, "building_s": seconds}

    def both(what: str, take: Callable[[bool], float]) -> dict[str, Any]:
        first = take(True)
        again = [take(True) for _ in range(3)]
        take(False)
        warm = [take(False) for _ in range(5)]
        print(f"  {what}: cold {first * 1e3:.1f} ms, warm {median(warm) * 1e3:.1f} ms", flush=True)
        return {"cold_s": first, "cold_again_s": again, "warm_s": warm, "ratio": first / median(warm)}

    def whole(tokens: int) -> Callable[[bool], float]:
        candidate = Candidate("kvr", Partition((tokens,)))
        return lambda cold: group.sample(candidate, cold=cold).ttft_s

    def behind(tokens: int, prefix: int) -> Callable[[bool], float]:
        return lambda cold: group.time_chunk(tokens, prefix, cold=cold)[0][0]

    # Multiples of nothing.
    unseen = [context - 137 - 211 * step for step in range(5)]
    found["contexts"] = {str(tokens): both(str(tokens), whole(tokens)) for tokens in unseen}
    cuts = [(tokens * (step + 4) // 10, tokens) for step, tokens in enumerate(unseen)]
    found["chunks"] = {
        f"{tokens - cut} behind {cut}": both(f"{tokens - cut} behind {cut}", behind(tokens - cut, cut))
        for cut, tokens in cuts
    }
    return found


def around(name: str, split: Partition) -> list[tuple[str, Candidate]]:
    """A split with its bound."""
    return [(f"KVR {name}", Candidate("kvr-chain", split)), (f"TTFT(p) of {name}", Candidate("bound", split))]


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
    parser.add_argument("--noise", default="0", help="foreign traffic per layer at that rate, like 16MB")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--quantum", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="splits that balancing tries, the even one included")
    parser.add_argument(
        "--verify", type=int, default=4096, help="verify each method at this context first; 0: not"
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
            found = balance(group, context, quantum, options.rounds)
            splits = [
                *around("balanced", found.split),
                ("KVR balanced fan-out", Candidate("kvr-fanout", found.split)),
            ]
            full = compare(group, context, splits, plan, "full-bandwidth", 0, options.verify)
            figures = {"balancing": found.rounds, "full_bandwidth": full}
            if options.bandwidth is None:
                return figures
            bandwidth = parse_rate(options.bandwidth)
            group.hold_links(bandwidth)
            held = replace(found.setting, link=LinkCost.of(bandwidth))
            best = best_split(context, group.ranks, held, quantum)
            fanout = best_split(context, group.ranks, replace(held, topology="fanout"), quantum)
            splits = [
                ("KVR balanced", Candidate("kvr-chain", found.split)),
                *around("solved", best),
                ("KVR solved fan-out", Candidate("kvr-fanout", fanout)),
            ]
            limited = compare(group, context, splits, plan, "held", noise, 0)
            return {**figures, "held": {"bandwidth": options.bandwidth, "noise_bytes": noise, **limited}}

        part(f"{options.backend}-{ranks}-ranks", ranks, options.backend, work)
    sys.exit(1 if failed else 0)


def _fields(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


if __name__ == "__main__":
    main()
