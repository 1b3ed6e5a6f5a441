"""RankGroup: warm ranks that hold a model and answer many measurement requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvr_partition.certificate import Certificate
from kvr_partition.dtypes import DTYPES
from kvr_partition.errors import PartitionError, UnsupportedError
from kvr_partition.measurement import Measurement, Sample
from kvr_partition.partition import Partition
from profiler import messages
from profiler.life import Ranks
from profiler.measure import Candidate, SamplingPlan, measure_interleaved


@dataclass
class RankGroup(Ranks):
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
            links. Once ranks run, the attribute holds the one that was chosen.
        links: between GPUs: ``"peer"``, ``"nccl"`` or ``"auto"``, the best kind that each pair of ranks has.
        bandwidth: bytes per second that each link is held to; None for what it can.
        noise_seed: of the choice of links that background traffic disturbs.
        profile: what to simulate; for backend ``"simulate"`` only.
        timeout_s: seconds a single request, or starting up, may take.

    Raises:
        UnsupportedError: unknown backend, dtype or depth; no such model; more ranks than GPUs.

    Example:
        >>> with RankGroup("models/quickstart-llama", ranks=2) as group:  # doctest: +SKIP
        ...     group.measure(Partition((300, 212))).ttft_s
    """

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
        return measure_interleaved(
            candidates,
            self.sample,
            plan or SamplingPlan.for_backend(self.backend),
            log=self.log,
            run="" if self.log is None else self.run,
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
            reference=DTYPES[self.dtype].reference,
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
        from kvr_partition.runtime.positions import check_context
        from kvr_partition.runtime.support import check_tokens

        if self.backend == "sm":
            raise UnsupportedError("SM-partition ranks are for measuring; use another --backend to generate")
        self.check(Candidate("kvr", partition))
        if partition.past:
            raise PartitionError("generate reads a whole prompt; use a partition without past tokens")
        check_context(self.folder.config, partition.context + max_new_tokens - 1)
        check_tokens(input_ids, self.geometry.vocab_size)
        check_generation(load_generation_config(self.folder.checkpoint))
        self._ask(
            messages.Generate(tuple(input_ids), partition.sizes, max_new_tokens),
            on_token=lambda token: on_token(token.token, token.at_s),
        )
