"""The process of a rank: a worker that serves requests until told to stop or left alone."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading

from kvr_partition.frames import Frames, framed
from kvr_partition.runtime.channel import Doing
from profiler import messages
from profiler.serving import Serving, failed


class _Process:
    """What the thread that listens and the one that works share."""

    def __init__(self, control: socket.socket) -> None:
        self.requests: queue.SimpleQueue[messages.Request] = queue.SimpleQueue()
        self.worker: Serving | None = None
        self._control = control
        self._sending = threading.Lock()

    def send(self, reply: messages.Reply) -> None:
        """Tell the driver something."""
        with self._sending:
            self._control.sendall(framed(messages.encode(reply)))

    def listen(self) -> None:
        """Queue requests; when the driver is gone, be gone too, whatever the rank is doing."""
        frames = Frames()
        while True:
            try:
                data = self._control.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                os._exit(1)
            for body in frames.feed(data):
                request = messages.decode_request(body)
                if isinstance(request, messages.Ping):
                    doing = Doing("starting") if self.worker is None else self.worker.doing
                    self.send(messages.Pong(request.number, doing.what, doing.waits_for))
                else:
                    self.requests.put(request)


def main() -> None:
    """Entry of a spawned rank: ``python -m profiler.process CONTROL_SOCKET``."""
    # Ctrl-C in the terminal is for the driver; it tells us to close.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _die_with_parent()
    process = _Process(socket.socket(fileno=int(sys.argv[1])))
    threading.Thread(target=process.listen, daemon=True).start()
    setup = process.requests.get()
    assert isinstance(setup, messages.Setup)
    try:
        process.worker = _worker_for(setup)
    except Exception as error:
        process.send(failed(error, setup.rank, "start"))
        return
    process.send(process.worker.ready())
    while not isinstance(request := process.requests.get(), messages.Close):
        process.send(process.worker.serve(request, process.send))
    # Leaving through the interpreter would wait for peers that may already be gone.
    os._exit(0)


def _worker_for(setup: messages.Setup) -> Serving:
    if setup.backend == "sm":
        from profiler.sm.worker import sm_worker

        return sm_worker(setup)
    from profiler.worker import Worker

    return Worker(setup)


def _die_with_parent() -> None:
    """Have the kernel end us with the driver, even while native code holds the interpreter (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    main()
