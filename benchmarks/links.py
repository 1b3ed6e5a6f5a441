"""The links between whole GPUs: KV-Runahead over peer memory and over NCCL, zigzag and TTFT(p), interleaved.

For each model and context a search over peer links finds the split, which is then timed again beside the others on
ranks that time nothing else. What one method needs and another does not is given back in between where a GPU has
no room for both, and a run that is not timed puts it there again.

TTFT(p) is timed twice: as ``bound``, with ranks that have their prefixes from the beginning, and as ``bound +
copies``, where copy engines also move what KV-Runahead moves, and nobody waits for it. GPUs at their power limit
compute slower while links carry anything; the second one tells that from what waiting costs.

    python -m benchmarks.links --ranks 2 --models llama-7b,llama-3.1-8b --contexts 16384,65536 --out data/h100-sxm
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.prefill import searched
from kvr_partition.cli.options import model_folder
from kvr_partition.measurement import median
from kvr_partition.partition import Partition
from kvr_partition.runtime.links.plan import NoLinks, Piece, Slot
from profiler import RankGroup

MODES = ("kvr-s peer", "kvr-s nccl", "zigzag", "bound", "bound + copies")


class Copies(NoLinks):
    """Nobody waits, but copy engines bring each layer's own rows to every later GPU."""

    def __init__(self, rank: int, split: Partition) -> None:
        super().__init__()
        self._own = Piece(rank, split.starts[rank], split.ends[rank])
        self._later = range(rank + 1, split.ranks)
        self._slots: Sequence[Slot] = ()
        self._to: dict[int, tuple[torch.cuda.Stream, torch.Tensor]] = {}

    def start(self, slots: Sequence[Slot]) -> None:
        """Make room over there for a layer."""
        super().start(slots)
        self._slots = slots
        own = slots[0].at(self._own)
        self._to = {
            peer: (torch.cuda.Stream(), torch.empty_like(own, device=f"cuda:{peer}")) for peer in self._later
        }

    def kv_ready(self, layer: int) -> None:
        """Copy them."""
        ready = torch.cuda.current_stream().record_event()
        for stream, there in self._to.values():
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                there.copy_(self._slots[layer].at(self._own), non_blocking=True)


def timed(rank: int, spec: dict[str, Any]) -> None:
    """One rank of the timing."""
    from kvr_partition.runtime import link_group, prefill, probe, release_link_memory, zigzag
    from kvr_partition.runtime.agreement import agreement_of
    from kvr_partition.runtime.chunk import chunk_cache, run_chunk
    from kvr_partition.runtime.kernels import planning
    from kvr_partition.runtime.replacing import runahead_attention
    from profiler.models import build_model, open_model
    from profiler.rank import random_prefix

    ranks = spec["ranks"]
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=spec["meet"], rank=rank, world_size=ranks, device_id=device)
    groups = {kind: link_group(links=kind) for kind in ("peer", "nccl")}  # type: ignore[arg-type]
    barrier = agreement_of(groups["peer"]).barrier
    model = build_model(open_model(model_folder(spec["model"])), dtype="float16", device=str(device), seed=0)
    results = {}
    attention = runahead_attention(model) if probe(model).route == "interface" else contextlib.nullcontext()
    # The runs that are not timed build plans of the very shapes.
    with attention, planning():
        for asked in spec["contexts"]:
            context, split = asked["context"], Partition(tuple(asked["sizes"]))
            ids = torch.randint(
                0, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0)
            )
            ids = ids.to(device)
            start, end = split.starts[rank], split.ends[rank]

            def bound(links: NoLinks) -> Any:
                cache = random_prefix(chunk_cache(model, ids[:, start:end], prefix=start))  # noqa: B023
                torch.cuda.synchronize()
                barrier()
                began = time.perf_counter()
                out = run_chunk(model, ids[:, start:end], cache, rank=rank, ranks=ranks, links=links)  # noqa: B023
                torch.cuda.synchronize()
                return began, time.perf_counter(), out

            def run(mode: str) -> tuple[float, float, Any]:
                if mode.startswith("bound"):
                    return bound(NoLinks() if mode == "bound" else Copies(rank, split))  # noqa: B023
                torch.cuda.synchronize()
                barrier()
                began = time.perf_counter()
                out = (
                    zigzag(model, ids)  # noqa: B023
                    if mode == "zigzag"
                    else prefill(model, ids, split, group=groups[mode.split()[1]])  # noqa: B023
                )
                return began, time.perf_counter(), out

            # Rows of two methods at once: those that peers write to are not torch's to give to another.
            heads = model.config.num_key_value_heads
            rows = 2 * 2 * model.config.num_hidden_layers * heads * model.config.head_dim * context
            tight = 3 * rows > torch.cuda.mem_get_info(device)[0]
            samples: dict[str, list[float]] = {mode: [] for mode in MODES}
            times: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
            for round_ in range(spec["warmup"] + spec["samples"]):
                # None of them always comes behind the same other one.
                for mode in random.Random(round_).sample(MODES, len(MODES)):
                    if tight:
                        gc.collect()
                        torch.cuda.empty_cache()
                        release_link_memory(groups["peer"])
                        run(mode)
                    began, ended, out = run(mode)
                    counts = mode.startswith("bound") or out.first_token is not None
                    took = torch.tensor(
                        [ended - began if counts else 0.0, out.timeline.compute_s, out.timeline.wait_s],
                        device=device,
                        dtype=torch.float64,
                    )
                    del out
                    every = [torch.zeros_like(took) for _ in range(ranks)]
                    dist.all_gather(every, took)
                    if round_ >= spec["warmup"]:
                        samples[mode].append(max(float(one[0]) for one in every))
                        times[mode].append([float(one[1]) for one in every] + [float(one[2]) for one in every])
            if rank == 0:
                results[str(context)] = told(split, samples, times, tight)
                print(spec["model"], context, json.dumps(results[str(context)]["ratios"]), flush=True)
            release_link_memory(groups["peer"])
    if rank == 0:
        found = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "contexts": results}
        Path(spec["out"]).write_text(json.dumps(found, indent=1) + "\n")
    barrier()
    os._exit(0)


