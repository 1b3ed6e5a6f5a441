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


def launch(module: str, folder: Path, ranks: int, timeout_s: float = 240, missing: int | None = None) -> None:
    """Run a module on ranks to its end; fails with what each rank printed, those that failed first.

    Args:
        timeout_s: for all ranks together; one that has not ended by then failed.
        missing: a rank that does not live to tell; it is ended once all others have told.
    """
    processes = started(module, folder, ranks)
    until = time.monotonic() + timeout_s
    try:
        for rank, process in enumerate(processes):
            if rank != missing:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        ended = [process.returncode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if all(code == 0 for rank, code in enumerate(ended) if rank != missing):
        return
    printed = [(folder / f"printed{rank}").read_text()[-3000:] for rank in range(ranks)]
    # The first to fail takes the others down by closing its connections; those say little.
    first = sorted(range(ranks), key=lambda rank: (ended[rank] == 0, "Connection closed" in printed[rank]))
    raise AssertionError("\n".join(f"rank {rank} ended with {ended[rank]}:\n{printed[rank]}" for rank in first))
