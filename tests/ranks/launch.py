"""Start a test module as real ranks and wait for them."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

import torch

from tests.forked import Forked


def rank_device(kind: str, rank: int) -> torch.device:
    """The device of a rank: the CPU, a GPU of its own ("cuda"), or one that it may share ("shared")."""
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", rank if kind == "cuda" else rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def started(module: str, folder: Path, ranks: int) -> list[Forked]:
    """``python -m module FOLDER RANK RANKS`` for each rank; what one prints goes to ``FOLDER/printed<rank>``."""
    return [
        Forked(module, [str(folder), str(rank), str(ranks)], output=folder / f"printed{rank}")
        for rank in range(ranks)
    ]


def launch(module: str, folder: Path, ranks: int, timeout_s: float = 240) -> None:
    """Run a module on ranks to its end; fails with what the first bad one printed."""
    processes = started(module, folder, ranks)
    until = time.monotonic() + timeout_s
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        bad = [
            f"rank {rank} ended with {process.returncode}:\n{(folder / f'printed{rank}').read_text()}"
            for rank, process in enumerate(processes)
            if process.returncode != 0
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # The first to fail takes the others down by closing its connections; those say little.
    bad.sort(key=lambda text: "Connection closed" in text)
    assert not bad, bad[0]
