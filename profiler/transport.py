"""How requests reach ranks: processes of our own, or the world that ``torchrun`` made."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from kvr_partition.errors import RankError, UnsupportedError, named_ranks
from kvr_partition.frames import Frames, framed
from profiler import messages
from profiler.messages import PHASES

if TYPE_CHECKING:
    from kvr_partition.runtime.agreement import Agreement
    from profiler.worker import Worker

ANSWER_S = 2.0
"""Seconds within which a process that still runs answers."""


class Transport(Protocol):
    """How requests reach all ranks and replies come back."""

    def exchange(
        self, requests: Sequence[messages.Request], on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        """Send each rank its request and wait for every rank's reply; raises `RankError`."""

    def survives(self, error: BaseException) -> bool:
        """Whether the next request may follow after this error; otherwise the ranks are to be ended."""

    def close(self) -> None:
        """End all ranks; never raises, leaves nothing running."""


class Spawned:
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
        self._frames = [Frames() for _ in setups]
        self._pings = 0
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
        # Streams beyond the default 8 share hardware queues, and so wait for each other.
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with self._output(setup.rank).open("wb") as output, theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "profiler.process", str(theirs.fileno())],
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
        whole = msgspec.structs.replace(setup, rendezvous=rendezvous, scratch=scratch)
        with contextlib.suppress(OSError):  # it has ended already, which the first exchange will tell of
            ours.sendall(framed(messages.encode(whole)))

    @property
    def pids(self) -> list[int]:
        """Process of each rank."""
        return [process.pid for process in self._processes]

    def exchange(
        self, requests: Sequence[messages.Request], on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        phase = PHASES.get(type(requests[0]), "request") if requests else "start"
        for rank, request in enumerate(requests[: len(self._sockets)]):
            try:
                self._sockets[rank].sendall(framed(messages.encode(request)))
            except OSError:
                raise worst({rank: self._death(rank, phase)}) from None
        replies: dict[int, messages.Reply] = {}
        failures: dict[int, messages.Failed] = {}
        deadline = time.monotonic() + self._timeout_s
        until: float | None = None
        with self._selector() as selector:
            while len(replies | failures) < len(self._sockets):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    if failures:
                        break
                    raise self._timed_out([r for r in range(len(self._sockets)) if r not in replies], phase)
                for key, _ in ready:
                    rank = key.data
                    bodies = self._receive(rank)
                    if bodies is None:
                        selector.unregister(key.fileobj)
                        # What it said last tells more than how it ended.
                        failures.setdefault(rank, self._death(rank, phase))
                        bodies = []
                    for body in bodies:
                        reply = messages.decode_reply(body)
                        if isinstance(reply, messages.Token):
                            # Decoding may take as long as it likes, as long as it goes on.
                            deadline, phase = time.monotonic() + self._timeout_s, "decode"
                            if on_token is not None:
                                on_token(reply)
                        elif isinstance(reply, messages.Failed):
                            failures[rank] = reply
                        else:
                            replies[rank] = reply
                if failures:
                    # Others may yet say what really happened; the first to notice is often a victim.
                    until = until or time.monotonic() + 2 * ANSWER_S
                    deadline = min(deadline, until)
                    if time.monotonic() > until:
                        break
        if failures:
            raise worst(failures)
        answers = [replies[rank] for rank in range(len(self._sockets))]
        return [
            each for reply in answers for each in (reply.replies if isinstance(reply, messages.Many) else (reply,))
        ]

    def survives(self, error: BaseException) -> bool:
        # Ranks that share a process are never out of step, and memory that did not suffice is free again.
        return self._shared and isinstance(error, RankError) and error.kind in ("out-of-memory", "not-finite")

    def close(self) -> None:
        for control in self._sockets:
            with contextlib.suppress(OSError):
                control.sendall(framed(messages.encode(messages.Close())))
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

    def _selector(self) -> selectors.BaseSelector:
        selector = selectors.DefaultSelector()
        for rank, control in enumerate(self._sockets):
            selector.register(control, selectors.EVENT_READ, rank)
        return selector

    def _receive(self, rank: int) -> list[bytes] | None:
        """The messages that have come from a rank; None when its socket has closed."""
        try:
            data = self._sockets[rank].recv(1 << 16)
        except OSError:
            data = b""
        return self._frames[rank].feed(data) if data else None

    def _output(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}.txt"

    def _printed(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return self._output(rank).read_text(errors="replace")[-8000:]
        return ""

    def _death(self, rank: int, phase: str) -> messages.Failed:
        try:
            code = self._processes[rank].wait(2.0)
        except subprocess.TimeoutExpired:
            return messages.Failed(
                "died", f"rank {rank} closed its control socket", self._printed(rank), phase, rank
            )
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return messages.Failed("died", f"rank {rank} {how}", self._printed(rank), phase, rank)

    def _timed_out(self, late: list[int], phase: str) -> RankError:
        """The error about the rank that all others wait for: it does not answer, or waits for nobody."""
        answers = self._ask(late)
        silent = [rank for rank in late if rank not in answers]
        # Have the late ranks write down where they are before they are ended.
        for rank in late:
            with contextlib.suppress(OSError):
                self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        printed = "\n".join(f"rank {rank}:\n{self._printed(rank)}" for rank in late)
        if silent:
            reason = f"{named_ranks(silent)} did not answer within {self._timeout_s:g} s: stopped, or hanging"
            culprit = silent[0]
        else:
            waiting = {rank: pong for rank, pong in answers.items() if pong.waits_for is not None}
            culprit = next((rank for rank in late if rank not in waiting), late[0])
            reason = f"rank {culprit} did not answer within {self._timeout_s:g} s; it is {answers[culprit].doing}"
        return RankError(
            f"{reason}; the group was ended (raise --timeout if the work is this long)",
            rank=culprit,
            kind="timeout",
            phase=phase,
            traceback=printed,
        )

    def _ask(self, ranks: Sequence[int]) -> dict[int, messages.Pong]:
        """What the processes of some ranks are at; one that is stopped or holds the interpreter does not say."""
        self._pings += 1
        ping = framed(messages.encode(messages.Ping(self._pings)))
        answers: dict[int, messages.Pong] = {}
        deadline = time.monotonic() + ANSWER_S
        for rank in ranks:
            with contextlib.suppress(OSError):
                self._sockets[rank].sendall(ping)
        with self._selector() as selector:
            while len(answers) < len(ranks) and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    bodies = self._receive(key.data)
                    if bodies is None:
                        selector.unregister(key.fileobj)
                    for body in bodies or ():
                        reply = messages.decode_reply(body)
                        if isinstance(reply, messages.Pong) and reply.number == self._pings:
                            answers[key.data] = reply
        return answers


def worst(failures: dict[int, messages.Failed]) -> RankError:
    """The failure that explains the others: a death, then what a rank says of itself, then what others say."""

    def order(item: tuple[int, messages.Failed]) -> tuple[int, int, int]:
        rank, failure = item
        kinds = {"died": 0, "out-of-memory": 1, "not-finite": 1, "error": 2, "start": 2}
        victim = failure.culprit is not None and failure.culprit != rank
        return (0 if failure.kind == "died" else 2 if victim else 1, kinds.get(failure.kind, 3), rank)

    rank, failure = min(failures.items(), key=order)
    phase = failure.phase
    if failure.kind == "died":
        # Those that noticed know best what was under way.
        seen = (other.phase for other in failures.values() if other.culprit == rank and other.kind != "died")
        phase = next(seen, phase)
    kind = failure.kind if failure.kind != "died" else "start" if phase == "start" else "lost"
    return RankError(failure.message, rank=failure.culprit, kind=kind, phase=phase, traceback=failure.traceback)


def in_torchrun() -> bool:
    """Whether this process is one of several that ``torchrun`` started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_follower() -> bool:
    """Whether this process only serves another one that drives."""
    return in_torchrun() and os.environ["RANK"] != "0"


class Joined:
    """The driver inside a ``torchrun`` world: it is rank 0 and leads the others over their channel."""

    def __init__(self, worker: Worker, agreement: Agreement) -> None:
        self._worker = worker
        self._agreement = agreement
        assert agreement.channel is not None
        self._channel = agreement.channel
        self._asked = 0
        self._broken: RankError | None = None

    def exchange(
        self, requests: Sequence[messages.Request], on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        if self._broken is not None:
            raise RankError(
                f"this torchrun world has lost a rank: {self._broken}; start it anew",
                rank=self._broken.rank,
                kind=self._broken.kind,
                phase=self._broken.phase,
            )
        tell = on_token or (lambda _: None)
        number, self._asked = self._asked, self._asked + 1
        phase = PHASES.get(type(requests[0]), "request") if requests else "start"
        for rank, request in enumerate(requests[1:], start=1):
            self._channel.tell(f"request {number}", messages.encode(request), to=rank)
        own = self._worker.serve(requests[0], lambda reply: _stream(reply, tell)) if requests else None
        replies: dict[int, messages.Reply] = {0: self._worker.ready() if own is None else own}
        missing = set(range(1, self._agreement.ranks))
        while missing:
            failed = any(isinstance(reply, messages.Failed) for reply in replies.values())
            try:
                # Once one has failed, the others are about to, or never will.
                heard = self._channel.hear_any(
                    f"reply {number}", phase, missing, timeout_s=4 * ANSWER_S if failed else None
                )
            except RankError as error:
                for rank in missing:
                    replies[rank] = failed_with(error)
                break
            for rank, body in heard.items():
                reply = messages.decode_reply(body)
                if isinstance(reply, messages.Token):
                    tell(reply)
                else:
                    replies[rank] = reply
                    missing.discard(rank)
        failures = {rank: reply for rank, reply in replies.items() if isinstance(reply, messages.Failed)}
        if failures:
            raise worst(failures)
        return [replies[rank] for rank in range(self._agreement.ranks)]

    def survives(self, error: BaseException) -> bool:
        if not isinstance(error, Exception):
            return False  # an interrupt ends the program
        # Only torchrun can start a rank again. If all are alive they renew their group; else this world is broken.
        try:
            self.exchange([messages.Renew()] * self._agreement.ranks)
        except RankError as worse:
            if self._broken is None:
                self._broken = error if isinstance(error, RankError) else worse
        return True

    def close(self) -> None:
        self._channel.tell(f"request {self._asked}", messages.encode(messages.Close()))
        self._worker.leave()


def _stream(reply: messages.Reply, tell: Callable[[messages.Token], None]) -> None:
    if isinstance(reply, messages.Token):
        tell(reply)


def failed_with(error: RankError) -> messages.Failed:
    """A `RankError` as the reply of a rank that gave none."""
    return messages.Failed(error.kind, str(error), error.traceback, error.phase, error.rank)


def join(
    ranks: int, backend: str, timeout_s: float, setups: Callable[[str, Sequence[str]], Sequence[messages.Setup]]
) -> Transport:
    """Become a rank of the ``torchrun`` world; only rank 0 comes back, the others serve it and leave the program.

    Args:
        setups: of all ranks, given the rendezvous and each rank's device.

    Raises:
        UnsupportedError: the world has another size.
        RankError: a rank could not start, or, on a follower, the driver is gone.
    """
    from profiler.worker import Worker

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if world != ranks:
        raise UnsupportedError(
            f"torchrun started {world} processes, but {ranks} ranks were asked for; use --ranks {world}"
        )
    local = os.environ.get("LOCAL_RANK", "0")
    devices = [f"cuda:{local}" if backend == "cuda" else "cpu"] * world
    worker = Worker(setups("env://", devices)[rank])
    agreement = worker.agreement
    assert agreement is not None
    assert agreement.channel is not None
    if rank == 0:
        return Joined(worker, agreement)
    channel = agreement.channel
    channel.tell("reply 0", messages.encode(worker.ready()), to=0)
    asked = 1
    while True:
        # The driver may take as long as it likes between two requests.
        body = channel.hear(f"request {asked}", "waiting for the driver", [0], timeout_s=math.inf)[0]
        request = messages.decode_request(body)
        if isinstance(request, messages.Close):
            worker.leave()
            raise SystemExit(0)
        answer_to = f"reply {asked}"
        reply = worker.serve(request, lambda token, to=answer_to: channel.tell(to, messages.encode(token), to=0))  # type: ignore[misc]
        channel.tell(answer_to, messages.encode(reply), to=0)
        asked += 1
