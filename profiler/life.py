"""The life of ranks: how they start, what they are, how requests reach them, how they end."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from kvr_partition._version import __version__
from kvr_partition.dtypes import DTYPES
from kvr_partition.errors import UnsupportedError
from kvr_partition.link_kinds import COPIES, GLOO, described
from kvr_partition.machine.profile import Profile
from kvr_partition.partition import Partition
from kvr_partition.provenance import ROUTED, ModelGeometry, Provenance
from profiler import messages
from profiler.checks import (
    check_bandwidth,
    check_candidate,
    check_memory,
    check_profile,
    check_words,
    choose_backend,
)
from profiler.measure import Candidate
from profiler.models import ModelFolder, Operations, open_model, operations, probe_shapes
from profiler.simulate import Simulated
from profiler.store import SCHEMA, KeptKV, MeasurementLog, RunLine
from profiler.transport import Spawned, Transport, in_torchrun, join

GPU_TILE = 128
"""Rows of the tiles that kernels of cuBLAS and cuDNN mostly cut chunks into; docs/search.md has what it costs."""


@dataclass
class Ranks:
    """Ranks that start with the first request and stay warm; see `RankGroup`, which says what the fields are."""

    model: str | os.PathLike[str]
    ranks: int
    backend: str = "auto"
    dtype: str = "float32"
    depth: str = "auto"
    layers: str = "auto"
    threads: int = 1
    seed: int = 0
    batch: int = 1
    topology: str = "auto"
    links: str = "auto"
    bandwidth: float | None = None
    noise_seed: int = 0
    profile: Profile | None = None
    timeout_s: float = 600.0
    log: MeasurementLog | None = None
    wanted_topology: str = field(init=False, repr=False)
    folder: ModelFolder = field(init=False, repr=False)
    _transport: Transport | None = field(init=False, default=None, repr=False)
    _ready: list[messages.Ready] = field(init=False, default_factory=list, repr=False)
    _support: Any = field(init=False, default=None, repr=False)
    _run: str = field(init=False, default="", repr=False)

    def __post_init__(self) -> None:
        check_words(self)
        self.backend = choose_backend(self.backend, self.ranks)
        self.wanted_topology = self.topology
        if self.topology == "auto" and self.backend != "cuda":
            self.topology = "chain" if self.profile is None else self.profile.provenance.topology
        if self.links != "auto" and self.backend != "cuda":
            raise UnsupportedError(f"links {self.links!r} are between GPUs; use --backend cuda, or links 'auto'")
        self.folder = open_model(self.model)
        if (self.profile is None) == (self.backend == "simulate"):
            raise UnsupportedError("a profile goes with backend 'simulate', and that with a profile")
        if self.profile is not None:
            check_profile(self, self.profile.provenance)
            # A simulation has the depth of its profile, whatever was asked for.
            self.depth = self.profile.provenance.depth
        if self.depth == "attention":
            self.shapes.choose("attention")

    # ---------------------------------------------------------------- life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the ranks, if they are not running, and wait until all are ready.

        In a ``torchrun`` world only rank 0 returns. The others serve it until it closes the group, and
        then leave the program.

        Raises:
            RankError: a rank could not start; its traceback is in the error.
            UnsupportedError: the model cannot be split exactly, found before any rank starts.
        """
        if self._transport is not None:
            return
        _ = self.shapes  # refuses a model that cannot be split
        if self.profile is not None:
            self._transport = Simulated(self.profile, self.topology, self.noise_seed)
        elif in_torchrun():
            self._transport = join(self.ranks, self.backend, self.timeout_s, self._setups)
        else:
            self._transport = Spawned(self._setups())
        try:
            replies = self._transport.exchange([])
        except BaseException:
            self.close()
            raise
        self._ready = [reply for reply in replies if isinstance(reply, messages.Ready)]
        if len({ready.layers for ready in self._ready}) > 1:
            text = "; ".join(f"rank {rank} {ready.layers}" for rank, ready in enumerate(self._ready))
            self.close()
            raise UnsupportedError(
                f"ranks differ in the layers they can run: {text}; give all the same packages, or take "
                "layers 'stock'"
            )
        if self.backend == "cuda":
            self.topology = self._ready[0].topology
        self._run = _new_run()

    def hold_links(self, bandwidth: float | None) -> None:
        """Hold every link to so many bytes per second from now on; None for what it can.

        The log begins a new run with it, since its samples are not to be mixed with earlier ones.

        Raises:
            UnsupportedError: not more than 0.
        """
        check_bandwidth(bandwidth)
        self.bandwidth = bandwidth
        self._run = _new_run()

    def _describe_run(self) -> None:
        """Say in the log, once, under which conditions its samples are taken from now on."""
        if self.log is not None and self._run not in self.log.provenance:
            kept = KeptKV(len(self.windows), self.entry_bytes)
            self.log.append(RunLine(SCHEMA, self._run, self.provenance, kept))

    def close(self) -> None:
        """End all ranks. Safe to call at any time, more than once."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    @property
    def pids(self) -> list[int]:
        """Process of each rank; empty when none run or when ``torchrun`` started them."""
        return self._transport.pids if isinstance(self._transport, Spawned) else []

    @property
    def run(self) -> str:
        """Identifies, in the log, the run that this group's current samples belong to.

        The log has its conditions, also one that the group was given after it had started.
        """
        self.start()
        self._describe_run()
        return self._run

    @property
    def provenance(self) -> Provenance:
        """The conditions of everything this group measures."""
        self.start()
        first = self._ready[0]
        return Provenance(
            model=self.folder.geometry,
            dtype=self.dtype,
            weights=self.weights,
            ranks=self.ranks,
            backend=self.backend,
            topology=self.topology,
            depth=first.depth,
            layers=first.layers,
            batch=self.batch,
            device=first.device_name,
            threads_per_rank=self.threads,
            link=self._link(),
            os=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=first.torch,
            transformers=first.transformers,
            cuda=first.cuda,
            nccl=first.nccl,
            driver=first.driver,
            kvr_partition=__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    @property
    def layers_left(self) -> tuple[str, ...]:
        """What stays the model's own in layers with replaced parts, and why."""
        return self.ready[0].left

    def requested_conditions(self) -> dict[str, object]:
        """Those of the `provenance` conditions that are settled before any rank starts."""
        settled = {
            "model": msgspec.to_builtins(self.folder.geometry),
            "dtype": self.dtype,
            "weights": self.weights.removesuffix(ROUTED),
            "ranks": self.ranks,
            "backend": self.backend,
            "batch": self.batch,
            "threads_per_rank": self.threads,
        }
        # Links that are not there yet decide about it.
        return settled if self.topology == "auto" else {**settled, "topology": self.topology}

    @property
    def weights(self) -> str:
        """How the weights came about, as provenance says it."""
        return self.folder.weights(self.seed)

    @property
    def geometry(self) -> ModelGeometry:
        """The model's shape."""
        return self.folder.geometry

    @property
    def windows(self) -> list[int | None]:
        """Of each layer that keeps KV, the tokens a query sees, itself included; None for all before it."""
        return [layer.window for layer in self.shapes.layers if layer is not None]

    @property
    def entry_bytes(self) -> int:
        """Bytes of KV that one token keeps in one layer, the mean over the layers that keep any."""
        width = DTYPES[self.dtype].nbytes
        return int(self.shapes.entry_elements(self.batch)) * width // len(self.windows)

    @property
    def operations(self) -> Operations:
        """What a prefill of the model computes, counted."""
        return operations(self.folder)

    @property
    def tile_rows(self) -> int:
        """Rows of a chunk that kernels take at once: a chunk with some left over takes as long as with all."""
        backend = self.backend if self.profile is None else self.profile.provenance.backend
        return GPU_TILE if backend in ("sm", "cuda") else 1

    @property
    def shares_hardware(self) -> bool:
        """Whether ranks have memory or power in common, so that one is faster while others are idle."""
        return self.backend != "cuda"

    @property
    def resolved_depth(self) -> str:
        """How far the runtime reaches into the model, ``"auto"`` decided."""
        return str(self.shapes.choose(self.depth))

    @property
    def shapes(self) -> Any:
        """What a probe of the model's shapes shows, see `ModelSupport`."""
        if self._support is None:
            self._support = probe_shapes(self.folder)
        return self._support

    @property
    def ready(self) -> Sequence[messages.Ready]:
        """What the ranks told of themselves when they had started."""
        self.start()
        return self._ready

    def check_context(self, context: int, past: int = 0) -> None:
        """Refuse a context that this group cannot measure.

        Raises:
            PartitionError: fewer tokens than ranks, or more than the model has positions.
            UnsupportedError: a model whose positions depend on what is read at once.
        """
        self.check(Candidate("kvr", Partition.even(context, self.ranks, past=past)))

    def check_memory(self, context: int, past: int = 0) -> None:
        """Refuse a context whose even split has no room on these GPUs.

        Raises:
            UnsupportedError: it has none, with what takes how much.
        """
        check_memory(self, self.ready, context, past)

    # ------------------------------------------------------------ internals

    def _ask(
        self, request: messages.Request, on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        self.start()
        assert self._transport is not None
        try:
            return self._transport.exchange([request] * self.ranks, on_token)
        except BaseException as error:
            # After an error, or an interrupt in the middle of a request, ranks may be out of step.
            if not self._transport.survives(error):
                self.close()
            raise

    def check(self, candidate: Candidate) -> None:
        """Refuse a candidate that this group cannot run, before any rank starts; see `check_candidate`."""
        check_candidate(self, candidate)

    def _link(self) -> str:
        if self.ranks == 1:
            return "none"
        if self.profile is not None:
            return described(f"simulated {self.profile.provenance.link}", self.bandwidth)
        kind = COPIES.name if self.backend == "sm" else self._ready[0].link
        if kind == GLOO.name and len({ready.host for ready in self._ready}) == 1:
            kind += " over loopback"
        return described(kind, self.bandwidth)

    def _setups(self, rendezvous: str = "", devices: Sequence[str] | None = None) -> list[messages.Setup]:
        on_cuda = self.backend == "cuda"
        on_sms = self.backend == "sm"
        return [
            messages.Setup(
                model=str(Path(self.model).resolve()),
                rank=rank,
                ranks=self.ranks,
                device=devices[rank] if devices else "cuda:0" if on_sms else f"cuda:{rank}" if on_cuda else "cpu",
                dtype=self.dtype,
                depth=self.depth,
                layers=self.layers,
                seed=self.seed,
                batch=self.batch,
                threads=self.threads,
                rendezvous=rendezvous,
                timeout_s=self.timeout_s,
                backend=self.backend,
                topology=self.wanted_topology if on_cuda else self.topology,
                links=self.links,
                noise_seed=self.noise_seed,
            )
            for rank in range(self.ranks)
        ]


def _new_run() -> str:
    return os.urandom(6).hex()
