"""What it costs that ranks agree on each prompt before they read it.

    python -m benchmarks.agreement --ranks 2,4 --out data/epyc-2-cores/agreement.json

Ranks are processes of this host with one thread each and a small model. For each number of ranks and length:

    agreement   microseconds from when a rank has its statement ready to when it has everybody's, median and
                quartiles over turns and ranks; ranks come straight from the turn before
    checks      what is looked at on the rank itself before that: the prompt's digest, settings, positions
    prefill     a whole prefill with agreement beside one without, turn by turn, on the last rank

``--device cuda`` gives each rank a GPU, or all the only one there is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTHS = (256, 4096)
TURNS = 400
PREFILLS = 40


def main() -> None:
    """Measure and print."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--ranks", default="2", help="numbers of ranks, like 2,4,8")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the prompt lies")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    options = parser.parse_args()
    found = []
    for ranks in map(int, options.ranks.split(",")):
        found += measured(ranks, options.device)
    for one in found:
        low, middle, high = one["agreement_us"]
        print(
            f"{one['ranks']} ranks, {one['context']} tokens: agreement {middle:.0f} us ({low:.0f} to {high:.0f}), "
            f"checks {one['checks_us']:.0f} us, prefill {one['prefill_ms'][0]:.2f} ms with, "
            f"{one['prefill_ms'][1]:.2f} without"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        command = f"python -m benchmarks.agreement --ranks {options.ranks} --device {options.device}"
        options.out.write_text(
            json.dumps({**conditions(command, options.device), "figures": found}, indent=1) + "\n"
        )


def conditions(command: str, device: str) -> dict[str, Any]:
    """What the figures were measured with."""
    import torch

    from kvr_partition import __version__
    from profiler.rank import cpu_name

    return {
        "command": command,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kvr_partition": __version__,
    }


def measured(ranks: int, device: str) -> list[dict[str, Any]]:
    """Figures of so many ranks."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answers: Any = context.SimpleQueue()
        processes = [
            context.Process(target=rank_main, args=(rank, ranks, device, folder, answers)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        replies = [answers.get() for _ in processes]
        for process in processes:
            process.join()
    found = []
    for at, length in enumerate(LENGTHS):
        each = [reply[at] for reply in replies]
        waits = [seconds for one in each for seconds in one["agreement"]]
        last = next(one for one in each if one["last"])
        found.append(
            {
                "ranks": ranks,
                "context": length,
                "turns": TURNS,
                "agreement_us": [1e6 * quartile for quartile in statistics.quantiles(waits, n=4)],
                "checks_us": 1e6 * statistics.median(seconds for one in each for seconds in one["checks"]),
                "prefill_ms": [1e3 * statistics.median(last[key]) for key in ("with", "without")],
            }
        )
    return found


def rank_main(rank: int, ranks: int, device_type: str, folder: str, answers: Any) -> None:
    """One rank."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvr_partition import Partition
    from kvr_partition.runtime import link_group, prefill
    from kvr_partition.runtime.agreement import agreement_of
    from kvr_partition.runtime.links.plan import NO_LIMITS
    from kvr_partition.runtime.prefill import _planned

    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    device = torch.device(f"cuda:{rank % gpus}" if gpus else "cpu")
    if gpus:
        torch.cuda.set_device(device)
    # Ranks that share a GPU cannot use NCCL; they have no links here, only agreement.
    backend = "nccl" if gpus >= ranks else "gloo"
    dist.init_process_group(backend, init_method=(Path(folder) / "meet").as_uri(), rank=rank, world_size=ranks)
    group = link_group()
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=512,
            max_position_embeddings=8192,
        )
    )  # fmt: skip
    model = model.eval().to(device)
    agreement = agreement_of(group)
    found = []
    for length in LENGTHS:
        split = Partition.even(length, ranks)
        prompts = [torch.randint(0, 512, (1, length), device=device) for _ in range(8)]
        for prompt in prompts:
            dist.broadcast(prompt, src=0)
        waits: list[float] = []
        checks: list[float] = []
        for turn_number in range(TURNS):
            ids = prompts[turn_number % 8]
            with agreement.turn() as turn:
                began = time.perf_counter()
                plan = _planned(model, ids, split, turn, "auto", 0, "chain", NO_LIMITS, None, None)
                checked = time.perf_counter()
                turn.agree("kvr", model, ids, plan.prompt, sizes=split.sizes, topology="chain", limits=NO_LIMITS)
                waits.append(time.perf_counter() - checked)
                checks.append(checked - began)
        taken: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(PREFILLS if backend == "nccl" or not gpus else 0):
            for agree in (True, False) if turn % 2 else (False, True):
                agreement.barrier()
                began = time.perf_counter()
                prefill(model, prompts[turn % 8], split, group=group, agree=agree)
                taken[agree].append(time.perf_counter() - began)
        found.append(
            {
                "agreement": waits[20:],
                "checks": checks[20:],
                "with": taken[True][3:] or [float("nan")],
                "without": taken[False][3:] or [float("nan")],
                "last": rank == ranks - 1,
            }
        )
    answers.put(found)
    agreement.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
