"""Agreement: ranks of a group take turns together, one prefill after the other, or raise.

Before any KV is posted, every rank states what it is about to run, and runs it only if all others are about to run
the same. A rank that fails says so to the others; from then on the group is unusable until `renew` has given it
links on which nothing of the failed prefill can arrive.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist

from kvr_partition.errors import KVRError, NotFiniteError, PartitionError, RankError, named_ranks
from kvr_partition.runtime.channel import IDLE, Channel, Doing, meet
from kvr_partition.runtime.digests import geometry_digest, layers_digest, same_past, weights_digest

_NEVER = 2**31 - 1
"""Tag of a message that is never sent."""

DEFAULT_TIMEOUT_S = 1800.0
"""Where the process group does not tell its own."""

LINK_CTAS = 4
"""Blocks of threads that NCCL may keep for a link; each takes an SM from compute, even while it waits."""


class Statement(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What one rank is about to run. Digests are those of `digests`."""

    number: int
    refusal: str = ""
    """Why this rank runs nothing; the rest is then empty."""
    method: str = ""
    model: int = 0
    layers: int = 0
    dtype: str = ""
    device: str = ""
    weights: int = 0
    batch: int = 0
    past: int = 0
    past_held: tuple[float, ...] = ()
    """What the past holds, see `digests.past_fingerprint`; compared as far as rounding lets it."""
    context: int = 0
    prompt: int = 0
    sizes: tuple[int, ...] = ()
    topology: str = ""
    limits: str = ""


# In the order in which they are compared: what comes first explains what follows.
_ITEMS = {
    "number": "which prefill it is",
    "method": "the method",
    "model": "the model's configuration",
    "layers": "the layers that keep KV",
    "dtype": "the dtype",
    "device": "the kind of device",
    "weights": "the weights",
    "batch": "the batch",
    "past": "the past tokens",
    "past_held": "what the past holds",
    "context": "the length of the prompt",
    "prompt": "the prompt",
    "sizes": "the partition",
    "topology": "the topology",
    "limits": "the limits of links",
}
_DIGESTS = frozenset({"model", "layers", "weights", "prompt", "past_held"})


