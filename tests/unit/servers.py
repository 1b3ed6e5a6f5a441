"""Servers that tests start for themselves and end again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL server of its own behind a socket file; skips where there is none to start."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("PostgreSQL's server is not installed")
    # The server refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="kvr-pg-", dir="/tmp") as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        made = subprocess.run(
            ["initdb", "-D", folder / "data", "-U", "kvr", "--auth=trust", "--no-sync"],
            user=user, capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"initdb cannot run here: {made.stderr.strip()[-200:]}")
        server = subprocess.Popen(
            ["postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"],
            user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        try:
            _wait(lambda: (folder / ".s.PGSQL.5432").exists())
            url = f"postgresql+psycopg://kvr@/postgres?host={folder}"
            _wait(lambda: _answers(url))
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # without waiting for clients to leave
            server.wait(20)


@contextlib.contextmanager
def optuna_proxy(storage: str) -> Iterator[str]:
    """Optuna's gRPC proxy in front of a storage."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import optuna; from kvr_partition.search.storage import open_storage; "
        f"optuna.storages.run_grpc_proxy_server(open_storage({storage!r}), host='127.0.0.1', port={port})"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        _wait(lambda: _listens(port))
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(url: str) -> bool:
    import sqlalchemy

    engine = sqlalchemy.create_engine(url)
    try:
        engine.connect().close()
    except sqlalchemy.exc.OperationalError:
        return False
    finally:
        engine.dispose()
    return True


def _wait(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < until, "the server does not answer"
        time.sleep(0.1)
