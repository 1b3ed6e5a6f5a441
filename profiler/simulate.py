"""Simulated ranks: a profile answers instead of hardware."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal

from msgspec.structs import replace

from kvr_partition.errors import UnsupportedError
from kvr_partition.machine.methods import scheduled
from kvr_partition.machine.profile import Profile
from profiler import messages


class Simulated:
    """A transport whose ranks are a schedule: no process, no model, the same answer every time.

    Args:
        profile: what chunks, ranks and links cost.
        topology: how KV travels with method ``"kvr"``.
        noise_seed: of the links that background traffic disturbs.
    """

    def __init__(self, profile: Profile, topology: str, noise_seed: int) -> None:
        self._profile = profile
        self._topology: Literal["chain", "fanout"] = topology  # type: ignore[assignment]
        self._noise_seed = noise_seed

    def exchange(
        self, requests: Sequence[messages.Request], on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        ranks = self._profile.provenance.ranks
        if not requests:
            return [self._ready()] * ranks
        match requests[0]:
            case messages.Prefill() as request:
                return self._prefill(request)
            case messages.TimeChunk(chunk=chunk, prefix=prefix, alone=alone, layers=layers):
                machine = self._profile.machine()
                share = 1.0 if layers is None else layers / machine.layers
                timed, eased = (1, machine.solo_speedup) if alone else (ranks, 1.0)
                first = machine.cost.kv_share * machine.cost.smooth.parts(chunk, 0).tokens
                return [
                    messages.ChunkDone(
                        share * machine.cost.seconds(chunk, prefix) * machine.slowness(rank) / eased,
                        first / machine.layers * machine.slowness(rank) / eased,
                    )
                    for rank in range(timed)
                ]
            case messages.TimeLink(nbytes=nbytes, repeats=repeats, bandwidth=bandwidth):
                machine = self._profile.machine(bandwidth=bandwidth)
                return [*(messages.LinkDone((link.seconds(nbytes),) * repeats) for link in machine.links(ranks)),
                        messages.LinkDone(())]  # fmt: skip
            case other:
                raise UnsupportedError(
                    f"simulated ranks hold no model, so {type(other).__name__.lower()} needs another --backend"
                )

    def survives(self, error: BaseException) -> bool:
        return True

    def close(self) -> None:
        pass

    def _ready(self) -> messages.Ready:
        of = self._profile.provenance
        return messages.Ready(
            of.device,
            os.uname().nodename,
            of.depth,
            of.torch,
            of.transformers,
            of.cuda,
            of.nccl,
            of.driver,
            layers=of.layers,
        )

    def _prefill(self, request: messages.Prefill) -> list[messages.Reply]:
        ranks = self._profile.provenance.ranks
        machine = self._profile.machine(self._topology, request.bandwidth)
        machine = replace(machine, past=request.past, noise=request.noise, noise_seed=self._noise_seed)
        found = scheduled(request.method, request.partition, ranks, machine)
        return [
            messages.PrefillDone(
                0.0, found.ttft_s, found.times[rank], found.sent_bytes[rank], 0 if rank == ranks - 1 else None
            )
            for rank in range(ranks)
        ]
