"""RankGroup: warm ranks that hold a model and answer many measurement requests."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from kvr_partition._version import __version__
from kvr_partition.certificate import Certificate
from kvr_partition.errors import KVRError, PartitionError, RankError, UnsupportedError
from kvr_partition.measurement import Measurement, Sample
from kvr_partition.methods import BASELINES
from kvr_partition.partition import Partition
from kvr_partition.profile import Profile
from kvr_partition.provenance import ModelGeometry, Provenance
from profiler import messages
from profiler.measure import METHODS, Candidate, SamplingPlan, measure_interleaved
from profiler.models import DTYPES, ModelFolder, Operations, open_model, operations, probe_shapes
from profiler.simulate import Simulated
from profiler.store import SCHEMA, MeasurementLog, RunLine

BACKENDS = ("auto", "cpu", "cuda", "sm", "simulate")
DEPTHS = ("auto", "attention", "cache")
TOPOLOGIES = ("chain", "fanout")


class Transport(Protocol):
    """How requests reach all ranks and replies come back."""

    def exchange(
        self, requests: Sequence[messages.Request], on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        """Send each rank its request and wait for every rank's reply; raises `RankError`."""

    def close(self) -> None:
        """End all ranks; never raises, leaves nothing running."""


@dataclass
class RankGroup:
    """Ranks on this machine, or the ranks of the ``torchrun`` world this process is part of.

    Ranks start with the first request (or on entering a ``with`` block), build the model once and stay
    warm. A rank that dies, hangs or runs out of memory ends all of them within the time-out; that request
    fails with what the rank printed, and the next request starts a fresh group.

    Args:
        model: folder with ``config.json`` (random weights from ``seed``) or a checkpoint folder.
        ranks: how many; ``torchrun`` worlds must have as many processes.
        backend: ``"cpu"`` (gloo), ``"cuda"`` (NCCL, one GPU a rank), ``"sm"`` (one GPU cut into as many
            groups of SMs as there are ranks), ``"simulate"`` (a profile answers, nothing runs) or
            ``"auto"``: CUDA if there are enough GPUs, else CPU.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        depth: how far the runtime reaches into the model.
        threads: compute threads of each CPU rank.
        seed: of the random weights.
        batch: equal prompts per prefill.
        topology: how KV travels with method ``"kvr"``: ``"chain"`` or ``"fanout"``.
        bandwidth: bytes per second that each link is held to; None for what it can.
        noise_seed: of the choice of links that foreign traffic disturbs.
        profile: what to simulate; for backend ``"simulate"`` only.
        timeout_s: seconds a single request, or starting up, may take.

    Raises:
        UnsupportedError: unknown backend, dtype or depth; no such model; more ranks than GPUs.

    Example:
        >>> with RankGroup("models/quickstart-llama", ranks=2) as group:  # doctest: +SKIP
        ...     group.measure(Partition((300, 212))).ttft_s
    """

    model: str | os.PathLike[str]
    ranks: int
    backend: str = "auto"
    dtype: str = "float32"
    depth: str = "auto"
    threads: int = 1
    seed: int = 0
    batch: int = 1
    topology: str = "chain"
    bandwidth: float | None = None
    noise_seed: int = 0
    profile: Profile | None = None
    timeout_s: float = 600.0
    log: MeasurementLog | None = None
    _folder: ModelFolder = field(init=False, repr=False)
    _transport: Transport | None = field(init=False, default=None, repr=False)
    _ready: list[messages.Ready] = field(init=False, default_factory=list, repr=False)
    _support: Any = field(init=False, default=None, repr=False)
    _run: str = field(init=False, default="", repr=False)

    def __post_init__(self) -> None:
        for what, value, known in (
            ("backend", self.backend, BACKENDS),
            ("dtype", self.dtype, DTYPES),
            ("depth", self.depth, DEPTHS),
            ("topology", self.topology, TOPOLOGIES),
        ):
            if value not in known:
                raise UnsupportedError(f"unknown {what} {value!r}; there are {', '.join(known)}")
        for name, least in (("ranks", 1), ("threads", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise UnsupportedError(f"{name} must be at least {least}; got {getattr(self, name)}")
        _check_bandwidth(self.bandwidth)
        self.backend = _choose_backend(self.backend, self.ranks)
        self._folder = open_model(self.model)
        if (self.profile is None) == (self.backend == "simulate"):
            raise UnsupportedError("a profile goes with backend 'simulate', and that with a profile")
        if self.profile is not None:
            self._check_profile(self.profile.provenance)
        if self.depth == "attention":
            self._shapes().choose("attention")

    # ---------------------------------------------------------------- life

    def __enter__(self) -> RankGroup:
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
        self._shapes()
        if self.profile is not None:
            self._transport = Simulated(self.profile, self.topology, self.noise_seed)
        elif in_torchrun():
            self._transport = _join(self)
        else:
            self._transport = _Spawned(self._setups())
        try:
            replies = self._transport.exchange([])
        except BaseException:
            self.close()
            raise
        self._ready = [reply for reply in replies if isinstance(reply, messages.Ready)]
        self._begin_run()

    def hold_links(self, bandwidth: float | None) -> None:
        """Hold every link to so many bytes per second from now on; None for what it can.

        The log begins a new run with it, since its samples are not to be mixed with earlier ones.

        Raises:
            UnsupportedError: not more than 0.
        """
        _check_bandwidth(bandwidth)
        self.bandwidth = bandwidth
        if self._transport is not None:
            self._begin_run()

    def _begin_run(self) -> None:
        self._run = os.urandom(6).hex()
        if self.log is not None:
            self.log.append(RunLine(SCHEMA, self._run, self.provenance))

    def close(self) -> None:
        """End all ranks. Safe to call at any time, more than once."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    @property
    def pids(self) -> list[int]:
        """Process of each rank; empty when none run or when ``torchrun`` started them."""
        return self._transport.pids if isinstance(self._transport, _Spawned) else []

    @property
    def run(self) -> str:
        """Identifies, in the log, the run that this group's current samples belong to."""
        self.start()
        return self._run

    @property
    def provenance(self) -> Provenance:
        """The conditions of everything this group measures."""
        self.start()
        first = self._ready[0]
        return Provenance(
            model=self._folder.geometry,
            dtype=self.dtype,
            weights=self._folder.weights(self.seed),
            ranks=self.ranks,
            backend=self.backend,
            topology=self.topology,
            depth=first.depth,
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

    def requested_conditions(self) -> dict[str, object]:
        """Those of the `provenance` conditions that are settled before any rank starts."""
        return {
            "model": msgspec.to_builtins(self._folder.geometry),
            "dtype": self.dtype,
            "weights": self._folder.weights(self.seed),
            "ranks": self.ranks,
            "backend": self.backend,
            "batch": self.batch,
            "topology": self.topology,
            "threads_per_rank": self.threads,
        }

    @property
    def geometry(self) -> ModelGeometry:
        """The model's shape."""
        return self._folder.geometry

    @property
    def windows(self) -> list[int | None]:
        """Of each layer that keeps KV, the tokens a query sees, itself included; None for all before it."""
        return [layer.window for layer in self._shapes().layers if layer is not None]

    @property
    def entry_bytes(self) -> int:
        """Bytes of KV that one token keeps in one layer, the mean over the layers that keep any."""
        import torch

        width: int = getattr(torch, self.dtype).itemsize
        return int(self._shapes().entry_elements(self.batch)) * width // len(self.windows)

    @property
    def operations(self) -> Operations:
        """What a prefill of the model computes, counted."""
        return operations(self._folder)

    @property
    def resolved_depth(self) -> str:
        """How far the runtime reaches into the model, ``"auto"`` decided."""
        return str(self._shapes().choose(self.depth))

    def _shapes(self) -> Any:
        if self._support is None:
            self._support = probe_shapes(self._folder)
        return self._support

    def check_context(self, context: int, past: int = 0) -> None:
        """Refuse a context that this group cannot measure.

        Raises:
            PartitionError: fewer tokens than ranks, or more than the model has positions.
            UnsupportedError: a model whose positions depend on what is read at once.
        """
        self.check(Candidate("kvr", Partition.even(context, self.ranks, past=past)))

    # ------------------------------------------------------------- requests

    def measure(
        self,
        partition: Partition,
        method: str = "kvr",
        *,
        plan: SamplingPlan | None = None,
        purpose: str = "measure",
    ) -> Measurement:
        """Time one candidate by the protocol; see `measure_many`."""
        return self.measure_many([Candidate(method, partition)], plan=plan, purpose=purpose)[0]

    def measure_many(
        self,
        candidates: Sequence[Candidate],
        *,
        plan: SamplingPlan | None = None,
        purpose: str = "measure",
        on_sample: Callable[[Candidate, Sample, bool], None] | None = None,
    ) -> list[Measurement]:
        """Time candidates side by side.

        Args:
            plan: when a median is known well enough; by backend when None.
            purpose: names what the samples are for in the log. A finished measurement with the same
                purpose is returned as it is, not repeated.

        Returns:
            One measurement per candidate, in order. A candidate that failed is one with a ``failure``.

        Raises:
            UnsupportedError: an unknown method.
            PartitionError: a partition that does not fit the group or the model.
        """
        for candidate in candidates:
            self.check(candidate)
        if self.log is not None:
            self.start()
        return measure_interleaved(
            candidates,
            self.sample,
            plan or SamplingPlan.for_backend(self.backend),
            log=self.log,
            run=self._run,
            purpose=purpose,
            on_sample=on_sample,
        )

    def sample(self, candidate: Candidate, *, cold: bool = False) -> Sample:
        """Time one prefill.

        Args:
            cold: as a shape that was never seen, for which kernels plan nothing beforehand; see `plan_ahead`.

        Raises:
            RankError: it failed; the group has ended and starts anew with the next request.
        """
        self.check(candidate)
        request = messages.Prefill(
            candidate.method,
            candidate.partition.sizes,
            token_seed=1,
            noise=candidate.noise,
            bandwidth=self.bandwidth,
            cold=cold,
            past=candidate.partition.past,
        )
        replies = [reply for reply in self._ask(request) if isinstance(reply, messages.PrefillDone)]
        finishing = next(reply for reply in reversed(replies) if reply.first_token is not None)
        # Processes of one host share a monotonic clock, so the first rank to leave the barrier counts.
        same_host = len({ready.host for ready in self._ready}) == 1
        began = min(reply.began for reply in replies) if same_host else finishing.began
        ended = finishing.ended
        if candidate.method == "bound" and same_host:
            # Nobody waits for anybody, so the slowest rank, whichever it is, sets the bound.
            ended = max(reply.ended for reply in replies)
        return Sample(
            ttft_s=ended - began,
            ranks=tuple(reply.times for reply in replies),
            kv_bytes=sum(reply.kv_bytes for reply in replies),
            host_s=max(reply.host_s for reply in replies),
        )

    def verify(self, candidate: Candidate) -> Certificate:
        """Compare one prefill with the single run, both against higher precision.

        Raises:
            RankError: it failed.
            UnsupportedError, PartitionError: as `measure_many`.
        """
        self.check(candidate)
        partition = candidate.partition
        request = messages.Verify(
            candidate.method, partition.sizes, token_seed=1, noise=candidate.noise, past=partition.past
        )
        replies = [reply for reply in self._ask(request) if isinstance(reply, messages.VerifyDone)]
        return Certificate(
            method=candidate.method,
            sizes=partition.sizes,
            past=partition.past,
            reference="float64" if self.dtype == "float32" else "float32",
            same_token=all(reply.same_token is not False for reply in replies),
            deviations=tuple(deviation for reply in replies for deviation in reply.deviations),
            provenance=self.provenance,
        )

    def plan_ahead(self, tokens: int) -> tuple[int, float]:
        """Have kernels plan for any shape up to so many tokens, so that an unseen context starts warm.

        Returns:
            Plans built on the slowest rank, and the seconds it took.
        """
        replies = [
            reply for reply in self._ask(messages.PlanAhead(tokens)) if isinstance(reply, messages.PlanDone)
        ]
        slowest = max(replies, key=lambda reply: reply.seconds)
        return slowest.built, slowest.seconds

    def time_chunk(self, chunk: int, prefix: int, *, cold: bool = False) -> list[tuple[float, float]]:
        """Time a chunk behind a prefix, on all ranks at once, without links.

        Args:
            cold: as in `sample`.

        Returns:
            For each rank the seconds it took, and those until the KV of its first layer was ready.

        Raises:
            RankError: it failed.
        """
        replies = self._ask(messages.TimeChunk(chunk, prefix, cold))
        return [(reply.seconds, reply.first_kv_s) for reply in replies if isinstance(reply, messages.ChunkDone)]

    def time_links(self, nbytes: int, repeats: int) -> list[tuple[float, ...]]:
        """Time messages from each rank to the next.

        Returns:
            For each link the seconds of each message.

        Raises:
            RankError: it failed.
        """
        replies = self._ask(messages.TimeLink(nbytes, repeats, self.bandwidth))
        return [reply.seconds for reply in replies if isinstance(reply, messages.LinkDone)][: self.ranks - 1]

    def warm_up(self, partition: Partition) -> None:
        """Run one prefill that is not kept, so that the next one of this shape pays no first-time costs.

        Raises:
            RankError: it failed.
        """
        self.sample(Candidate("kvr", partition))

    def generate(
        self,
        input_ids: Sequence[int],
        partition: Partition,
        max_new_tokens: int,
        on_token: Callable[[int, float], None],
    ) -> None:
        """Read a prompt with KV-Runahead and decode greedily on the last rank.

        Args:
            on_token: told each token as it comes, and the seconds since the prefill began.

        Raises:
            RankError: it failed.
            PartitionError: the partition does not fit, or too many tokens for the model.
            UnsupportedError: ranks that cannot decode.
        """
        from kvr_partition.runtime.support import check_context

        if self.backend == "sm":
            raise UnsupportedError("SM-partition ranks are for measuring; use another --backend to generate")
        self.check(Candidate("kvr", partition))
        if partition.past:
            raise PartitionError("generate reads a whole prompt; use a partition without past tokens")
        check_context(self._folder.config, partition.context + max_new_tokens)
        self._ask(
            messages.Generate(tuple(input_ids), partition.sizes, max_new_tokens),
            on_token=lambda token: on_token(token.token, token.at_s),
        )

    # ------------------------------------------------------------ internals

    def _ask(
        self, request: messages.Request, on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        self.start()
        assert self._transport is not None
        try:
            return self._transport.exchange([request] * self.ranks, on_token)
        except BaseException:
            # After an error, or an interrupt in the middle of one, the ranks are out of step.
            self.close()
            raise

    def check(self, candidate: Candidate) -> None:
        """Refuse a candidate that this group cannot run, before any rank starts.

        Raises:
            UnsupportedError: an unknown method, or one that cannot be exact for this model.
            PartitionError: a partition that does not fit the group or the model.
        """
        from kvr_partition.runtime.support import check_context

        if candidate.method not in METHODS:
            raise UnsupportedError(f"unknown method {candidate.method!r}; there are {', '.join(METHODS)}")
        expected = 1 if candidate.method == "single" else self.ranks
        if candidate.partition.ranks != expected:
            raise PartitionError(
                f"partition {candidate.partition} has {candidate.partition.ranks} chunks; "
                f"{candidate.method} on this group needs {expected}"
            )
        past = candidate.partition.past
        if past and candidate.method in BASELINES:
            raise UnsupportedError(f"{candidate.method} is there for prompts without past tokens only")
        check_context(self._folder.config, past + candidate.partition.context)
        if candidate.method in ("tsp-causal", "zigzag"):
            from kvr_partition.runtime.baselines import check_gathering, parts_of

            check_gathering(self._shapes(), candidate.method)  # type: ignore[arg-type]
            parts_of(candidate.method, candidate.partition.context, self.ranks)  # type: ignore[arg-type]
        if candidate.method == "tp":
            if self.backend == "simulate":
                raise UnsupportedError("there is no schedule of tensor parallelism to simulate")
            if self.bandwidth is not None or candidate.noise:
                raise UnsupportedError(
                    "the collectives of tensor parallelism cannot be held to a bandwidth or disturbed"
                )
            if self.backend == "sm":
                raise UnsupportedError("tensor parallelism needs process ranks; use --backend cpu or cuda")
            if not getattr(self._folder.config, "base_model_tp_plan", None):
                raise UnsupportedError(f"transformers has no tensor-parallel plan for {self.geometry.model_type}")
            heads = (self.geometry.attention_heads, self.geometry.kv_heads)
            if any(count % self.ranks for count in heads):
                raise UnsupportedError(
                    f"tensor parallelism cuts whole heads, and {heads[0]} heads with {heads[1]} KV heads cannot "
                    f"be dealt to {self.ranks} ranks"
                )

    def _check_profile(self, origin: Provenance) -> None:
        for what, asked, known in (
            ("ranks", self.ranks, origin.ranks),
            ("dtype", self.dtype, origin.dtype),
            ("batch", self.batch, origin.batch),
            ("model", self._folder.geometry.name, origin.model.name),
            ("model configuration", self._folder.geometry.config_digest, origin.model.config_digest),
        ):
            if asked != known:
                raise UnsupportedError(f"this profile is of {what} {known}, not {asked}; measure one for that")
        # Beneath a simulation lies the depth that was measured.
        self.depth = origin.depth

    def _link(self) -> str:
        if self.ranks == 1:
            return "none"
        if self.profile is not None:
            return f"simulated {self.profile.provenance.link}" + (
                "" if self.bandwidth is None else f", held to {self.bandwidth / 1e9:g} GB/s"
            )
        kind = {"cuda": "nccl", "sm": "copies on the device"}.get(self.backend)
        if kind is None:
            kind = "gloo over loopback" if len({ready.host for ready in self._ready}) == 1 else "gloo"
        return kind if self.bandwidth is None else f"{kind}, held to {self.bandwidth / 1e9:g} GB/s"

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
                seed=self.seed,
                batch=self.batch,
                threads=self.threads,
                rendezvous=rendezvous,
                timeout_s=self.timeout_s,
                backend=self.backend,
                topology=self.topology,
                noise_seed=self.noise_seed,
            )
            for rank in range(self.ranks)
        ]


def _check_bandwidth(bandwidth: float | None) -> None:
    if bandwidth is not None and not bandwidth > 0:
        raise UnsupportedError(f"bandwidth must be more than 0 bytes a second; got {bandwidth:g}")


def _choose_backend(backend: str, ranks: int) -> str:
    if backend in ("cpu", "simulate"):
        return backend
    import torch

    gpus = torch.cuda.device_count()
    if backend == "sm":
        if in_torchrun():
            raise UnsupportedError("SM-partition ranks live in one process; do not use torchrun with them")
        if not gpus:
            raise UnsupportedError(
                "backend 'sm' cuts one NVIDIA GPU into ranks, and there is none; use --backend cpu"
            )
        return backend
    if backend == "auto":
        return "cuda" if gpus >= ranks else "cpu"
    if in_torchrun():
        gpus = gpus and int(os.environ["WORLD_SIZE"])
    if gpus < ranks:
        raise UnsupportedError(
            f"backend 'cuda' (NCCL) needs one GPU a rank: {ranks} ranks, {gpus} GPUs here; "
            "use --backend cpu or fewer ranks"
        )
    return backend


# ------------------------------------------------------------------------- ranks of our own


class _Spawned:
    """One process per rank on this machine, each with a control socket and a file for what it prints."""

    def __init__(self, setups: Sequence[messages.Setup]) -> None:
        # The ranks of one GPU's SMs share a process and its weights; the process answers for all of them.
        self._shared = setups[0].backend == "sm"
        if self._shared:
            setups = setups[:1]
        self._timeout_s = setups[0].timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="kvr-ranks-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._inboxes = [messages.Inbox() for _ in setups]
        # A file as meeting point cannot collide with anyone's port.
        rendezvous = (Path(self._folder.name) / "rendezvous").as_uri()
        try:
            for setup in setups:
                self._spawn(setup, rendezvous)
        except BaseException:
            self.close()
            raise

    def _spawn(self, setup: messages.Setup, rendezvous: str) -> None:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(setup.threads)
        # Gloo looks up the host name to find an interface, which fails on many laptops and containers.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        if self._shared:
            # Streams beyond the default 8 share hardware queues, and so wait for each other.
            environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with self._output(setup.rank).open("wb") as output, theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "profiler.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._processes.append(process)
        self._sockets.append(ours)
        scratch = self._folder.name
        ours.sendall(messages.encode(msgspec.structs.replace(setup, rendezvous=rendezvous, scratch=scratch)))

    @property
    def pids(self) -> list[int]:
        """Process of each rank."""
        return [process.pid for process in self._processes]

    def exchange(
        self, requests: Sequence[messages.Request], on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        for rank, request in enumerate(requests[: len(self._sockets)]):
            try:
                self._sockets[rank].sendall(messages.encode(request))
            except OSError:
                raise self._lost(rank) from None
        replies: dict[int, messages.Reply] = {}
        failures: dict[int, messages.Failed] = {}
        deadline = time.monotonic() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            for rank, control in enumerate(self._sockets):
                selector.register(control, selectors.EVENT_READ, rank)
            while len(replies) + len(failures) < len(self._sockets):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    if failures:
                        break
                    raise self._timed_out([r for r in range(len(self._sockets)) if r not in replies])
                for key, _ in ready:
                    rank = key.data
                    data = self._receive(rank)
                    if not data:
                        selector.unregister(key.fileobj)
                        failures[rank] = self._death(rank)
                    for body in self._inboxes[rank].feed(data):
                        reply = messages.decode_reply(body)
                        if isinstance(reply, messages.Token):
                            # Decoding may take as long as it likes, as long as it goes on.
                            deadline = time.monotonic() + self._timeout_s
                            if on_token is not None:
                                on_token(reply)
                        elif isinstance(reply, messages.Failed):
                            failures[rank] = reply
                        else:
                            replies[rank] = reply
                    if failures:
                        # Others may yet say what really happened; the first to notice is often a victim.
                        deadline = min(deadline, time.monotonic() + 2.0)
        if failures:
            raise _worst(failures)
        answers = [replies[rank] for rank in range(len(self._sockets))]
        return [
            each for reply in answers for each in (reply.replies if isinstance(reply, messages.Many) else (reply,))
        ]

    def close(self) -> None:
        for control in self._sockets:
            with contextlib.suppress(OSError):
                control.sendall(messages.encode(messages.Close()))
        until = time.monotonic() + 1.0
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for control in self._sockets:
            control.close()
        self._folder.cleanup()

    def _receive(self, rank: int) -> bytes:
        try:
            return self._sockets[rank].recv(1 << 16)
        except OSError:
            return b""

    def _output(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}.txt"

    def _printed(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return self._output(rank).read_text(errors="replace")[-8000:]
        return ""

    def _death(self, rank: int) -> messages.Failed:
        try:
            code = self._processes[rank].wait(2.0)
        except subprocess.TimeoutExpired:
            return messages.Failed("lost", "closed its control socket", self._printed(rank))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return messages.Failed("died", how, self._printed(rank))

    def _lost(self, rank: int) -> RankError:
        return _worst({rank: self._death(rank)})

    def _timed_out(self, silent: list[int]) -> RankError:
        # Have the hanging ranks write down where they are before they are ended.
        for rank in silent:
            with contextlib.suppress(OSError):
                self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        names = ", ".join(str(rank) for rank in silent)
        return RankError(
            f"rank {names} did not answer within {self._timeout_s:g} s; the group was ended "
            "(raise --timeout if the work is this long)",
            rank=silent[0],
            kind="timeout",
            traceback="\n".join(f"rank {rank}:\n{self._printed(rank)}" for rank in silent),
        )


def _worst(failures: dict[int, messages.Failed]) -> RankError:
    """The failure that explains the others: a death before an error before a lost link."""
    order = {"died": 0, "out-of-memory": 1, "error": 2}
    rank, failure = min(failures.items(), key=lambda item: (order.get(item[1].kind, 3), item[0]))
    says = {"out-of-memory": "ran out of memory: ", "error": "failed: "}.get(failure.kind, "")
    kind = "lost" if failure.kind == "died" else failure.kind
    return RankError(f"rank {rank} {says}{failure.message}", rank=rank, kind=kind, traceback=failure.traceback)


# ----------------------------------------------------------------------- a world made by torchrun


def in_torchrun() -> bool:
    """Whether this process is one of several that ``torchrun`` started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_follower() -> bool:
    """Whether this process only serves another one that drives."""
    return in_torchrun() and os.environ["RANK"] != "0"


class _Joined:
    """The driver inside a ``torchrun`` world: it is rank 0 and leads the others over a gloo group."""

    def __init__(self, worker: Any, control: Any) -> None:
        self._worker = worker
        self._control = control

    def exchange(
        self, requests: Sequence[messages.Request], on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        if requests:
            _broadcast(self._control, messages.encode(requests[0])[4:])
            own = [self._worker.serve(requests[0], lambda _: None)]
        else:
            own = [self._worker.ready()]
        bodies = _gather(self._control, messages.encode(own[0])[4:])
        replies = [messages.decode_reply(body) for body in bodies]
        failures = {rank: reply for rank, reply in enumerate(replies) if isinstance(reply, messages.Failed)}
        if failures:
            raise _worst(failures)
        return replies

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the others may be gone, which is what closing is for
            _broadcast(self._control, messages.encode(messages.Close())[4:])
        self._worker.leave(self._control)


def _join(group: RankGroup) -> Transport:
    from datetime import timedelta

    import torch.distributed as dist

    from profiler.worker import Worker

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if world != group.ranks:
        raise UnsupportedError(
            f"torchrun started {world} processes, but {group.ranks} ranks were asked for; use --ranks {world}"
        )
    local = os.environ.get("LOCAL_RANK", "0")
    devices = [f"cuda:{local}" if group.backend == "cuda" else "cpu"] * world
    worker = Worker(group._setups("env://", devices)[rank])
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=group.timeout_s))
    if rank == 0:
        return _Joined(worker, control)
    _gather(control, messages.encode(worker.ready())[4:])
    while True:
        request = messages.decode_request(_broadcast(control, None))
        if isinstance(request, messages.Close):
            worker.leave(control)
            raise SystemExit(0)
        reply = worker.serve(request, lambda _: None)
        _gather(control, messages.encode(reply)[4:])
        if isinstance(reply, messages.Failed):
            raise KVRError(reply.message)


def _broadcast(control: Any, body: bytes | None) -> bytes:
    import torch
    import torch.distributed as dist

    length = torch.tensor([len(body or b"")])
    dist.broadcast(length, src=0, group=control)
    data = (
        torch.frombuffer(bytearray(body), dtype=torch.uint8)
        if body
        else torch.empty(int(length), dtype=torch.uint8)
    )
    dist.broadcast(data, src=0, group=control)
    return bytes(data.numpy().tobytes())


def _gather(control: Any, body: bytes) -> list[bytes]:
    import torch
    import torch.distributed as dist

    world = dist.get_world_size(control)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(body)]), group=control)
    most = int(max(lengths))
    padded = torch.zeros(most, dtype=torch.uint8)
    padded[: len(body)] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    parts = [torch.zeros(most, dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(parts, padded, group=control)
    return [bytes(part.numpy().tobytes()[: int(length)]) for part, length in zip(parts, lengths, strict=True)]