def told(
    split: Partition, samples: dict[str, list[float]], times: dict[str, list[list[float]]], tight: bool
) -> dict[str, Any]:
    """The figures of one context."""
    ttft = {mode: median(found) for mode, found in samples.items()}
    ranks = split.ranks
    parts = {
        mode: [median([one[at] for one in found]) for at in range(2 * ranks)] for mode, found in times.items()
    }
    compute = {mode: found[:ranks] for mode, found in parts.items()}
    return {
        "sizes": split.sizes,
        "memory_given_back_between_methods": tight,
        "ttft_s": ttft,
        "samples_s": samples,
        "compute_s": compute,
        "wait_s": {mode: found[ranks:] for mode, found in parts.items()},
        "ratios": {
            "peer over TTFT(p)": ttft["kvr-s peer"] / ttft["bound"],
            "peer over TTFT(p) with copies": ttft["kvr-s peer"] / ttft["bound + copies"],
            "peer over nccl": ttft["kvr-s peer"] / ttft["kvr-s nccl"],
            "peer over zigzag": ttft["kvr-s peer"] / ttft["zigzag"],
            "nccl over TTFT(p)": ttft["kvr-s nccl"] / ttft["bound"],
            "compute over peer links over compute of TTFT(p), by rank": [
                ours / bound for ours, bound in zip(compute["kvr-s peer"], compute["bound"], strict=True)
            ],
            "compute over peer links over compute of TTFT(p) with copies, by rank": [
                ours / bound for ours, bound in zip(compute["kvr-s peer"], compute["bound + copies"], strict=True)
            ],
            "compute over NCCL over compute of TTFT(p), by rank": [
                ours / bound for ours, bound in zip(compute["kvr-s nccl"], compute["bound"], strict=True)
            ],
        },
    }


def measured(name: str, options: argparse.Namespace, each: Callable[[str], None]) -> dict[str, Any]:
    """Find the splits of one model, and time them."""
    contexts = [int(word) for word in options.contexts.split(",")]
    asked, trials = [], {}
    with RankGroup(
        model_folder(name), ranks=options.ranks, backend="cuda", dtype="float16", links="peer"
    ) as group:
        origin = group.provenance
        for context in contexts if not options.splits else ():
            each(f"{name} {context}: searching")
            quantum = 128 * max(1, context // 65_536)
            found, _ = searched(group, context, quantum, options.budget)
            asked.append({"context": context, "sizes": found.best.sizes})
            trials[str(context)] = [
                {"sizes": trial.partition.sizes, "ttft_s": trial.ttft_s} for trial in found.trials
            ]
    if options.splits:
        # What a search found before is timed again.
        before = json.loads((options.splits / f"links-{options.ranks}-ranks-{name}.json").read_text())["contexts"]
        asked = [{"context": context, "sizes": before[str(context)]["sizes"]} for context in contexts]
        trials = {context: found["trials"] for context, found in before.items()}
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            "model": name,
            "ranks": options.ranks,
            "contexts": asked,
            "samples": options.samples,
            "warmup": 2,
            "meet": (Path(folder) / "meet").as_uri(),
            "out": str(Path(folder) / "found.json"),
        }
        (Path(folder) / "spec.json").write_text(json.dumps(spec))
        environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.links", "--rank", str(rank), "--spec", f"{folder}/spec.json"],
                env=environment,
            )
            for rank in range(options.ranks)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"{name}: a rank failed")
        figures = json.loads(Path(spec["out"]).read_text())
    for context, found in figures["contexts"].items():
        found["trials"] = trials[context]
    return {**figures, "topology": origin.topology, "link": origin.link, "driver": origin.driver}


def main() -> None:
    """Every model in turn; those that are there already are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-7b,llama-3.1-8b")
    parser.add_argument("--contexts", default="16384,65536")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--budget", type=int, default=6, help="splits to measure per context")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("links"))
    parser.add_argument("--splits", type=Path, metavar="FOLDER", help="take those of an earlier run; search none")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--spec")
    options = parser.parse_args()
    if options.rank is not None:
        timed(options.rank, json.loads(Path(options.spec).read_text()))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models.split(","):
        path = options.out / f"links-{options.ranks}-ranks-{name}.json"
        if path.exists():
            continue
        figures = measured(name, options, lambda text: print(text, flush=True))
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
