"""All-gather of KV rows, in place, under the same limits as links."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from kvr_partition.runtime.links.plan import NO_LIMITS, LinkLimits

Runs = list[tuple[int, int]]
"""Runs of rows ``(start, end)`` that one rank has computed."""


class Gather(Protocol):
    """Brings every rank the rows of all others."""

    rank: int
    ranks: int
    sent_bytes: int
    """Bytes of KV this rank put on the wire: its rows once for each other rank."""

    def gather(self, layer: int, rows: torch.Tensor, owned: Sequence[Runs]) -> None:
        """Fill in what others own.

        Args:
            layer: counts the layers that keep KV.
            rows: ``[tokens, entry]``, the same layout on all ranks; this rank's own runs are filled.
            owned: the runs of each rank, equally many for all.
        """


class GroupGather:
    """All-gather over a process group, or a backend of one.

    A bandwidth limit is that of a ring: every link carries the rows of all ranks but one, so the slowest
    link, the one with background traffic, holds all ranks up.
    """

    def __init__(self, group: Any, limits: LinkLimits = NO_LIMITS) -> None:
        self.rank = group.rank()
        self.ranks = group.size()
        self.sent_bytes = 0
        self._group = group
        self._limits = limits

    def gather(self, layer: int, rows: torch.Tensor, owned: Sequence[Runs]) -> None:
        entry = rows.stride(0) * rows.element_size()
        tokens = [sum(end - start for start, end in runs) for runs in owned]
        self.sent_bytes += tokens[self.rank] * entry * (self.ranks - 1)
        noisy = self._limits.noisy_link(layer, self.ranks)
        background = [] if noisy is None else self._background(layer, noisy, rows.device)
        # The link to the next rank carries everyone's rows but the next rank's own.
        carried = (sum(tokens) - tokens[(self.rank + 1) % self.ranks]) * entry
        self._hold(carried + (0 if noisy is None else self._limits.noise), rows.device)
        for runs in zip(*owned, strict=True):
            self._gather_runs(rows, list(runs))
        for work in background:
            work.wait()

    def _gather_runs(self, rows: torch.Tensor, runs: Runs) -> None:
        """Everyone's n-th run: one collective where they are equal and side by side, else broadcasts."""
        sizes = {end - start for start, end in runs}
        if len(sizes) == 1 and all(before[1] == after[0] for before, after in itertools.pairwise(runs)):
            start, end = runs[self.rank]
            self._group._allgather_base(rows[runs[0][0] : runs[-1][1]], rows[start:end]).wait()
            return
        # A collective wants equal parts. One broadcast from each rank moves the same bytes without padding
        # them to the longest run.
        for source, (start, end) in enumerate(runs):
            options = dist.BroadcastOptions()
            options.rootRank = source
            self._group.broadcast([rows[start:end]], options).wait()

    def _hold(self, nbytes: int, device: torch.device) -> None:
        seconds = self._limits.throttled_s(nbytes)
        if seconds and device.type == "cuda":
            from kvr_partition.runtime.triton_kernels import hold

            hold(seconds)
        elif seconds:
            time.sleep(seconds)

    def _background(self, layer: int, link: int, device: torch.device) -> list[dist.Work]:
        if self.rank not in (link, link + 1):
            return []
        message = torch.zeros(self._limits.noise, dtype=torch.uint8, device=device)
        if self.rank == link:
            return [self._group.send([message], link + 1, layer)]
        return [self._group.recv([message], link, layer)]
