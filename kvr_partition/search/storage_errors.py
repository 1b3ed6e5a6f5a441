"""One line for whatever goes wrong with the database of a study."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Any

import optuna
import sqlalchemy.exc

from kvr_partition.errors import StorageError


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """One line for what can go wrong with a database, whichever layer noticed it."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error) as error:
        raise StorageError(f"the study cannot be used: {_root(error)}; {_advice(_root(error))}") from error
    except RuntimeError as error:
        if "storage" not in str(error).lower() and "schema" not in str(error).lower():
            raise
        raise StorageError(f"the study cannot be used: {' '.join(str(error).split())}") from error


def _root(error: BaseException) -> str:
    cause: BaseException = error
    while True:
        inner: Any = getattr(cause, "orig", None) or cause.__cause__ or cause.__context__
        if inner is None:
            return " ".join(str(cause).split())
        cause = inner


def _advice(reason: str) -> str:
    if "full" in reason:
        return "make room and run the same command again, everything finished so far is kept"
    return (
        "move the database away and run the same command again, "
        "what the measurement log has finished is not measured again"
    )
