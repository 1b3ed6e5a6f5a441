"""Board: a few bytes that each rank of one host shows to all others, in memory that they share.

Ranks agree on every prompt, and a socket to each of seven others takes longer than that is worth: several system
calls, and threads that hand over. A look at shared memory takes a microsecond.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import zlib
from pathlib import Path

_SLOTS = 8
"""Messages of a rank that are kept. Ranks in step are never more than two apart."""

_SLOT = 4096
_HEAD = 64
_ROW = _HEAD + _SLOTS * _SLOT
LONGEST = _SLOT - 8
"""Bytes of a message."""


class Board:
    """A row for each rank: how many messages it has written, whether it sleeps, and the latest of them.

    Each rank writes its own row only, and reads those of the others in the order in which they were written.

    Args:
        path: of the file that all ranks map; any rank may delete it once all have.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int, ranks: int) -> None:
        self._rank = rank
        with Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), ranks * _ROW)
        self._bytes = memoryview(self._memory)
        # Counts are read and written as whole words.
        self._words = self._bytes.cast("Q")
        self._seen = [self._words[self._count_at(peer)] for peer in range(ranks)]

    @staticmethod
    def create(ranks: int) -> str:
        """An empty board's file, for so many ranks; in memory where the system has such a place.

        Raises:
            OSError: it cannot be made.
        """
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112 - asked once
        descriptor, path = tempfile.mkstemp(prefix="kvr-board-", dir=folder)
        try:
            os.ftruncate(descriptor, ranks * _ROW)
        finally:
            os.close(descriptor)
        return path

    @staticmethod
    def delete(path: str) -> None:
        """Take a board's name away; those that have mapped it keep it."""
        with contextlib.suppress(OSError):
            Path(path).unlink()

    def write(self, message: bytes) -> None:
        """Show a message of at most `LONGEST` bytes."""
        count_at = self._count_at(self._rank)
        count = self._words[count_at]
        at = self._slot_at(self._rank, count)
        self._bytes[at + 8 : at + 8 + len(message)] = message
        self._words[at // 8] = len(message) << 32 | zlib.crc32(message)
        self._words[count_at] = count + 1

    def read(self, rank: int) -> bytes | None:
        """The next message of a rank; None while there is none."""
        count = self._seen[rank]
        if self._words[self._count_at(rank)] <= count:
            return None
        at = self._slot_at(rank, count)
        head = self._words[at // 8]
        length = head >> 32
        message = bytes(self._bytes[at + 8 : at + 8 + length])
        if length > LONGEST or zlib.crc32(message) != head & 0xFFFFFFFF:
            return None  # a processor may show the count before what was written ahead of it
        self._seen[rank] = count + 1
        return message

    def peek(self, rank: int) -> bool:
        """Whether there is a next message of a rank."""
        return self._words[self._count_at(rank)] > self._seen[rank]

    def sleep(self, sleeps: bool) -> None:
        """Show whether this rank has stopped looking, and wants to be woken."""
        self._words[self._count_at(self._rank) + 1] = sleeps

    def sleeps(self, rank: int) -> bool:
        """Whether a rank wants to be woken."""
        return bool(self._words[self._count_at(rank) + 1])

    @staticmethod
    def _count_at(rank: int) -> int:
        return rank * _ROW // 8

    @staticmethod
    def _slot_at(rank: int, count: int) -> int:
        return rank * _ROW + _HEAD + count % _SLOTS * _SLOT
