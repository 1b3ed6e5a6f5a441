"""Run the program as a user does: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "kvr_partition"]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user in another folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **extra}


def program(
    *arguments: object, cwd: Path, timeout_s: float = 250, stdin: str | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run ``kvr-partition`` to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=environment(**extra),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def patched(code: str, *arguments: object, cwd: Path, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    """Run a program of ours after ``code`` changed something in it, for what cannot fail on demand."""
    start = f"{code}\nimport sys\nfrom kvr_partition.cli.main import main\nmain(sys.argv[1:])\n"
    return subprocess.run(
        [sys.executable, "-c", start, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def one_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The message of a run that must end with exactly one line of error and nothing else."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]
