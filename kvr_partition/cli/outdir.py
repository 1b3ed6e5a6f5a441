"""The out directory of a search: who it belongs to, what is in it, and that only one run writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO

from kvr_partition.errors import StorageError
from kvr_partition.jsonfile import write_error
from kvr_partition.loading import load_table
from kvr_partition.provenance import Provenance
from kvr_partition.table import PartitionTable
from profiler.ranks import RankGroup
from profiler.store import MeasurementLog


class OutDir:
    """An out directory, opened and locked. Leaves everything that is in it as it is.

    Args:
        path: the folder; made when missing.
        fresh: start anew; what is there is moved aside, not deleted.

    Raises:
        StorageError: not ours, in use by another run, or not writable.
        FileFormatError: a damaged or foreign file in it.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.moved_to: Path | None = None
        if fresh and path.exists():
            self.moved_to = _free_name(path)
            path.rename(self.moved_to)
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in path.iterdir()}
            if names and not names & {"measurements.jsonl", "study.db", "table.json", ".lock"}:
                raise StorageError(
                    f"{path} holds something else than a search; name an empty or new folder with --out"
                )
            self._lock = _lock(path / ".lock")
        except FileExistsError:
            raise StorageError(f"{path} is a file; name a folder with --out") from None
        except OSError as error:
            raise write_error(path, error) from None
        try:
            self.log = MeasurementLog(self.log_path)
            self.table = load_table(self.table_path) if self.table_path.exists() else PartitionTable([])
        except BaseException:
            self._lock.close()
            raise

    @property
    def log_path(self) -> Path:
        """Every sample."""
        return self.path / "measurements.jsonl"

    @property
    def table_path(self) -> Path:
        """The result."""
        return self.path / "table.json"

    @property
    def study_url(self) -> str:
        """The default storage of the study."""
        return f"sqlite:///{(self.path / 'study.db').resolve()}"

    def save(self, table: PartitionTable) -> None:
        """Write the table of what was found so far."""
        self.table = table
        table.save(self.table_path)

    def check_request(self, group: RankGroup) -> None:
        """Refuse, before any rank starts, to mix what cannot be compared.

        Raises:
            StorageError: the folder has measurements of another model, rank count, dtype or backend.
        """
        for before in self._origins():
            asked = group.requested_conditions()
            known = before.conditions()
            for name, value in asked.items():
                if known[name] != value:
                    mine, theirs = _differing(value, known[name])
                    raise self._other(f"{name} {theirs}, not {mine}")

    def check_conditions(self, provenance: Provenance) -> None:
        """Refuse to go on under other conditions than those of what is already there.

        Raises:
            StorageError: another device, software version or link.
        """
        for before in self._origins():
            difference = provenance.difference(before)
            if difference is not None:
                raise self._other(f"another {difference} (now, then)")

    def close(self) -> None:
        """Let the next run have it."""
        self.log.close()
        self._lock.close()

    def __enter__(self) -> OutDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _origins(self) -> list[Provenance]:
        origins = list(self.log.provenance.values())
        if self.table.provenance is not None:
            origins.append(self.table.provenance)
        return origins

    def _other(self, what: str) -> StorageError:
        return StorageError(
            f"{self.path} belongs to a search with {what}; choose another --out, or --fresh to set it aside"
        )


def _differing(mine: object, theirs: object) -> tuple[object, object]:
    """For a model, the first part that differs; it has too many to print."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        key = next(key for key in mine if mine[key] != theirs[key])
        return f"{key}={mine[key]}", f"{key}={theirs[key]}"
    return mine, theirs


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return candidate


def _lock(path: Path) -> IO[str]:
    handle = path.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        owner = handle.read().strip()
        handle.close()
        raise StorageError(
            f"{path.parent} is in use by another run{f' (process {owner})' if owner else ''}; "
            "wait for it, or choose another --out"
        ) from None
    with contextlib.suppress(OSError):  # the process id is a courtesy; a full disk must not be what ends us here
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
    return handle
