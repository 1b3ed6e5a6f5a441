"""Errors a user can act on, sorted by what there is to do about each.

Every message is one line: what is wrong, where, and what to do.
"""

from __future__ import annotations


class KVRError(Exception):
    """Base of every error that this project raises on purpose."""


class PartitionError(KVRError, ValueError):
    """The numbers do not make a partition: change the sizes, the rank count or the context."""


class OutOfRangeError(KVRError, LookupError):
    """Nothing was measured there: search that context, or ask inside the range the message names."""


class FileFormatError(KVRError, ValueError):
    """A file is torn, of another schema, or holds impossible values: the message names file and field."""


class StorageError(KVRError):
    """A result cannot be written or belongs to another run: free space, or choose another folder."""


class UnsupportedError(KVRError):
    """This model, machine or installation cannot do what was asked: the message names the part at fault."""


class RankError(KVRError):
    """A rank could not start, died, or did not answer in time.

    Attributes:
        rank: the rank at fault, or None when several or none can be named.
        kind: ``"start"``, ``"lost"``, ``"timeout"``, ``"out-of-memory"`` or ``"error"``.
        traceback: what the rank itself printed last, possibly empty.
    """

    def __init__(self, message: str, *, rank: int | None = None, kind: str = "error", traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.kind = kind
        self.traceback = traceback
        if traceback:
            self.add_note(traceback)
