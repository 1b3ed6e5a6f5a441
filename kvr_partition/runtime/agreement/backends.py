"""What carries messages of a group beside those of the program: backends of its own, which can be given up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kvr_partition.errors import RankError
from kvr_partition.runtime.channel import Channel

_NEVER = 2**31 - 1
"""Tag of a message that is never sent."""

DEFAULT_TIMEOUT_S = 1800.0
"""Where the process group does not tell its own."""

LINK_CTAS = 4
"""Blocks of threads that NCCL may keep for a link; each takes an SM from compute, even while it waits."""


class Backends:
    """The backends of one process group on one rank, made when they are asked for.

    Args:
        rank, ranks: this rank, of how many.
        channel: over which their addresses are told; None where ranks do not agree, who use the group itself.
        group: the process group, if it is still there.
        explain: what tells who is to blame for an error in making one, if it is still there.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        channel: Channel | None,
        group: Callable[[], Any],
        explain: Callable[[], Callable[[int | None, BaseException, str], RankError] | None],
    ) -> None:
        self._rank, self._ranks, self._channel, self._group = rank, ranks, channel, group
        self._explain = explain
        self._made: dict[tuple[str, bool], Any] = {}
        self._connected: set[tuple[int, int]] = set()
        self._renewals = 0

    def links(self, device: torch.device, peers: Sequence[int]) -> Any:
        """What carries the KV of this group's prefills: has ``send`` and ``recv`` of a process group.

        It is a backend of its own, so that nobody else's messages are taken for KV, and so that it can be given
        up when a prefill fails. A group of NCCL that was made for one device (``device_id=``) has one communicator
        and one stream, on which messages to one rank stand behind those from another. This one has a communicator
        for each pair, whatever the group is.

        Args:
            peers: ranks that it connects; all ranks of each pair call this.
        """
        links = self._backend(device.type, limited=True)
        if device.type == "cuda":
            self._connect(links, device, peers)
        return links

    def collectives(self, device: torch.device) -> Any:
        """What gathers KV: has the collectives of a process group.

        On CUDA it is the group itself until that is renewed: NCCL's communicators take memory.
        """
        return self._backend(device.type, limited=False)

    def _backend(self, device_type: str, limited: bool) -> Any:
        kind = (device_type, limited)
        if kind not in self._made:
            own = self._channel is not None and (limited or device_type != "cuda")
            self._made[kind] = self._new(*kind) if own else self._group()
        return self._made[kind]

    def _connect(self, links: Any, device: torch.device, peers: Sequence[int]) -> None:
        """Have NCCL connect pairs of ranks now, while all are in step.

        It does so with the first message of a pair, and holds up the host until both ranks are there: for ever, if
        one of them has failed by then.
        """
        for low, high in sorted((min(self._rank, peer), max(self._rank, peer)) for peer in peers):
            if (low, high) in self._connected:
                continue
            token = torch.zeros(1, device=device)
            if self._rank == low:
                links.send([token], high, 0).wait()
            else:
                links.recv([token], low, 0).wait()
            self._connected.add((low, high))

    def _new(self, device_type: str, limited: bool) -> Any:
        assert self._channel is not None
        # dist.new_group names groups by how many there are, which ranks of several groups count differently.
        name = f"{'links' if limited else 'collectives'} on {device_type}, renewed {self._renewals} times"
        store = dist.PrefixStore(name, self._channel.store)  # type: ignore[attr-defined]
        timeout = timedelta(seconds=self._channel.timeout_s)
        try:
            if device_type != "cuda":
                return dist.ProcessGroupGloo(store, self._rank, self._ranks, timeout)
            options = dist.ProcessGroupNCCL.Options()
            # Torch ends the process at its time-out; by then this rank has told who it waited for.
            options._timeout = 2 * timeout + timedelta(seconds=10)
            if limited:
                options.config.max_ctas = LINK_CTAS
            return dist.ProcessGroupNCCL(store, self._rank, self._ranks, options)
        except RuntimeError as error:
            explain = self._explain()
            if explain is None:
                raise
            raise explain(None, error, "start") from error

    def abort(self) -> None:
        """Let go of links after a failure, of threads and kernels that still wait for a message on them.

        The group itself stays as it is: it belongs to the program.
        """
        for (device_type, _), links in self._made.items():
            if links is self._group():
                continue
            if device_type != "cuda":
                # A message that nobody sends, waited for no time at all, makes gloo close all connections.
                with contextlib.suppress(RuntimeError):
                    links.recv([torch.empty(1)], (self._rank + 1) % self._ranks, _NEVER).wait(
                        timedelta(milliseconds=1)
                    )
                continue
            with contextlib.suppress(RuntimeError, AttributeError):
                # Its peers may be gone, which is why it goes. Backends of older torch cannot be aborted: there
                # those threads wait until their time-out.
                links.abort()

    def renew(self, renewals: int) -> None:
        """Make those that there were anew, once all ranks have agreed to; old messages arrive on none of them.

        Args:
            renewals: how often the group was renewed, this time included.
        """
        old, self._made = list(self._made), {}
        self._connected.clear()
        self._renewals = renewals
        # The group itself is as out of step as links of our own would be.
        for kind, limited in old:
            self._made[kind, limited] = self._new(kind, limited)


def timeout_s(group: Any) -> float:
    """Seconds that messages of a process group may take."""
    for kind in ("cpu", "cuda"):
        with contextlib.suppress(Exception):  # private to torch, and not there for every backend
            backend: Any = group._get_backend(torch.device(kind))
            return float(backend.options._timeout.total_seconds())
    return DEFAULT_TIMEOUT_S
