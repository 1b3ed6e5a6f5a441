"""Where studies are kept: databases, journal files, and a proxy in front of either."""

from __future__ import annotations

import warnings
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from kvr_partition.errors import StorageError, UnsupportedError
from kvr_partition.jsonfile import set_torn_tail_aside

LOCKED_S = 60.0
"""Seconds to wait for a SQLite file that another process is writing."""


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """The storage of a URL.

    Args:
        url: of a database, like ``sqlite:///study.db`` or ``postgresql://host/name``; ``journal:FILE`` for an
            append-only file that several processes share; ``grpc://host:port`` for Optuna's proxy.

    Raises:
        UnsupportedError: a URL that is none of these, or one whose driver is not installed.
        StorageError: a journal that cannot be read or written.
    """
    kind, _, rest = url.partition(":")
    if kind == "journal":
        if not rest:
            raise UnsupportedError(f"a journal is written journal:FILE; got {url!r}")
        return _journal(Path(rest))
    if kind == "grpc":
        host, colon, port = rest.removeprefix("//").rpartition(":")
        if not colon or not host or not port.isdigit():
            raise UnsupportedError(f"Optuna's proxy is written grpc://host:port; got {url!r}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.GrpcStorageProxy(host=host, port=int(port))
        except ImportError as error:
            raise UnsupportedError(f"{url} needs the [storage] extra: {_line(error)}") from None
    import sqlalchemy.exc

    # With SQLite others lock the whole file while they write; its own patience of 5 s is short on a slow disk.
    patience = {"connect_args": {"timeout": LOCKED_S}} if kind.partition("+")[0] == "sqlite" else None
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=patience)
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise UnsupportedError(
            f"{url} needs a database driver, as the [storage] extra has: {_line(error)}"
        ) from None
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise UnsupportedError(
            f"{url!r} is no storage; write sqlite:///FILE, postgresql://HOST/NAME, journal:FILE or "
            f"grpc://HOST:PORT ({_line(error)})"
        ) from None


def _journal(file: Path) -> optuna.storages.BaseStorage:
    try:
        lock = JournalFileOpenLock(str(file))
        if file.exists():
            lock.acquire()
            try:
                set_torn_tail_aside(file)
            finally:
                lock.release()
        return optuna.storages.JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
    except OSError as error:
        raise StorageError(f"the journal {file} cannot be used: {error.strerror or error}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
