"""Everything this project measures on GPUs, as much of it as there is time for; goes on where it stopped.

    python benchmarks/gpu.py --hardware h100-sxm --minutes 9 --archive results.tgz

A part is one of the other benchmarks with its arguments, and done when its file stands in ``data/<hardware>/``.
Parts that need several GPUs run first, one after the other; of the rest every GPU takes the next one that there is
time for. What a part prints goes to a log. ``--archive`` keeps all new files in one archive that is rewritten
after every part, for machines that may be taken away at any moment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

START_S = 15
"""Seconds in which no part can be worth starting."""


@dataclass(frozen=True)
class Part:
    """One benchmark.

    Attributes:
        file: what it writes, below ``data/<hardware>/``; its folder is the model's.
        script, arguments: of the command; ``--out`` is added.
        seconds: about how long it takes on one H100.
        gpus: how many it needs.
        folder_out: whether ``--out`` is the folder, not the file.
    """

    file: str
    script: str
    arguments: str
    seconds: int
    gpus: int = 1
    folder_out: bool = False

    def command(self, folder: Path) -> list[str]:
        """The command line, in the root of the checkout."""
        out = (folder / self.file).parent if self.folder_out else folder / self.file
        return [sys.executable, f"benchmarks/{self.script}", *self.arguments.split(), "--out", str(out)]


def prefill(model: str, ranks: int, seconds: int, more: str = "", context: int = 16384) -> Part:
    """Every method on SM partitions."""
    named, asked = ("", "") if context == 16384 else (f"-{context}", f"--context {context} ")
    return Part(
        f"{model}/sm-{ranks}-ranks{named}.json",
        "prefill.py",
        f"--model {model} --ranks {ranks} --one-rank= --samples 6 --budget 4 {asked}{more}",
        seconds,
        folder_out=True,
    )


def predicted(model: str, ranks: int, seconds: int, held_out: str = "6144,12288", more: str = "") -> Part:
    """KVR-P against KVR-S on contexts left out, and the predictor that comes with the model."""
    return Part(
        f"{model}/profiled-sm-{ranks}.json",
        "predict_real.py",
        f"--model {model} --ranks {ranks} --contexts 4096,8192,16384 --held-out {held_out} --final 11 {more}",
        seconds,
    )


HELD = "--bandwidth 10GB/s --noise 16MB"

PARTS = (
    Part(
        "llama-7b/cuda-2-ranks.json", "prefill.py",
        "--model llama-7b --backend cuda --ranks 2 --one-rank= --samples 6 --budget 4 --skip tp",
        90, gpus=2, folder_out=True,
    ),
    Part("llama-7b/cold.json", "prefill.py", "--model llama-7b --cold --ranks= --one-rank=", 80, folder_out=True),
    predicted("llama-7b", 4, 240),
    Part(
        "llama-7b/simulated-sm-2.json", "simulated.py",
        "--model llama-7b --backend sm --dtype float16 --context 8192 --steps 11 --samples 5 --budget 4", 120,
    ),
    prefill("falcon-7b", 8, 200),
    prefill("llama-3.1-8b", 8, 170),
    prefill("falcon-7b", 4, 150),
    prefill("llama-3.1-8b", 4, 120),
    prefill("falcon-7b", 2, 100),
    prefill("llama-3.1-8b", 2, 80),
    # What stock Falcon keeps of its attention leaves room for one rank and for TSP at no more than this.
    *(prefill("falcon-7b", ranks, 60, context=4096) for ranks in (8, 4, 2)),
    Part("llama-7b/sm-products.json", "sm_products.py", "--ranks 4,8", 90),
    predicted("llama-3.1-8b", 4, 260),
    predicted("falcon-7b", 4, 250),
    predicted("llama-7b", 2, 200),
    predicted("llama-7b", 8, 430, held_out="12288,10240", more="--budget 5"),
    Part("llama-7b/one-rank.json", "prefill.py", "--model llama-7b --ranks= --one-rank 4096,16384,32768", 60,
         folder_out=True),
    Part("falcon-7b/one-rank.json", "prefill.py", "--model falcon-7b --ranks= --one-rank 4096,16384", 30,
         folder_out=True),
    prefill("llama-7b", 8, 330, f"{HELD} --budget 8"),
    prefill("llama-7b", 4, 260, HELD),
    prefill("llama-7b", 2, 170, HELD),
)  # fmt: skip


class Queue:
    """Parts that are still to be run, handed out while there is time."""

    def __init__(
        self, folder: Path, logs: Path, parts: Sequence[Part], until: float, archive: Path | None
    ) -> None:
        self._folder = folder
        self._logs = logs
        self._parts = list(parts)
        self._until = until
        self._archive = archive
        self._began = time.time()
        self._lock = threading.Lock()

    def work(self, gpus: Sequence[str], several: bool) -> None:
        """Run, on these GPUs, parts that need several or one, until none is left that there is time for."""
        while True:
            with self._lock:
                left = self._until - time.monotonic()
                part = next(
                    (one for one in self._parts if (one.gpus > 1) == several and one.seconds + START_S <= left),
                    None,
                )
                if part is None:
                    return
                self._parts.remove(part)
            self._run(part, gpus[: part.gpus])

    def test(self, gpus: Sequence[str], arguments: str) -> None:
        """Run the tests that need a GPU."""
        command = [sys.executable, "-m", "pytest", "tests/gpu", "tests/unit/test_attention.py", *arguments.split()]
        self._call("tests", command, gpus)

    def _run(self, part: Part, gpus: Sequence[str]) -> None:
        self._call(part.file, part.command(self._folder), gpus)

    def _call(self, name: str, command: Sequence[str], gpus: Sequence[str]) -> None:
        log = self._logs / f"{name.replace('/', '-').removesuffix('.json')}.log"
        began = time.monotonic()
        with log.open("wb") as output:
            try:
                code: int | str = subprocess.run(
                    command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONUNBUFFERED": "1",
                         "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
                    timeout=max(1.0, self._until - time.monotonic()),
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = "out of time"
        took = time.monotonic() - began
        with self._lock:
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            print(f"{name}: {'done' if code == 0 else code} in {took:.0f} s; {last[:200]}", flush=True)
            self._keep()

    def _keep(self) -> None:
        """Everything that is new since the start, in an archive that is never half there."""
        if self._archive is None:
            return
        fresh = [
            one for one in (ROOT / self._folder).rglob("*") if one.is_file() and one.stat().st_mtime >= self._began
        ]
        whole = self._archive.with_name(f".{self._archive.name}")
        with tarfile.open(whole, mode="w:gz") as archive:
            for file in fresh:
                archive.add(file, str(file.relative_to(ROOT)))
            for file in self._logs.iterdir():
                archive.add(file, f"logs/{file.name}")
        whole.replace(self._archive)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="folder of data/ that the files are for")
    parser.add_argument("--minutes", type=float, default=1e6, help="nothing runs longer")
    parser.add_argument("--only", default="", help="parts whose file has one of these words in its name, in order")
    parser.add_argument("--again", default="", help="the same, measured again though their file is there")
    parser.add_argument("--archive", type=Path, help="keep new files here, after every part")
    parser.add_argument("--tests", metavar="ARGUMENTS", help="run the tests first, with such arguments of pytest")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    options = parser.parse_args()
    folder = Path("data") / options.hardware
    chosen = _named(options.only) if options.only else list(PARTS)
    again = _named(options.again)
    parts = [*again, *(one for one in chosen if one not in again and not (ROOT / folder / one.file).exists())]
    if options.list:
        for part in parts:
            print(f"{part.seconds:4} s  {part.gpus} GPU  {' '.join(part.command(folder)[1:])}")
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = [one for one in visible.split(",") if one]
    if not gpus:
        parser.error("no GPU here")
    for part in again:
        for old in (ROOT / folder / part.file).parent.glob(f"{Path(part.file).stem}.json*"):
            old.unlink()
    logs = Path(tempfile.mkdtemp(prefix="kvr-logs-"))
    queue = Queue(folder, logs, [one for one in parts if one.gpus <= len(gpus)],
                  time.monotonic() + options.minutes * 60, options.archive)  # fmt: skip
    print(f"{len(parts)} parts on GPUs {', '.join(gpus)}; logs in {logs}", flush=True)
    if options.tests is not None:
        queue.test(gpus, options.tests)
    queue.work(gpus, several=True)
    with ThreadPoolExecutor(len(gpus)) as pool:
        for done in [pool.submit(queue.work, [gpu], False) for gpu in gpus]:
            done.result()


def _named(words: str) -> list[Part]:
    return [part for word in words.split(",") if word for part in PARTS if word in part.file]


if __name__ == "__main__":
    main()
