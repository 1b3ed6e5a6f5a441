"""Run the program as a user does, in a process of its own; it is forked, see `tests.forked`."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.forked import ROOT, Forked


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user in another folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **extra}


def program(
    *arguments: object, cwd: Path, timeout_s: float = 250, stdin: str | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run ``kvr-partition`` to its end."""
    return _run(arguments, cwd, timeout_s, stdin, environment(**extra))


def patched(code: str, *arguments: object, cwd: Path, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    """Run it after ``code`` changed something in it, for what cannot fail on demand."""
    return _run(arguments, cwd, timeout_s, None, environment(), code)


def begun(*arguments: object, cwd: Path, output: Path, errors: Path | None = None, **more: Any) -> Forked:
    """Start it."""
    given = [str(argument) for argument in arguments]
    more.setdefault("env", environment())
    return Forked("kvr_partition.cli.main", given, output=output, errors=errors, cwd=cwd, **more)


def _run(
    arguments: Sequence[object],
    cwd: Path,
    timeout_s: float,
    stdin: str | None,
    env: dict[str, str],
    first: str = "",
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        output, errors, given = (Path(folder) / name for name in ("output", "errors", "given"))
        given.write_text(stdin or "")
        process = begun(*arguments, cwd=cwd, output=output, errors=errors, given=given, env=env, first=first)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(process.args, code, output.read_text(), errors.read_text())


def one_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The message of a run that must end with exactly one line of error and nothing else."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]
