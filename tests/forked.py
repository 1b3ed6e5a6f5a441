"""Processes forked from one that has imported what they need, for tests that start many.

Importing torch and transformers takes far longer than most of what a test runs. The processes are real, with their
own sockets, signals and memory; what they start with is what ``python -m`` would give them. Tests of how processes
start and end on their own use `subprocess` as ever.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def ranks_environment() -> dict[str, str]:
    """One thread a rank, over loopback, with this checkout importable from any script."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
    }


PRELOADED = [
    "optuna",
    "sklearn.ensemble",
    "transformers.generation",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("auto", "llama", "mistral", "qwen2", "falcon")),
    "kvr_partition.cli.main",
    "kvr_partition.training",
    "profiler.linktest",
    "profiler.process",
    *(f"tests.ranks.{name}" for name in ("agreement", "asleep", "exactness")),
]


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(ranks_environment())
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Forked:
    """A process, with what tests and `profiler.transport` use of `subprocess.Popen`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        output: Path,
        errors: Path | None = None,
        given: Path | None = None,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        first: str = "",
        control: int | None = None,
    ) -> None:
        """``python -m module arguments``.

        Args:
            module: whose ``main`` runs.
            output, errors: files of what it prints; all in one where there is no second.
            given: a file it reads as its standard input.
            env: its environment; that of ranks when None.
            first: code that runs before.
            control: a file descriptor it gets as its one argument.
        """
        self._process = _context().Process(
            target=_become,
            args=(module, [*arguments], output, errors, given, cwd, env or ranks_environment(), first),
            kwargs={"control": None if control is None else _Descriptor(control)},
        )
        self._process.start()
        self.args = [module, *arguments]

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self._process.kill()


class _Descriptor:
    """A file descriptor on its way to a process that is being started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _received, (multiprocessing.reduction.DupFd(self.number),)


def _received(sent: Any) -> int:
    return int(sent.detach())


def _become(
    module: str,
    arguments: list[str],
    output: Path,
    errors: Path | None,
    given: Path | None,
    cwd: Path,
    env: dict[str, str],
    first: str,
    control: int | None = None,
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path, how in ((0, given, os.O_RDONLY), (1, output, _WRITE), (2, errors, _WRITE)):
        if number == 2 and path is None:
            os.dup2(1, 2)
        else:
            opened = os.open(path or os.devnull, how, 0o644)
            os.dup2(opened, number)
            os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, how, closefd=False) for number, how in ((0, "r"), (1, "w"), (2, "w"))
    )
    sys.argv = [module, *arguments] if control is None else [module, str(control)]
    ForkedRanks.take_over()
    exec(first, {"__name__": "__main__"})
    try:
        import_module(module).main()
    finally:
        atexit._run_exitfuncs()


_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


class ForkedRanks:
    """Stands where modules of the profiler have `subprocess`, so that their ranks start from here, too."""

    DEVNULL, STDOUT, TimeoutExpired = subprocess.DEVNULL, subprocess.STDOUT, subprocess.TimeoutExpired

    @staticmethod
    def Popen(  # noqa: N802
        command: Sequence[str], *, stdout: Any, env: dict[str, str], pass_fds: Sequence[int] = (), **_: Any
    ) -> Forked:
        """``python -m module arguments``; a descriptor that is handed over is the one argument."""
        _, _, module, *arguments = command
        control = pass_fds[0] if pass_fds else None
        return Forked(module, arguments, output=Path(stdout.name), env=env, control=control)

    @classmethod
    def take_over(cls) -> None:
        """Start all ranks of this process from here."""
        import profiler.linktest
        import profiler.transport

        for module in (profiler.transport, profiler.linktest):
            module.subprocess = cls  # type: ignore[attr-defined]
