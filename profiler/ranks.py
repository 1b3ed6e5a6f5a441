"""RankGroup: warm ranks that hold a model and answer many measurement requests."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kvr_partition._version import __version__
from kvr_partition.certificate import Certificate
from kvr_partition.errors import PartitionError, UnsupportedError
from kvr_partition.link_kinds import COPIES, GLOO
from kvr_partition.machine.profile import Profile
from kvr_partition.measurement import Measurement, Sample
from kvr_partition.methods import method_of
from kvr_partition.partition import Partition
from kvr_partition.provenance import ROUTED, ModelGeometry, Provenance
from profiler import messages
from profiler.measure import Candidate, SamplingPlan, measure_interleaved
from profiler.models import DTYPES, ModelFolder, Operations, open_model, operations, probe_shapes
from profiler.simulate import Simulated
from profiler.store import SCHEMA, MeasurementLog, RunLine
from profiler.transport import Spawned, Transport, in_torchrun, join

BACKENDS = ("auto", "cpu", "cuda", "sm", "simulate")
DEPTHS = ("auto", "attention", "cache")
LAYERS = ("auto", "fused", "stock")
TOPOLOGIES = ("auto", "chain", "fanout")
LINKS = ("auto", "peer", "nccl")
GPU_TILE = 128
"""Rows of the tiles that kernels of cuBLAS and cuDNN mostly cut chunks into; docs/search.md has what it costs."""


@dataclass
class RankGroup:
    """Ranks on this machine, or the ranks of the ``torchrun`` world this process is part of.

    Ranks start with the first request (or on entering a ``with`` block), build the model once and stay
    warm. A rank that dies, hangs or runs out of memory ends all of them within the time-out; that request
    fails with what the rank printed, and the next request starts a fresh group. SM-partition ranks, which share a
    process, go on after running out of memory.

    Args:
        model: checkpoint folder, or one with ``config.json`` alone: random weights from ``seed``. Times do not
            depend on their values, except in a mixture of experts.
        ranks: how many; ``torchrun`` worlds must have as many processes.
        backend: ``"cpu"`` (gloo), ``"cuda"`` (NCCL, one GPU a rank), ``"sm"`` (one GPU cut into as many
            groups of SMs as there are ranks), ``"simulate"`` (a profile answers, nothing runs) or
            ``"auto"``: CUDA if there are enough GPUs, else CPU.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        depth: how far the runtime reaches into the model.
        layers: ``"fused"``, ``"stock"`` or ``"auto"``, see `kvr_partition.runtime.prefill`.
        threads: compute threads of each CPU rank.
        seed: of the random weights.
        batch: equal prompts per prefill.
        topology: how KV travels with method ``"kvr"``: ``"chain"``, ``"fanout"`` or ``"auto"``, which suits the
            links. Once ranks run it tells which one that is.
        links: between GPUs: ``"peer"``, ``"nccl"`` or ``"auto"``, the best kind that each pair of ranks has.
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
            ("layers", self.layers, LAYERS),
            ("topology", self.topology, TOPOLOGIES),
            ("links", self.links, LINKS),
        ):
            if value not in known:
                raise UnsupportedError(f"unknown {what} {value!r}; there are {', '.join(known)}")
        for name, least in (("ranks", 1), ("threads", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise UnsupportedError(f"{name} must be at least {least}; got {getattr(self, name)}")
        _check_bandwidth(self.bandwidth)
        self.backend = _choose_backend(self.backend, self.ranks)
        self.wanted_topology = self.topology
        if self.topology == "auto" and self.backend != "cuda":
            self.topology = "chain" if self.profile is None else self.profile.provenance.topology
        if self.links != "auto" and self.backend != "cuda":
            raise UnsupportedError(f"links {self.links!r} are between GPUs; use --backend cuda, or links 'auto'")
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
            told = "; ".join(f"rank {rank} {ready.layers}" for rank, ready in enumerate(self._ready))
            self.close()
            raise UnsupportedError(
                f"ranks differ in the layers they can run: {told}; give all the same packages, or take "
                "layers 'stock'"
            )
        if self.backend == "cuda":
            self.topology = self._ready[0].topology
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
        return self._transport.pids if isinstance(self._transport, Spawned) else []

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
        self.start()
        return self._ready[0].left

    def requested_conditions(self) -> dict[str, object]:
        """Those of the `provenance` conditions that are settled before any rank starts."""
        settled = {
            "model": msgspec.to_builtins(self._folder.geometry),
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
        return self._folder.weights(self.seed)

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

    def check_memory(self, context: int, past: int = 0) -> None:
        """Refuse a context whose even split has no room on these GPUs.

        Raises:
            UnsupportedError: it has none, with what takes how much.
        """
        from kvr_partition.runtime.support import text_config
        from profiler.memory import Shape, check_fits

        self.start()
        ready = self._ready[0]
        config, geometry = text_config(self._folder.config), self.geometry
        inner = next(
            (
                width
                for name in ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
                if isinstance(width := getattr(config, name, None), int)
            ),
            4 * geometry.hidden_size,
        )
        shape = Shape(
            self._shapes().layers,
            geometry.hidden_size,
            geometry.attention_heads * geometry.head_dim,
            inner,
            4 if self.dtype == "float32" else 2,
            self.batch,
            ready.layers != "stock",
        )
        check_fits(
            shape,
            Partition.even(context, self.ranks, past=past),
            ready.weights_bytes,
            min(one.memory_bytes for one in self._ready),
            together=self.backend == "sm",
        )

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

    def time_chunk(
        self, chunk: int, prefix: int, *, cold: bool = False, alone: bool = False, layers: int | None = None
    ) -> list[tuple[float, float]]:
        """Time a chunk behind a prefix, on all ranks at once, without links.

        Args:
            cold: as in `sample`.
            alone: on the first rank only, while all others are idle.
            layers: only so many layers, which takes so much less time; less than the model has.

        Returns:
            For each timed rank the seconds it took, and those until the KV of its first layer was ready.

        Raises:
            RankError: it failed.
            UnsupportedError: the model has no such layers.
        """
        most = len(self.windows) - 1
        if layers is not None and not 1 <= layers <= most:
            raise UnsupportedError(f"{layers} layers of {self.geometry.name} cannot be timed; 1 to {most} can")
        replies = self._ask(messages.TimeChunk(chunk, prefix, cold, alone, layers))
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
            PartitionError: the partition does not fit, or too many tokens for the model, or ones it does not know.
            UnsupportedError: ranks that cannot decode, or generation settings that cannot be followed.
        """
        from kvr_partition.runtime.decoding import check_generation
        from kvr_partition.runtime.loading import load_generation_config
        from kvr_partition.runtime.support import check_context, check_tokens

        if self.backend == "sm":
            raise UnsupportedError("SM-partition ranks are for measuring; use another --backend to generate")
        self.check(Candidate("kvr", partition))
        if partition.past:
            raise PartitionError("generate reads a whole prompt; use a partition without past tokens")
        check_context(self._folder.config, partition.context + max_new_tokens - 1)
        check_tokens(input_ids, self.geometry.vocab_size)
        check_generation(load_generation_config(self._folder.checkpoint))
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
        except BaseException as error:
            # After an error, or an interrupt in the middle of a request, ranks may be out of step.
            if not self._transport.survives(error):
                self.close()
            raise

    def check(self, candidate: Candidate) -> None:
        """Refuse a candidate that this group cannot run, before any rank starts.

        Raises:
            UnsupportedError: an unknown method, or one that cannot be exact for this model.
            PartitionError: a partition that does not fit the group or the model.
        """
        from kvr_partition.runtime.support import check_context

        method = method_of(candidate.method)
        expected = 1 if method.alone else self.ranks
        if candidate.partition.ranks != expected:
            raise PartitionError(
                f"partition {candidate.partition} has {candidate.partition.ranks} chunks; "
                f"{method.name} on this group needs {expected}"
            )
        even = Partition.even(candidate.partition.context, expected, past=candidate.partition.past)
        if method.chunks == "even" and candidate.partition != even:
            raise PartitionError(
                f"{method.name} runs even chunks only, which are {even}; got {candidate.partition}"
            )
        past = candidate.partition.past
        if past and not method.takes_past:
            raise UnsupportedError(f"{method.name} is there for prompts without past tokens only")
        check_context(self._folder.config, past + candidate.partition.context)
        if method.unscheduled and self.backend == "simulate":
            raise UnsupportedError(method.unscheduled)
        if method.gathers and method.our_attention:
            from kvr_partition.runtime.baselines import check_gathering, parts_of

            check_gathering(self._shapes(), method.name)  # type: ignore[arg-type]
            parts_of(method.name, candidate.partition.context, self.ranks)  # type: ignore[arg-type]
        if method.name == "tp":
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
        kind = COPIES.name if self.backend == "sm" else self._ready[0].link
        if kind == GLOO.name and len({ready.host for ready in self._ready}) == 1:
            kind += " over loopback"
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
