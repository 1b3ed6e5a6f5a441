"""The turns of a process group on one rank, its failures and its renewal."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist

from kvr_partition.errors import NotFiniteError, PartitionError, RankError
from kvr_partition.runtime.agreement.backends import Backends, timeout_s
from kvr_partition.runtime.agreement.failures import as_rank_error, one_line
from kvr_partition.runtime.agreement.turn import Turn
from kvr_partition.runtime.channel import IDLE, Channel, Doing
from kvr_partition.runtime.digests import weights_digest
from kvr_partition.runtime.meeting import meet


class _Note(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells all others in one step of a turn."""

    renewals: int
    body: bytes


class _Trouble(msgspec.Struct, frozen=True, array_like=True):
    """A `RankError` as it is sent to the other ranks."""

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
        self._change = threading.Condition() if channel is None else channel.change
        self._busy = threading.Lock()
        self._renewals = 0
        self._barriers = 0
        self._failure: RankError | None = None
        self._early: _Trouble | None = None
        self._backends = Backends(
            self.rank, self.ranks, channel, weakref.ref(group), weakref.WeakMethod(self.explain)
        )
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
        text = one_line(error)
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
                if (latest := max(message.renewals for message in heard.values())) > target:
                    target, heard = latest, {rank: each for rank, each in heard.items() if each.renewals == latest}
                    heard[self.rank] = _Renewal(latest, self.number)
                    self.channel.tell("renewal", _encode(heard[self.rank]))
            self._abort_links()
            with self._change:
                self._renewals = target
                self.number = max(message.number for message in heard.values())
                self._barriers = 0
                self._drained.clear()
                self.exposed.clear()  # nobody tells a renewal before its device has come to an end
                early = self._early
                self._failure = early.error() if early is not None and early.renewals == target else None
            self._backends.renew(target)
        finally:
            self._now(IDLE)
            self._busy.release()

    def _drain(self) -> bool:
        """Wait until this rank's device writes to nobody any more, and tell the others."""
        if self.channel is None:
            return True
        drained = True
        for guard in self.guarded:
            drained = guard.drain(self.channel.timeout_s) and drained
        if drained:
            self.channel.tell("drained", _encode(self._renewals))
        return drained

    def settled(self, number: int) -> bool:
        """Whether no rank can still write to rows that a turn exposed: it ended well, or all have drained."""
        if number in self.exposed and self._failure is not None and self.channel is not None:
            others = set(range(self.ranks)) - {self.rank}
            # The driver ends what a process had under way before the system closes its sockets.
            if others <= self._drained | self.channel.gone:
                self.exposed.discard(number)
        return number not in self.exposed

    def _abort_links(self) -> None:
        """Let go of links after a failure, and of what this rank's device waits for."""
        for guard in self.guarded:
            guard.release()
        self._backends.abort()

    def links(self, device: torch.device, peers: Sequence[int]) -> Any:
        """What carries the KV of this group's prefills, see `Backends.links`."""
        return self._backends.links(device, peers)

    def collectives(self, device: torch.device) -> Any:
        """What gathers KV, see `Backends.collectives`."""
        return self._backends.collectives(device)

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


_agreements: weakref.WeakKeyDictionary[Any, Agreement] = weakref.WeakKeyDictionary()
_meetings: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()
_making = threading.Lock()
