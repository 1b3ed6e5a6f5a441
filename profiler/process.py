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

from profiler import messages
from profiler.worker import Worker, failed


def main() -> None:
    """Entry of a spawned rank: ``python -m profiler.process CONTROL_SOCKET``."""
    # Ctrl-C in the terminal is for the driver; it tells us to close.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _die_with_parent()
    control = socket.socket(fileno=int(sys.argv[1]))
    requests: queue.SimpleQueue[messages.Request] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(control, requests), daemon=True).start()

    def send(reply: messages.Reply) -> None:
        control.sendall(messages.encode(reply))

    setup = requests.get()
    assert isinstance(setup, messages.Setup)
    try:
        worker = _worker_for(setup)
    except Exception as error:
        send(failed(error))
        return
    send(worker.ready())
    while not isinstance(request := requests.get(), messages.Close):
        send(worker.serve(request, send))
    # Leaving through the interpreter would wait for peers that may already be gone.
    control.close()
    os._exit(0)


def _worker_for(setup: messages.Setup) -> Worker:
    if setup.backend == "sm":
        from profiler.sm import SMWorker

        return SMWorker(setup)
    return Worker(setup)


def _listen(control: socket.socket, requests: queue.SimpleQueue[messages.Request]) -> None:
    """Queue requests; when the driver is gone, be gone too, whatever the rank is doing."""
    inbox = messages.Inbox()
    while True:
        try:
            data = control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            os._exit(1)
        for body in inbox.feed(data):
            requests.put(messages.decode_request(body))


def _die_with_parent() -> None:
    """Have the kernel end us with the driver, even while native code holds the interpreter (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    main()
