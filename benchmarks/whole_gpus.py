"""Everything about prefill on several whole GPUs, by the commands that users have.

A step is one command, or one part of this script that needs ranks of its own. What it prints stands in
``<out>/<step>.txt`` with the seconds since it began, the JSON it ends with in ``<out>/<step>.json``, and how it
ended in ``<out>/steps.json``. Steps that ended well are skipped when the script runs again, one that reaches its
limit is stopped and left for the next time, and after each of them everything is in ``<archive>``.

    python -m benchmarks.whole_gpus --ranks 4 --steps doctor,search,compare --out whole --archive whole.tar.gz
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvr_partition.cli.options import model_folder
from kvr_partition.errors import KVRError
from kvr_partition.loading import load_table
from kvr_partition.measurement import median
from kvr_partition.partition import Partition
from profiler import Candidate, MeasurementLog, RankGroup, SamplingPlan

CONTEXTS = "4096,16384,65536,131072"
SHORT = "1024,2048"
HELD = "10GB/s"
FOREIGN = "16MB"
"""A layer, on one link, at that rate."""


@dataclass(frozen=True)
class Step:
    """What is run, and for how many seconds at most."""

    name: str
    command: list[str]
    limit_s: float


def steps(options: argparse.Namespace) -> list[Step]:
    """All of them, in a sensible order."""
    model, out = options.model, options.out
    ranks = ["--ranks", str(options.ranks), "--backend", options.backend, "--dtype", options.dtype]
    ours = [sys.executable, "-m", "kvr_partition"]
    this = [
        sys.executable, "-m", "benchmarks.whole_gpus", "--model", model, "--out", str(out), *ranks,
        "--context", str(options.context), "--prompts", str(options.prompts),
    ]  # fmt: skip
    table = f"{out}/search/table.json"
    shares = [1.3 - 0.6 * at / options.ranks for at in range(options.ranks)]
    uneven = str(Partition.from_fractions(shares, 4096))

    def command(name: str, limit_s: float, *words: str, form: bool = True) -> Step:
        json_form = ["--format", "json"] if form else []
        return Step(name, [*ours, *words[:1], "--model", model, *ranks, *words[1:], *json_form], limit_s)

    def search(name: str, limit_s: float, contexts: str, *words: str) -> Step:
        return command(
            name, limit_s, "search", "--contexts", contexts, "--out", f"{out}/{name}", *words, form=False
        )

    def compare(name: str, limit_s: float, contexts: str, *words: str) -> Step:
        log = ["--no-verify", "--samples", str(options.samples), "--log", f"{out}/{name}.jsonl"]
        return command(name, limit_s, "compare", "--context", contexts, *log, *words)

    every = "kvr-chain,kvr-fanout,tsp,tsp-causal,zigzag,tp"
    most = "stock,single,tsp-causal,zigzag,kvr-e,kvr-s,kvr-p,other,bound"
    held = ["--bandwidth", HELD]
    return [
        Step("doctor", [*ours, "doctor", "--format", "json"], 120),
        search("search", 420, options.contexts),
        compare("compare", 150, "4096,16384", "--table", table),
        compare("compare-32768", 120, "32768", "--table", table, "--methods", most),
        compare("compare-65536", 240, "65536", "--table", table, "--methods", most),
        compare("compare-131072", 240, "131072", "--table", table, "--methods", most),
        search("search-short", 90, SHORT),
        compare("compare-short", 60, SHORT, "--table", f"{out}/search-short/table.json", "--methods", most),
        search("search-held", 120, "16384", *held),
        compare(
            "compare-held", 90, "16384", "--table", f"{out}/search-held/table.json", *held, "--noise", FOREIGN,
            "--methods", "tsp-causal,zigzag,kvr-e,kvr-s,other,bound",
        ),
        command("verify-peer", 120, "verify", "--context", "4096", "--partition", uneven, "--methods", every),
        command(
            "verify-nccl", 90, "verify", "--context", "4096", "--partition", uneven, "--methods",
            "kvr-chain,kvr-fanout", "--links", "nccl",
        ),
        Step(
            "context-parallel",
            [
                sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks), "-m",
                "benchmarks.context_parallel", "--model", model, "--contexts", "4096,16384", "--dtype",
                options.dtype, "--samples", str(options.samples), "--out", f"{out}/context-parallel.json",
            ],
            180,
        ),
        Step("splits", [*this, "--part", "splits"], 120),
        Step("soak", [*this, "--part", "soak"], 150),
        Step("kill", [*this, "--part", "kill"], 90),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ parts with their own ranks


def group_of(options: argparse.Namespace, log: MeasurementLog | None = None) -> RankGroup:
    """Ranks as the commands have them."""
    return RankGroup(
        model_folder(options.model), options.ranks, backend=options.backend, dtype=options.dtype, log=log,
        timeout_s=60,
    )  # fmt: skip


def splits(options: argparse.Namespace) -> dict[str, Any]:
    """Splits that no search proposed, beside what it found; a schedule can be held against them."""
    draw, context = random.Random(1), options.context
    table = load_table(options.out / "search" / "table.json")
    best = table.lookup(context, ranks=options.ranks).partition
    shares = [[size * draw.uniform(0.75, 1.25) for size in best.sizes] for _ in range(8)]
    drawn = [Partition.from_fractions(one, context, quantum=128) for one in shares]
    with (
        MeasurementLog(options.out / "splits.jsonl") as log,
        group_of(options, log) as group,
    ):
        candidates = [Candidate("kvr", one) for one in [best, *drawn]]
        found = group.measure_many(candidates, plan=SamplingPlan(1, 5, 5), purpose=f"splits/{context}")
    return {"context": context, "splits": [{"sizes": one.sizes, "ttft_s": one.ttft_s} for one in found]}


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Prompts of mixed lengths in a row: what memory, and a prompt of always the same length, do meanwhile."""
    draw = random.Random(2)
    fixed = Candidate("kvr", Partition.even(options.context // 4, options.ranks))
    told = []
    with group_of(options) as group:
        group.plan_ahead(options.context)
        for turn in range(options.prompts):
            tokens = draw.randrange(options.ranks * 16, options.context)
            cuts = Partition.from_fractions([draw.uniform(0.5, 1.5) for _ in range(options.ranks)], tokens)
            group.sample(Candidate("kvr", cuts))
            if turn % 10 == 9:
                samples = [group.sample(fixed).ttft_s for _ in range(3)]
                told.append({"prompts": turn + 1, "fixed_ttft_s": median(samples), **_memory(group)})
                print(json.dumps(told[-1]), file=sys.stderr, flush=True)
    return {"fixed": fixed.partition.sizes, "prompts": options.prompts, "every_10": told}


def _memory(group: RankGroup) -> dict[str, Any]:
    """Of the devices, as their driver tells, and of the ranks' processes."""
    pages = os.sysconf("SC_PAGE_SIZE")
    found: dict[str, Any] = {
        "host_bytes": [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * pages for pid in group.pids]
    }
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        found["device_mib"] = [int(line) for line in told.split()][: group.ranks]
    return found


def kill(options: argparse.Namespace) -> dict[str, Any]:
    """A rank killed while the others wait for it: who says what, how soon, and whether a new group starts."""
    split = Partition.even(options.context, options.ranks)
    with group_of(options) as group:
        group.sample(Candidate("kvr", split))
        before = group.sample(Candidate("kvr", split)).ttft_s
        victim = group.pids[options.ranks // 2]
        struck: list[float] = []

        def strike() -> None:
            time.sleep(0.4 * before)
            struck.append(time.monotonic())
            os.kill(victim, signal.SIGKILL)

        # One prefill after another, so that the blow falls into one of them.
        hand = threading.Thread(target=strike)
        hand.start()
        message, ended = "", 0.0
        try:
            while not struck or time.monotonic() < struck[0] + 30:
                group.sample(Candidate("kvr", split))
        except KVRError as error:
            message, ended = str(error), time.monotonic()
        hand.join()
        again = time.monotonic()
        after = [group.sample(Candidate("kvr", split)).ttft_s for _ in range(3)]
        ready = time.monotonic()
    return {
        "split": split.sizes,
        "message": message,
        "told_after_s": ended - struck[0],
        "new_group_after_s": ready - again,
        "ttft_before_s": before,
        "ttft_after_s": after[-1],
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"splits": splits, "soak": soak, "kill": kill}

# ------------------------------------------------------------------------------------------------- running them


def run(step: Step, out: Path, left_s: float) -> dict[str, Any]:
    """Run one step to its end or its limit."""
    began = time.monotonic()
    limit_s = min(step.limit_s, left_s)
    with (out / f"{step.name}.txt").open("w") as text, (out / f"{step.name}.json").open("w") as figures:
        process = subprocess.Popen(
            step.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

        def copy(lines: Any, stamped: bool) -> None:
            for line in lines:
                if stamped:
                    text.write(f"{time.monotonic() - began:8.2f} {line}")
                    text.flush()
                else:
                    figures.write(line)

        is_json = "json" in step.command or "--part" in step.command
        readers = [
            threading.Thread(target=copy, args=(process.stdout, not is_json)),
            threading.Thread(target=copy, args=(process.stderr, True)),
        ]
        for reader in readers:
            reader.start()
        stopped = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            stopped = True
            # As Ctrl-C would, so that whatever was measured is kept.
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        for reader in readers:
            reader.join(5)
    if not (out / f"{step.name}.json").stat().st_size:
        (out / f"{step.name}.json").unlink()
    return {
        "command": " ".join(["python", *step.command[1:]]),
        "seconds": round(time.monotonic() - began, 2),
        "exit_code": process.returncode,
        "stopped_at_limit": stopped,
    }


def keep(out: Path, archive: Path | None) -> None:
    """Put everything into the archive."""
    if archive is None:
        return
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(out, arcname=out.name)
    partial.replace(archive)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps that are asked for, or one part of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--backend", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--contexts", default=CONTEXTS, help="to search")
    parser.add_argument("--context", type=int, default=16384, help="of the parts of this script")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--steps", default="", help="comma-separated; all when not given")
    parser.add_argument("--seconds", type=float, default=540, help="of all steps together")
    parser.add_argument("--out", type=Path, default=Path("whole-gpus"))
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--part", choices=PARTS)
    options = parser.parse_args(arguments)
    if options.part:
        json.dump(PARTS[options.part](options), sys.stdout, indent=1)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    known = options.out / "steps.json"
    told: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    wanted = options.steps.split(",") if options.steps else None
    until = time.monotonic() + options.seconds
    for step in steps(options):
        done = told.get(step.name, {}).get("exit_code") == 0
        left_s = until - time.monotonic()
        if done or (wanted is not None and step.name not in wanted) or left_s < 15:
            continue
        told[step.name] = run(step, options.out, left_s)
        print(f"{step.name}: {told[step.name]}", flush=True)
        known.write_text(json.dumps(told, indent=1) + "\n")
        keep(options.out, options.archive)


if __name__ == "__main__":
    main()
