"""One prefill of a group on a rank: what is agreed on, what is under way, who it waits for."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from kvr_partition.errors import KVRError, RankError
from kvr_partition.runtime.agreement.failures import one_line
from kvr_partition.runtime.agreement.statement import Statement, disagreement, refused
from kvr_partition.runtime.channel import Doing
from kvr_partition.runtime.digests import geometry_digest, layers_digest, same_past

if TYPE_CHECKING:
    from kvr_partition.runtime.agreement.core import Agreement

_encode = msgspec.msgpack.Encoder().encode
_statement = msgspec.msgpack.Decoder(Statement).decode


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
                text = one_line(error)
                said = text if isinstance(error, KVRError) else f"{type(error).__name__}: {text}"
                every = self._exchange(Statement(number=self.number, refusal=said))
                self.open = False
                if not all(statement.refusal for statement in every):
                    raise refused(every) from error
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
                msgspec.structs.replace(statement, past_held=every[0].past_held)
                if same_past(statement.past_held, every[0].past_held, mine.dtype)
                else statement
                for statement in every
            ]
            if any(other != every[0] for other in every):
                # Nobody runs it, so all are in step; unless they count differently.
                self.open = len({other.number for other in every}) > 1
                raise disagreement(every)
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
        """Note that peers are about to learn where to write.

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

    def settle(self, device: torch.device, peer: int) -> None:
        """Wait for what is enqueued on the current stream of a CUDA device, see `wait_for_device`."""
        if device.type == "cuda":
            self.wait_for_device(torch.cuda.current_stream(device).record_event(), peer)

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
