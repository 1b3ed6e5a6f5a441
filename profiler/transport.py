"""How requests reach ranks: processes of our own, or the world that ``torchrun`` made."""

from __future__ import annotations

import contextlib
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
from typing import Any, Protocol

import msgspec

from kvr_partition.errors import KVRError, RankError, UnsupportedError
from profiler import messages


class Transport(Protocol):
    """How requests reach all ranks and replies come back."""

    def exchange(
        self, requests: Sequence[messages.Request], on_token: Callable[[messages.Token], None] | None = None
    ) -> list[messages.Reply]:
        """Send each rank its request and wait for every rank's reply; raises `RankError`."""

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


def in_torchrun() -> bool:
    """Whether this process is one of several that ``torchrun`` started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_follower() -> bool:
    """Whether this process only serves another one that drives."""
    return in_torchrun() and os.environ["RANK"] != "0"


class Joined:
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


def join(
    ranks: int, backend: str, timeout_s: float, setups: Callable[[str, Sequence[str]], Sequence[messages.Setup]]
) -> Transport:
    """Become a rank of the ``torchrun`` world; only rank 0 comes back, the others serve it and leave the program.

    Args:
        setups: of all ranks, given the rendezvous and each rank's device.

    Raises:
        UnsupportedError: the world has another size.
        KVRError: on a follower: what failed there.
    """
    from datetime import timedelta

    import torch.distributed as dist

    from profiler.worker import Worker

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if world != ranks:
        raise UnsupportedError(
            f"torchrun started {world} processes, but {ranks} ranks were asked for; use --ranks {world}"
        )
    local = os.environ.get("LOCAL_RANK", "0")
    devices = [f"cuda:{local}" if backend == "cuda" else "cpu"] * world
    worker = Worker(setups("env://", devices)[rank])
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    if rank == 0:
        return Joined(worker, control)
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
