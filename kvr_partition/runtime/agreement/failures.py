"""Errors of a rank as all ranks are told of them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from kvr_partition.errors import KVRError, NotFiniteError, RankError


def one_line(error: BaseException) -> str:
    """The first line of an error's message, without what gloo adds for its own developers."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line.split(". This is typically caused by")[0]
    return line.split("] ", 1)[1] if line.startswith("[/") and "] " in line else line


def is_link_error(error: BaseException) -> bool:
    """Whether this is an error that torch.distributed raises when a peer died or was late."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def as_rank_error(error: BaseException, rank: int | None, phase: str) -> RankError:
    """An error of a rank as all ranks are told of it."""
    if isinstance(error, RankError):
        return error
    if isinstance(error, NotFiniteError):
        return RankError(str(error), rank=error.rank, kind="not-finite", phase=phase)
    text = one_line(error)
    who = "a rank" if rank is None else f"rank {rank}"
    where = f" in {phase}" if phase else ""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RankError(f"{who} ran out of memory{where}: {text}", rank=rank, kind="out-of-memory", phase=phase)
    said = text if isinstance(error, KVRError) else f"{type(error).__name__}: {text}"
    return RankError(f"{who} failed{where}: {said}", rank=rank, kind="error", phase=phase)
