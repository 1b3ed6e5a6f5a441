"""Start a test module as real ranks and wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def ranks_environment() -> dict[str, str]:
    """One thread a rank, over loopback, with this checkout importable from any script."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
    }


def rank_device(kind: str, rank: int) -> torch.device:
    """The device of a rank: the CPU, a GPU of its own ("cuda"), or one that it may share ("shared")."""
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", rank if kind == "cuda" else rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def launch(module: str, folder: Path, ranks: int, timeout_s: float = 240) -> None:
    """Run ``python -m module FOLDER RANK RANKS`` once per rank; fails with what the first bad one printed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder), str(rank), str(ranks)],
            cwd=ROOT,
            env=ranks_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    bad = [text for process, text in zip(processes, printed, strict=True) if process.returncode]
    # The first to fail takes the others down by closing its connections; those say little.
    bad.sort(key=lambda text: "Connection closed" in text)
    assert not bad, bad[0]