class _Note(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells all others in one step of a turn."""

    renewals: int
    body: bytes


class _Trouble(msgspec.Struct, frozen=True, array_like=True):
    """A `RankError` on its way to the other ranks."""

    renewals: int
    message: str
    rank: int | None
    kind: str
    phase: str

    def error(self) -> RankError:
        """The error itself."""
        return RankError(self.message, rank=self.rank, kind=self.kind, phase=self.phase)


class _Renewal(msgspec.Struct, frozen=True, array_like=True):
    renewals: int
    number: int


_encode = msgspec.msgpack.Encoder().encode
_note = msgspec.msgpack.Decoder(_Note).decode
_statement = msgspec.msgpack.Decoder(Statement).decode
_trouble = msgspec.msgpack.Decoder(_Trouble).decode
_renewal = msgspec.msgpack.Decoder(_Renewal).decode


class Guarded(Protocol):
    """What makes a device wait for another rank, and can end that wait."""

    def release(self) -> None:
        """End all waits of this rank, whatever they wait for; what was read since counts for nothing."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing of the turn is under way on this rank's device; False: it still is."""


class Agreement:
    """The turns of one process group on one rank.

    Attributes:
        rank, ranks: this rank, of how many.
        number: of the latest turn; all messages of a prefill carry it.
        guarded: what makes this rank's device wait for others.
        exposed: turns in which peers were told where to write, and from which they may still be writing.
        kept: whatever links keep for this group from one turn to the next.
    """

    def __init__(self, group: dist.ProcessGroup, channel: Channel | None) -> None:
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self.number = 0
        self.channel = channel
        self._group = weakref.ref(group)
        self._change = threading.Condition() if channel is None else channel.change
        self._busy = threading.Lock()
        self._renewals = 0
        self._barriers = 0
        self._failure: RankError | None = None
        self._early: _Trouble | None = None
        self._links: dict[tuple[str, bool], Any] = {}
        self._connected: set[tuple[int, int]] = set()
        self._weights: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.guarded: list[Guarded] = []
        self.exposed: set[int] = set()
        self.kept: dict[Any, Any] = {}
        self._drained: set[int] = set()
        if channel is not None:
            channel.watch(self._noticed)

    # ------------------------------------------------------------------- turns

    @contextlib.contextmanager
    def turn(self, compare: bool = True) -> Iterator[Turn]:
        """One prefill. What it raises is told to the other ranks.

        Args:
            compare: whether ranks compare what they are about to run.

        Raises:
            RankError: another thread of this rank has the turn, or an earlier prefill failed.
        """
        if not self._busy.acquire(blocking=False):
            raise RankError(
                f"rank {self.rank} is in prefill {self.number} of this group in another thread; "
                "one prefill at a time, or a group and a model for each thread",
                rank=self.rank,
                kind="busy",
                phase="agreement",
            )
        try:
            if (unusable := self._unusable()) is not None:
                raise unusable
            self.number += 1
            turn = Turn(self, self.number, compare and self.channel is not None)
            try:
                yield turn
                self.exposed.discard(turn.number)
            except BaseException as error:
                # Numbers that are not finite are found when nothing is under way any more.
                if turn.open and not isinstance(error, NotFiniteError):
                    self.fail(error, turn.phase)
                    self._abort_links()
                    for thread in turn.threads:
                        thread.join(1.0)  # one that outlives the interpreter would abort the process
                    self._drain()
                else:
                    self.exposed.discard(turn.number)
                raise
            finally:
                self._now(IDLE)
        finally:
            self._busy.release()

    def _unusable(self) -> RankError | None:
        """The error of a prefill in a group in which one has failed."""
        first = self._failure
        if first is None:
            return None
        error = RankError(
            f"this group is unusable since a prefill failed: {first}; give it new links with "
            "kvr_partition.runtime.renew on all its ranks, or make another group",
            rank=first.rank,
            kind=first.kind,
            phase=first.phase,
        )
        error.__cause__ = first
        return error

    def exchange(self, mine: bytes, phase: str) -> list[bytes]:
        """What every rank tells all others in one step of a turn.

        Raises:
            RankError: a rank is gone, stopped, late, or failed before.
        """
        if self.channel is None:
            return [mine]
        self.channel.state(_encode(_Note(self._renewals, mine)))
        found = {self.rank: mine}
        while len(found) < self.ranks:
            missing = [rank for rank in range(self.ranks) if rank not in found]
            self._now(Doing(f"in {phase}", missing[0]))
            for rank, note in self.channel.stated(missing, phase, self._unusable).items():
                other = _note(note)
                # What an earlier renewal left in the box was never run.
                if other.renewals >= self._renewals:
                    found[rank] = other.body
        return [found[rank] for rank in range(self.ranks)]

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            RankError: one is gone, stopped or late.
        """
        if self.channel is not None:
            self._now(Doing("waiting in a barrier"))
            self._barriers += 1
            mine = _encode((self._renewals, self._barriers))
            self.channel.tell("barrier", mine)
            missing = [rank for rank in range(self.ranks) if rank != self.rank]
            while missing:
                heard = self.channel.hear_any("barrier", "barrier", missing, unless=lambda: self._failure)
                # Those of a request that failed are still there after a renewal.
                missing = [rank for rank in missing if heard.get(rank) != mine]
            self._now(IDLE)

    # ----------------------------------------------------------------- failures

    @property
    def failure(self) -> RankError | None:
        """What made the group unusable."""
        return self._failure

    @property
    def change(self) -> threading.Condition:
        """Notified when a failure comes in; links share it."""
        return self._change

    def fail(self, error: BaseException, phase: str) -> None:
        """Make the group unusable and tell the other ranks, unless they told us."""
        with self._change:
            if self._failure is not None:
                return
            failure = self._failure = as_rank_error(error, self.rank, phase)
            self._change.notify_all()
        if self.channel is not None:
            self.channel.tell(
                "trouble",
                _encode(_Trouble(self._renewals, str(failure), failure.rank, failure.kind, failure.phase)),
            )

    def _noticed(self, rank: int, topic: str, body: bytes) -> None:
        """Look at what arrives; called by the channel's thread."""
        if topic == "trouble":
            trouble = _trouble(body)
            if trouble.renewals > self._renewals:
                # A rank that was renewed sooner has failed again already; it counts once this one is renewed, too.
                self._early = trouble
            elif trouble.renewals == self._renewals and self._failure is None:
                self._failure = trouble.error()
        elif topic == "drained" and body == _encode(self._renewals):
            self._drained.add(rank)

    def explain(self, peer: int | None, error: BaseException, phase: str) -> RankError:
        """Who is to blame for a link to ``peer`` that broke; None: for a collective, whose peers are all."""
        text = _one_line(error)
        if self.channel is None:
            whose = "the others" if peer is None else f"rank {peer}"
            return RankError(
                f"the link of rank {self.rank} with {whose} broke ({phase}): {text}",
                rank=peer,
                kind="lost",
                phase=phase,
            )
        channel = self.channel
        peers = [rank for rank in range(self.ranks) if rank != self.rank] if peer is None else [peer]
        # The cause often arrives a moment after the link has noticed.
        with self._change:
            self._change.wait_for(lambda: self._failure is not None or channel.gone & set(peers), 1.0)
            if self._failure is not None:
                return self._failure
        gone = channel.gone & set(peers)
        return channel.lost(min(gone), phase) if gone else channel.culprit(peers, phase, channel.timeout_s)

    # ------------------------------------------------------------------ renewal

    def renew(self) -> None:
        """Agree anew after a failure; see the function `renew`."""
        if self.channel is None:
            raise RankError(
                "a group whose ranks do not agree on prefills cannot be renewed; make another one", phase="renewal"
            )
        if not self._busy.acquire(blocking=False):
            raise RankError(
                f"rank {self.rank} is in a prefill of this group in another thread", rank=self.rank, kind="busy"
            )
        try:
            self._now(Doing("waiting in the renewal of the group"))
            if not self._drain():
                raise RankError(
                    f"the device of rank {self.rank} does not come to an end with the prefill that failed; "
                    "end its process",
                    rank=self.rank,
                    kind="timeout",
                    phase="renewal",
                )
            target, heard = self._renewals + 1, {self.rank: _Renewal(self._renewals + 1, self.number)}
            self.channel.tell("renewal", _encode(heard[self.rank]))
            while len(heard) < self.ranks:
                missing = [rank for rank in range(self.ranks) if rank not in heard]
                for rank, note in self.channel.hear("renewal", "renewal", missing).items():
                    other = _renewal(note)
                    # One that gave up waiting has told its renewal before, and tells it again.
                    if other.renewals >= target:
                        heard[rank] = other
                if (latest := max(each.renewals for each in heard.values())) > target:
                    target, heard = latest, {rank: each for rank, each in heard.items() if each.renewals == latest}
                    heard[self.rank] = _Renewal(latest, self.number)
                    self.channel.tell("renewal", _encode(heard[self.rank]))
            self._abort_links()
            old, self._links = list(self._links), {}
            self._connected.clear()
            with self._change:
                self._renewals = target
                self.number = max(each.number for each in heard.values())
                self._barriers = 0
                self._drained.clear()
                self.exposed.clear()  # nobody tells a renewal before its device has come to an end
                early = self._early
                self._failure = early.error() if early is not None and early.renewals == target else None
            # The group itself is as out of step as links of our own would be.
            for kind, limited in old:
                self._links[kind, limited] = self._new_links(kind, limited)
        finally:
            self._now(IDLE)
            self._busy.release()

    def _drain(self) -> bool:
        """Wait until this rank's device writes to nobody any more, and tell the others."""
        if self.channel is None:
            return True
        drained = True
        for each in self.guarded:
            drained = each.drain(self.channel.timeout_s) and drained
        if drained:
            self.channel.tell("drained", _encode(self._renewals))
        return drained

    def settled(self, number: int) -> bool:
        """Whether no rank writes any more to what it was told of in a turn: it went well, or all have drained."""
        if number in self.exposed and self._failure is not None and self.channel is not None:
            others = set(range(self.ranks)) - {self.rank}
            # The driver ends what a process had under way before the system closes its sockets.
            if others <= self._drained | self.channel.gone:
                self.exposed.discard(number)
        return number not in self.exposed

    def _abort_links(self) -> None:
        """Let go of links after a failure, of threads and kernels that still wait for a message on them.

        The group itself stays as it is: it belongs to the program.
        """
        for each in self.guarded:
            each.release()
        for (device_type, _), links in self._links.items():
            if links is self._group():
                continue
            if device_type != "cuda":
                # A message that nobody sends, waited for no time at all, makes gloo close all connections.
                with contextlib.suppress(RuntimeError):
                    links.recv([torch.empty(1)], (self.rank + 1) % self.ranks, _NEVER).wait(
                        timedelta(milliseconds=1)
                    )
                continue
            with contextlib.suppress(RuntimeError, AttributeError):
                # Its peers may be gone, which is why it goes. Backends of older torch cannot be aborted: there
                # those threads wait until their time-out.
                links.abort()

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
        if kind not in self._links:
            own = self.channel is not None and (limited or device_type != "cuda")
            self._links[kind] = self._new_links(*kind) if own else self._group()
        return self._links[kind]

    def _connect(self, links: Any, device: torch.device, peers: Sequence[int]) -> None:
        """Have NCCL connect pairs of ranks now, while all are in step.

        It does so with the first message of a pair, and holds up the host until both ranks are there: for ever, if
        one of them has failed by then.
        """
        for low, high in sorted((min(self.rank, peer), max(self.rank, peer)) for peer in peers):
            if (low, high) in self._connected:
                continue
            token = torch.zeros(1, device=device)
            if self.rank == low:
                links.send([token], high, 0).wait()
            else:
                links.recv([token], low, 0).wait()
            self._connected.add((low, high))

    def _new_links(self, device_type: str, limited: bool) -> Any:
        assert self.channel is not None
        # dist.new_group names groups by how many there are, which ranks of several groups count differently.
        name = f"{'links' if limited else 'collectives'} on {device_type}, renewed {self._renewals} times"
        store = dist.PrefixStore(name, self.channel.store)  # type: ignore[attr-defined]
        timeout = timedelta(seconds=self.channel.timeout_s)
        try:
            if device_type != "cuda":
                return dist.ProcessGroupGloo(store, self.rank, self.ranks, timeout)
            options = dist.ProcessGroupNCCL.Options()
            # Torch ends the process at its time-out; by then this rank has told who it waited for.
            options._timeout = 2 * timeout + timedelta(seconds=10)
            if limited:
                options.config.max_ctas = LINK_CTAS
            return dist.ProcessGroupNCCL(store, self.rank, self.ranks, options)
        except RuntimeError as error:
            raise self.explain(None, error, "start") from error

    def weights(self, model: Any) -> int:
        """The digest of a model's weights, taken once for this group."""
        known = self._weights.get(model)
        if known is None:
            known = self._weights[model] = weights_digest(model)
        return known

    @property
    def renewals(self) -> int:
        """How often the group was renewed."""
        return self._renewals

    def _now(self, doing: Doing) -> None:
        if self.channel is not None:
            self.channel.doing = doing


@dataclass
class Turn:
    """One prefill of a group on this rank.

    Attributes:
        number: of this prefill in its group; 0 without a group.
        compare: whether ranks compare what they are about to run.
        open: whether other ranks may be running it, so that a failure leaves them out of step.
        threads: those that carry its messages.
        waits_in: tells the layer in which this rank's device waits for another rank, as `phase` would; None while
            it waits for none.
    """

    of: Agreement | None
    number: int = 0
    compare: bool = False
    open: bool = field(default=False, init=False)
    threads: list[threading.Thread] = field(default_factory=list, init=False)
    waits_in: Callable[[], str | None] = field(default_factory=lambda: lambda: None, init=False)
    _phase: str = field(default="", init=False)

    def checked(self, check: Callable[[], Any]) -> Any:
        """The result of ``check``, whose error is told to the other ranks in place of a statement.

        Raises:
            RankError: other ranks would have run this prefill.
        """
        try:
            return check()
        except BaseException as error:
            if not isinstance(error, Exception):
                self.open = self.compare  # others are told that this one was interrupted
                raise
            if self.of is not None and self.compare:
                text = _one_line(error)
                said = text if isinstance(error, KVRError) else f"{type(error).__name__}: {text}"
                every = self._exchange(Statement(number=self.number, refusal=said))
                self.open = False
                if not all(each.refusal for each in every):
                    raise _refused(every) from error
            raise

    def agree(
        self,
        method: str,
        model: Any,
        input_ids: torch.Tensor,
        prompt: int,
        *,
        sizes: Sequence[int] = (),
        past: int = 0,
        past_held: Sequence[float] = (),
        topology: str = "",
        limits: object = "",
    ) -> None:
        """Compare with all other ranks what is about to run.

        Args:
            input_ids: the prompt, ``[batch, context]``.
            prompt: its digest.

        Raises:
            RankError: ranks disagree; it names the item and the ranks. Or one is gone, stopped or late.
        """
        if self.of is not None and self.compare:
            agreement = self.of
            mine = self.checked(
                lambda: Statement(
                    number=self.number,
                    method=method,
                    model=geometry_digest(model),
                    layers=layers_digest(model),
                    dtype=str(model.dtype).removeprefix("torch."),
                    device=input_ids.device.type,
                    weights=agreement.weights(model),
                    batch=input_ids.shape[0],
                    past=past,
                    past_held=tuple(past_held),
                    context=input_ids.shape[1],
                    prompt=prompt,
                    sizes=tuple(sizes),
                    topology=topology,
                    limits=str(limits),
                )
            )
            every = self._exchange(mine)
            # All compare with the first rank, so that all come to the same end.
            every = [
                msgspec.structs.replace(each, past_held=every[0].past_held)
                if same_past(each.past_held, every[0].past_held, mine.dtype)
                else each
                for each in every
            ]
            if any(other != every[0] for other in every):
                # Nobody runs it, so all are in step; unless they count differently.
                self.open = len({other.number for other in every}) > 1
                raise _disagreement(every)
        self.open = True
        self.now("the time before the first layer")

    def _exchange(self, mine: Statement) -> list[Statement]:
        assert self.of is not None
        self.open = True
        self._phase = "agreement"
        return [_statement(body) for body in self.exchange(_encode(mine))]

    def exchange(self, mine: bytes) -> list[bytes]:
        """What every rank tells all others now, in order of ranks.

        Raises:
            RankError: a rank is gone, stopped, late, or failed.
        """
        assert self.of is not None
        return self.of.exchange(mine, self.phase)

    def expose(self) -> Callable[[], bool]:
        """Note that peers are about to be told where to write.

        Returns:
            Whether they may still be writing there.
        """
        assert self.of is not None
        self.of.exposed.add(self.number)
        of, number = weakref.ref(self.of), self.number

        def written() -> bool:
            agreement = of()
            return agreement is not None and not agreement.settled(number)

        return written

    def now(self, what: str) -> None:
        """Note what is under way, for errors and for ranks that ask."""
        self._phase = what
        self.wait_for(None)

    def wait_for(self, peer: int | None) -> None:
        """Note the rank that this one waits for, or that it waits no more."""
        if self.of is not None and self.of.channel is not None:
            self.of.channel.doing = Doing(f"in {self.phase}", peer)

    @property
    def phase(self) -> str:
        """What is under way, with the number of the prefill."""
        return f"{self._phase} of prefill {self.number}" if self.number else self._phase

    @property
    def change(self) -> threading.Condition:
        """What links wait on; a failure of another rank notifies it."""
        return threading.Condition() if self.of is None else self.of.change

    @property
    def failure(self) -> RankError | None:
        """What another rank, or this one, has failed of."""
        return None if self.of is None else self.of.failure

    def wait_for_device(self, event: torch.cuda.Event, peer: int) -> None:
        """Wait for an event of a CUDA stream, but not for one that a rank which failed will never let happen.

        Args:
            peer: the rank whose messages the stream waits for.

        Raises:
            RankError: another rank failed, died or stopped.
        """
        if self.of is None or self.of.channel is None:
            event.synchronize()
            return
        channel = self.of.channel
        until = time.monotonic() + channel.timeout_s
        self.wait_for(peer)
        while not event.query():
            if self.failure is not None:
                raise self.failed()
            # One that left with a goodbye has done its part.
            died = [rank for rank in channel.gone if not channel.has_left(rank)]
            if died:
                raise channel.lost(min(died), self.waits_in() or self.phase)
            if time.monotonic() > until:
                raise channel.culprit([peer], self.waits_in() or self.phase, channel.timeout_s)
            time.sleep(0)  # lets go of the interpreter, without which no failure comes in
        self.wait_for(None)

    def failed(self) -> RankError:
        """The error of the rank that failed, with the layer in which this one waited for KV that never came."""
        failure, where = self.failure, self.waits_in()
        assert failure is not None
        if where is None or where == failure.phase:
            return failure
        error = RankError(
            f"{failure}; rank {self.of.rank if self.of is not None else 0} was in {where}",
            rank=failure.rank,
            kind=failure.kind,
            phase=where,
        )
        error.__cause__ = failure
        return error

    def explain(self, peer: int | None, error: BaseException) -> RankError:
        """Who is to blame for a link to ``peer`` that broke; see `Agreement.explain`."""
        assert self.of is not None
        return self.of.explain(peer, error, self.phase)


def agreement_of(group: dist.ProcessGroup | None, agree: bool = True) -> Agreement:
    """The agreement of a process group, the default one when None; made at the first call, by all its ranks.

    Args:
        agree: whether ranks tell each other what they run. Groups that have NCCL meet all the same: links of their
            own take it.

    Raises:
        RankError: ranks cannot reach each other.
        PartitionError: there is no process group, or this process is not in it.
    """
    if not dist.is_initialized():
        raise PartitionError(
            "there is no process group: call torch.distributed.init_process_group, or use a partition of one chunk"
        )
    real: Any = dist.group.WORLD if group is None else group
    if not isinstance(real, dist.ProcessGroup) or dist.get_rank(real) < 0:
        raise PartitionError("this process is not a rank of the group")
    with _making:
        making = _meetings.setdefault(real, threading.Lock())
    with making:
        agree = agree or "nccl" in dist.get_backend_config(real)
        known = _agreements.get(real)
        if known is None or (agree and known.channel is None):
            channel = meet(real, timeout_s(real)) if agree and dist.get_world_size(real) > 1 else None
            before = known
            known = _agreements[real] = Agreement(real, channel)
            if before is not None:
                known.number = before.number
            if channel is not None:
                weakref.finalize(real, channel.leave)
        return known


def renew(group: dist.ProcessGroup | None = None) -> None:
    """Make a group usable again after a prefill failed on one of its ranks; all of them call this.

    They get links of their own, on which nothing of the failed prefill can arrive. Ranks that died or stopped
    cannot be renewed.

    Args:
        group: that of the failed prefill.

    Raises:
        RankError: a rank is gone, stopped, or did not call this in time.
    """
    agreement_of(group).renew()


def _one_line(error: BaseException) -> str:
    """The first line of an error's message, without what gloo adds for its own developers."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line.split(". This is typically caused by")[0]
    return line.split("] ", 1)[1] if line.startswith("[/") and "] " in line else line


def is_link_error(error: BaseException) -> bool:
    """Whether this is how a process group tells of a peer that is gone or late."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def as_rank_error(error: BaseException, rank: int | None, phase: str) -> RankError:
    """An error of a rank as all ranks are told of it."""
    if isinstance(error, RankError):
        return error
    if isinstance(error, NotFiniteError):
        return RankError(str(error), rank=error.rank, kind="not-finite", phase=phase)
    text = _one_line(error)
    who = "a rank" if rank is None else f"rank {rank}"
    where = f" in {phase}" if phase else ""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RankError(f"{who} ran out of memory{where}: {text}", rank=rank, kind="out-of-memory", phase=phase)
    said = text if isinstance(error, KVRError) else f"{type(error).__name__}: {text}"
    return RankError(f"{who} failed{where}: {said}", rank=rank, kind="error", phase=phase)


def _refused(every: Sequence[Statement]) -> RankError:
    refusing = [rank for rank, each in enumerate(every) if each.refusal]
    return RankError(
        f"{named_ranks(refusing)} refused prefill {every[0].number}, and other ranks did not: "
        f"{every[refusing[0]].refusal}",
        rank=refusing[0] if len(refusing) == 1 else None,
        kind="disagreement",
        phase=f"agreement of prefill {every[0].number}",
    )


def _disagreement(every: Sequence[Statement]) -> RankError:
    if any(each.refusal for each in every):
        return _refused(every)
    item = next(item for item in _ITEMS if len({getattr(each, item) for each in every}) > 1)
    holders: dict[Any, list[int]] = {}
    for rank, each in enumerate(every):
        holders.setdefault(getattr(each, item), []).append(rank)
    parts = sorted(holders.items(), key=lambda pair: (-len(pair[1]), pair[1]))
    # A majority is taken to be right; of two ranks nobody can tell.
    most = len(parts[0][1])
    minority = [rank for _, ranks in parts[1:] for rank in ranks]
    culprit = minority[0] if len(minority) == 1 and most > 1 else None
    said = ", ".join(
        f"{named_ranks(ranks)} {'have' if len(ranks) > 1 else 'has'} {_shown(value)}" for value, ranks in parts
    )
    if item in _DIGESTS:
        said = f"{named_ranks(sorted(minority))} {'differ' if len(minority) > 1 else 'differs'} from "
        said += named_ranks(parts[0][1])
    return RankError(
        f"ranks disagree about {_ITEMS[item]} of prefill {every[0].number}: {said}; give every rank the same",
        rank=culprit,
        kind="disagreement",
        phase=f"agreement of prefill {every[0].number}",
    )


def _shown(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def timeout_s(group: Any) -> float:
    """Seconds that messages of a process group may take."""
    for kind in ("cpu", "cuda"):
        with contextlib.suppress(Exception):  # private to torch, and not there for every backend
            backend: Any = group._get_backend(torch.device(kind))
            return float(backend.options._timeout.total_seconds())
    return DEFAULT_TIMEOUT_S


_agreements: weakref.WeakKeyDictionary[Any, Agreement] = weakref.WeakKeyDictionary()
_meetings: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()
_making = threading.Lock()
