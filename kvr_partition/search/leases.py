"""Who measures a trial of a shared study, and whether they still do."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import time
from pathlib import Path

from optuna.trial import FrozenTrial

ASKING_S = 10.0
"""Seconds for which a running trial without an owner is taken to be alive."""


LEASE_S = 3600.0
"""Seconds for which a running trial of another host is taken to be alive."""


def this_process() -> str:
    """This process, so that another can tell whether it still runs: host, process id, when it began, and now.

    Now is in seconds since the epoch: hosts may be in different time zones, which the storage's times do not tell.
    """
    return f"{platform.node()}/{os.getpid()}/{_began(os.getpid())}/{time.time():.0f}"


def _began(process: int) -> str:
    """When a process began, in clock ticks; ``"running"`` if the system does not say, empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    with contextlib.suppress(OSError):
        os.kill(process, 0)
        return "running"
    return ""


def is_alive(trial: FrozenTrial) -> bool:
    """Whether somebody is measuring a running trial."""
    owner = trial.user_attrs.get("owner")
    if owner is None:
        # Between being asked for and being owned a trial is young.
        return age_s(trial) < ASKING_S
    host, process, since, claimed = owner.split("/")
    if host == platform.node():
        return bool(_began(int(process)) == since)
    return time.time() - float(claimed) < LEASE_S


def age_s(trial: FrozenTrial) -> float:
    began = trial.datetime_start
    return 0.0 if began is None else (datetime.datetime.now() - began).total_seconds()
