"""Everything about prefill on several whole GPUs, by the commands that users have.

A step is one command, or one part of this script that needs ranks of its own. What it prints stands in
``<out>/<step>.txt`` with the seconds since it began, the JSON it ends with in ``<out>/<step>.json``, and how it
ended in ``<out>/steps.json``. Steps that ended well are skipped when the script runs again, one that reaches its
limit is stopped and left for the next time, and after each of them everything is in ``<archive>``.

    python -m benchmarks.whole_gpus --ranks 4 --steps doctor,search,compare --out whole --archive whole.tar.gz

What they say together is written by ``python -m benchmarks.whole_gpus_figures``.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import optuna
from msgspec.structs import replace

from benchmarks.prefill import certified, compare, uneven
from kvr_partition.cli.options import model_folder, parse_bytes, parse_rate
from kvr_partition.errors import KVRError
from kvr_partition.loading import load_table
from kvr_partition.machine.cost import LinkCost
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import median
from kvr_partition.partition import Partition
from profiler import Candidate, MeasurementLog, RankGroup, SamplingPlan, Session
from profiler.calibrate import machine_of_log

CONTEXTS = "4096,16384,65536,131072"
COMPARED = "4096,16384,32768,65536"
"""One of them was not searched, so that KVR-P has something to predict."""
OTHERS = ("llama-7b", "llama-3.1-8b")
SHORT = (1024, 2048)
RIVALS = {16384: 12, 65536: 4}
"""Contexts, and how often each method has its turn."""
VERIFIED = 4096
HELD = "10GB/s"
BACKGROUND = "16MB"
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

    def command(name: str, limit_s: float, *words: str, of: str = model) -> Step:
        return Step(name, [*ours, words[0], "--model", of, *ranks, *words[1:]], limit_s)

    def compared(name: str, limit_s: float, contexts: str, methods: str) -> Step:
        files = ["--table", f"{out}/search/table.json", "--log", f"{out}/{name}.jsonl", "--format", "json"]
        asked = ["--no-verify", "--samples", str(options.samples), "--methods", methods]
        return command(name, limit_s, "compare", "--context", contexts, *asked, *files)

    def verify(name: str, of: str, links: str, methods: str) -> Step:
        asked = ["--context", str(VERIFIED), "--partition", str(uneven(VERIFIED, options.ranks))]
        return command(
            name, 90, "verify", *asked, "--methods", methods, "--links", links, "--format", "json", of=of
        )

    most = "stock,single,tsp-causal,zigzag,kvr-e,kvr-s,kvr-p,other,bound"
    both = "kvr-chain,kvr-fanout"
    this = [
        "--model", model, "--out", str(out), "--context", str(options.context), *ranks,
        "--samples", str(options.samples), "--prompts", str(options.prompts),
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks), "-m"]
    return [
        Step("doctor", [*ours, "doctor", "--format", "json"], 120),
        command("search", 420, "search", "--contexts", options.contexts, "--out", f"{out}/search"),
        compared("compare", 200, options.compared, f"{most},tsp,tp"),
        compared("compare-131072", 180, "131072", most),
        Step("together", [sys.executable, "-m", "benchmarks.whole_gpus", "--part", *this], 300),
        verify("verify-nccl", model, "nccl", both),
        *(verify(f"verify-{of}", of, "peer", both) for of in OTHERS if of != model),
        *(verify(f"verify-{of}-nccl", of, "nccl", both) for of in OTHERS if of != model),
        Step(
            "context-parallel",
            [
                *torchrun, "benchmarks.context_parallel", "--model", model, "--contexts", "4096,16384", "--dtype",
                options.dtype, "--samples", str(options.samples), "--out", f"{out}/context-parallel.json",
            ],
            180,
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ parts with their own ranks


@dataclass
class Parts:
    """What needs ranks of its own, one part after another on the same ones.

    Attributes:
        options: of this script.
        group: the ranks, as the commands have them.
        log: of everything that is timed.
    """

    options: argparse.Namespace
    group: RankGroup
    log: MeasurementLog

    @property
    def plan(self) -> SamplingPlan:
        """Of what is compared."""
        return SamplingPlan(1, min(6, self.options.samples), self.options.samples, 0.01)

    def verify(self) -> dict[str, Any]:
        """Every method that runs here against one rank."""
        return certified(self.group, VERIFIED, set())

    def rivals(self) -> dict[str, Any]:
        """The split that won once more, among those that it is held against, and over a chain as well."""
        figures = {}
        for context, turns in RIVALS.items():
            found = self._found(context)
            named = [
                *self._beside(context, found),
                ("KVR-S, chain", Candidate("kvr-chain", found)),
                ("TTFT(p) of KVR-S", Candidate("bound", found)),
            ]
            plan = SamplingPlan(1, turns, turns)
            figures[str(context)] = compare(self.group, named, plan, f"rivals/{context}", 0)
        return figures

    def short(self) -> dict[str, Any]:
        """Where splitting begins to pay: a search, then all methods side by side."""
        session = Session(self.group, self.log, SHORT)
        session.run()
        figures = {}
        for context in SHORT:
            found = session.table.lookup(context).partition
            named = [
                *self._beside(context, found),
                ("TSP causal", Candidate.even("tsp-causal", context, self.group.ranks)),
                ("KVR-E", Candidate("kvr", Partition.even(context, self.group.ranks))),
                ("TTFT(p) of KVR-S", Candidate("bound", found)),
            ]
            figures[str(context)] = compare(self.group, named, self.plan, f"short/{context}", 0)
        return figures

    def _beside(self, context: int, found: Partition) -> list[tuple[str, Candidate]]:
        return [
            ("stock", Candidate.stock(context)),
            ("single", Candidate.single(context)),
            ("zigzag", Candidate.even("zigzag", context, self.group.ranks)),
            ("KVR-S", Candidate("kvr", found)),
        ]

    def splits(self) -> dict[str, Any]:
        """Splits that no search proposed, beside what it found; a schedule can be held against them."""
        draw, context = random.Random(1), self.options.context
        best = self._found(context)
        shares = [[size * draw.uniform(0.75, 1.25) for size in best.sizes] for _ in range(8)]
        drawn = [Partition.from_fractions(share, context, quantum=128) for share in shares]
        candidates = [Candidate("kvr", one) for one in [best, *drawn]]
        found = self.group.measure_many(candidates, plan=SamplingPlan(1, 5, 5), purpose=f"splits/{context}")
        return {"context": context, "splits": [{"sizes": one.sizes, "ttft_s": one.ttft_s} for one in found]}

    def _found(self, context: int) -> Partition:
        table = load_table(self.options.out / "search" / "table.json")
        return table.lookup(context, ranks=self.options.ranks).partition

    def held(self) -> dict[str, Any]:
        """Links held to a bandwidth, and disturbed at that: splits solved for such links."""
        context, group = self.options.context, self.group
        with MeasurementLog(self.options.out / "search" / "measurements.jsonl") as log:
            machine = machine_of_log(log, next(iter(log.provenance.values())))
        bandwidth = parse_rate(HELD)
        solved = {
            topology: best_split(
                context, group.ranks, replace(machine, link=LinkCost.of(bandwidth), topology=topology), 128
            )
            for topology in ("chain", "fanout")
        }
        group.hold_links(bandwidth)
        try:
            named = [
                ("TSP causal", Candidate.even("tsp-causal", context, group.ranks)),
                ("zigzag", Candidate.even("zigzag", context, group.ranks)),
                ("KVR-E", Candidate("kvr-fanout", Partition.even(context, group.ranks))),
                ("KVR-S of free links", Candidate("kvr-fanout", self._found(context))),
                ("KVR solved, chain", Candidate("kvr-chain", solved["chain"])),
                ("KVR solved, fan-out", Candidate("kvr-fanout", solved["fanout"])),
                ("TTFT(p) of solved", Candidate("bound", solved["fanout"])),
            ]
            background = int(parse_bytes(BACKGROUND, "background traffic"))
            return {"bandwidth": HELD, "noise": BACKGROUND, **compare(group, named, self.plan, "held", background)}
        finally:
            group.hold_links(None)

    def soak(self) -> dict[str, Any]:
        """Prompts of mixed lengths in a row: what memory, and a prompt of always the same length, do meanwhile."""
        draw, ranks, context = random.Random(2), self.options.ranks, self.options.context // 2
        fixed = Candidate("kvr", Partition.even(context // 2, ranks))
        told = []
        self.group.plan_ahead(context)
        for turn in range(self.options.prompts):
            tokens = draw.randrange(ranks * 16, context)
            cuts = Partition.from_fractions([draw.uniform(0.5, 1.5) for _ in range(ranks)], tokens)
            self.group.sample(Candidate("kvr", cuts), cold=True)
            if turn % 10 == 9:
                samples = [self.group.sample(fixed).ttft_s for _ in range(3)]
                told.append({"prompts": turn + 1, "fixed_ttft_s": median(samples), **_memory(self.group)})
        return {"fixed": fixed.partition.sizes, "prompts": self.options.prompts, "every_10": told}

    def kill(self) -> dict[str, Any]:
        """A rank killed while the others wait for it: who says what, how soon, and whether a new group starts."""
        group, split = self.group, Partition.even(self.options.context, self.options.ranks)
        group.sample(Candidate("kvr", split))
        before = group.sample(Candidate("kvr", split)).ttft_s
        victim = group.pids[self.options.ranks // 2]
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
        if not message:
            raise SystemExit("a rank was killed, and nobody said so")
        again = time.monotonic()
        after = [group.sample(Candidate("kvr", split)).ttft_s for _ in range(3)]
        return {
            "split": split.sizes,
            "message": message,
            "told_after_s": ended - struck[0],
            "new_group_after_s": time.monotonic() - again,
            "ttft_before_s": before,
            "ttft_after_s": after[-1],
        }


PARTS = ("verify", "soak", "rivals", "held", "short", "splits", "kill")


def together(options: argparse.Namespace) -> None:
    """All parts; those whose files are there are not run again."""
    left = [part for part in PARTS if not (options.out / f"{part}.json").exists()]
    with (
        MeasurementLog(options.out / "together.jsonl") as log,
        RankGroup(
            model_folder(options.model), options.ranks, backend=options.backend, dtype=options.dtype, log=log,
            timeout_s=60,
        ) as group,
    ):  # fmt: skip
        parts = Parts(options, group, log)
        for part in left:
            print(part, flush=True)
            found = {"provenance": msgspec.to_builtins(group.provenance), "figures": getattr(parts, part)()}
            (options.out / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")


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

        is_json = "json" in step.command
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
                process.wait()
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
    parser.add_argument("--compared", default=COMPARED, help="contexts to compare methods on")
    parser.add_argument("--part", action="store_true", help="run what needs ranks of its own")
    options = parser.parse_args(arguments)
    if options.part:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        together(options)
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
