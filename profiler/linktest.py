"""Every link of a machine, tried: its kind, its speed alone and with others, and whether one holds up another.

``python -m profiler.linktest FOLDER RANK RANKS DEVICE`` is one rank; `try_links` starts them and reads what they
found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from kvr_partition.errors import KVRError, RankError
from kvr_partition.measurement import median

SMALL, LARGE, LARGE_ON_HOST = 64, 64 << 20, 8 << 20
"""Bytes of the messages that tell latency and bandwidth."""

REPEATS = 8
HELD_S = 3.0
"""Seconds for which a link is held unless the message that ought not to wait for it arrives sooner."""

LINKS_TIMEOUT_S = 120.0


def try_links(gpus: int) -> dict[str, Any]:
    """Try the links between all GPUs of this machine, or between three ranks of its CPU where there are no two.

    Returns:
        ``pairs``: for each two ranks that have a device of their own ``from``, ``to``, ``kind``, ``mapped``,
        ``latency_s``, ``bandwidth`` and, of all pairs at once, ``bandwidth_together`` in bytes per second; and
        ``held``: for each link behind another whether it ``moves`` while that one is held.

    Raises:
        RankError: a rank failed; its words are in the message.
    """
    if gpus < 2:
        return tried(["cpu"] * 3, 3)
    # Whether a link holds up the next one shows with three ranks; peer links let two of them share a GPU.
    devices = [f"cuda:{rank}" for rank in range(gpus)]
    try:
        return tried([*devices, *["cuda:0"] * (3 - gpus)], gpus)
    except RankError:
        if gpus > 2:
            raise
        return tried(devices, gpus)


def _cause(printed: str) -> str:
    """Of a traceback the line that names the error; torch and NCCL may have printed more behind it."""
    lines = printed.strip().splitlines() or ["it said nothing"]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (raised or lines)[-1]


def tried(devices: list[str], own: int) -> dict[str, Any]:
    """The same for given devices, of which the first ``own`` are those that links are told of; see `try_links`."""
    with tempfile.TemporaryDirectory(prefix="kvr-links-") as folder:
        environment = dict(os.environ)
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        outputs = [(Path(folder) / f"printed{rank}").open("wb") for rank in range(len(devices))]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "profiler.linktest", folder, str(rank), str(len(devices)), device],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for rank, (device, output) in enumerate(zip(devices, outputs, strict=True))
        ]
        until = time.monotonic() + LINKS_TIMEOUT_S
        try:
            for process in processes:
                process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for output in outputs:
                output.close()
        found = []
        for rank in range(len(devices)):
            path = Path(folder) / f"found{rank}.json"
            if not path.exists():
                printed = (Path(folder) / f"printed{rank}").read_text(errors="replace")
                raise RankError(f"rank {rank} could not try its links: {_cause(printed)}")
            found.append(json.loads(path.read_text()))
    for reply in found:
        if "error" in reply:
            raise RankError(reply["error"])
    pairs = [pair for each in found for pair in each["pairs"] if max(pair["from"], pair["to"]) < own]
    return {
        "pairs": sorted(pairs, key=lambda pair: (pair["from"], pair["to"])),
        "held": [one for each in found for one in each["held"]],
    }


def _rank(folder: Path, rank: int, ranks: int, name: str) -> dict[str, Any]:
    """What one rank finds out."""
    import torch
    import torch.distributed as dist

    from kvr_partition.runtime.agreement import agreement_of
    from kvr_partition.runtime.links.group import links_of

    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meet").as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=LINKS_TIMEOUT_S / 2),
    )
    setup = links_of(None, device)
    agreement = agreement_of(None)
    pairs = [(low, high) for low in range(ranks) for high in range(low + 1, ranks)]
    pairs_found = {
        (low, high): {
            "from": low,
            "to": high,
            "kind": setup.kinds[low, high].name,
            "mapped": setup.kinds[low, high].maps,
        }
        for low, high in pairs
        if low == rank
    }
    for pair in pairs:
        for nbytes in (SMALL, LARGE if device.type == "cuda" else LARGE_ON_HOST):
            for times in _timed(agreement, device, [pair], nbytes).values():
                took = median(times[len(times) // 2 :])
                pairs_found[pair].update({"latency_s": took} if nbytes == SMALL else {"bandwidth": nbytes / took})
    large = LARGE if device.type == "cuda" else LARGE_ON_HOST
    for pair, times in _timed(agreement, device, pairs, large).items():
        pairs_found[pair]["bandwidth_together"] = large * len(times) / sum(times)
    held = [one for middle in range(1, ranks - 1) if (one := _held(agreement, device, middle, folder)) is not None]
    agreement.barrier()
    return {"pairs": list(pairs_found.values()), "held": held}


def _timed(
    agreement: Any, device: Any, pairs: list[tuple[int, int]], nbytes: int
) -> dict[tuple[int, int], list[float]]:
    """Seconds of messages from this rank, over all pairs at once."""
    if device.type == "cuda":
        from kvr_partition.runtime.links.probe import time_pairs

        return time_pairs(agreement, device, pairs, nbytes, REPEATS)
    import torch

    rank = agreement.rank
    group = agreement.links(device, ())
    agreement.barrier()
    message, answer = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    found: dict[tuple[int, int], list[float]] = {}
    for _ in range(REPEATS):
        for low, high in pairs:
            if high == rank:
                group.recv([message], low, 0).wait()
                group.send([answer], low, 1).wait()
            elif low == rank:
                began = time.perf_counter()
                group.send([message], high, 0).wait()
                group.recv([answer], high, 1).wait()
                found.setdefault((low, high), []).append(time.perf_counter() - began)
    agreement.barrier()
    return found


def _held(agreement: Any, device: Any, middle: int, folder: Path) -> dict[str, Any] | None:
    """Whether the link behind ``middle`` carries what ``middle`` has while the one before it stands still."""
    import torch

    from kvr_partition.partition import Partition
    from kvr_partition.runtime.links.group import link_setup
    from kvr_partition.runtime.links.plan import NO_LIMITS, Slot

    rank, ranks = agreement.rank, agreement.ranks
    arrived = folder / f"arrived{middle}"
    moves = None
    with agreement.turn() as turn:
        turn.open = True
        setup = link_setup(turn, device)
        setup.connect(turn, device, "chain")
        execution = setup.execution
        rows = execution.empty((ranks, 1024), dtype=torch.int32, device=device).zero_()
        aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A kernel that is run for the first time may wait for all that is under way.
        _has(rows[0], 0, aside)
        links = setup.row_links(
            Partition((1,) * ranks), [Slot(rows[: rank + 1], 0, None)], device, turn, "chain", NO_LIMITS
        )
        turn.exchange(b"")
        links.start([Slot(rows[: rank + 1], 0, None)])
        rows[rank].fill_(rank + 1)
        until = time.monotonic() + HELD_S
        if rank == middle - 1:
            while not arrived.exists() and time.monotonic() < until:
                time.sleep(0.001)
        links.kv_ready(0)
        if rank == middle + 1:
            moves = False
            while not moves and time.monotonic() < until:
                moves = _has(rows[middle], middle + 1, aside)
            arrived.touch()
        if rank:
            links.wait_prefix(0)
        links.finish()
        if device.type == "cuda":
            torch.cuda.synchronize()
        turn.exchange(b"")
    if moves is None:
        return None
    return {"link": f"{middle}→{middle + 1}", "while": f"{middle - 1}→{middle}", "moves": moves}


def _has(row: Any, value: int, aside: Any) -> bool:
    """Whether a row has come, looked at beside what the device is waiting for."""
    import torch

    if aside is None:
        return bool((row == value).all())
    with torch.cuda.stream(aside):
        return bool((row == value).all())


def main() -> None:
    """One rank."""
    folder, rank, ranks, device = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    try:
        found = _rank(folder, rank, ranks, device)
    except KVRError as error:
        found = {"error": str(error)}
    path = folder / f"found{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").rename(path)
    os._exit(0)  # where a rank is missing there is nobody to say goodbye to


if __name__ == "__main__":
    main()
