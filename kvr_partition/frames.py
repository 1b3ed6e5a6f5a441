"""Messages on a byte stream: each with its length in front."""

from __future__ import annotations

_LONGEST = 1 << 30
"""Bytes of a message; a longer one is no message of ours."""


class Frames:
    """Bytes that were received, put together to messages: each has its length in front, in four bytes."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete with this data.

        Raises:
            ValueError: a length that no message has.
        """
        self._bytes += data
        found = []
        while len(self._bytes) >= 4:
            end = 4 + int.from_bytes(self._bytes[:4], "big")
            if end > _LONGEST:
                raise ValueError(f"a message of {end} bytes")
            if len(self._bytes) < end:
                break
            found.append(bytes(self._bytes[4:end]))
            del self._bytes[:end]
        return found


def framed(body: bytes) -> bytes:
    """A message as `Frames` reads it."""
    return len(body).to_bytes(4, "big") + body
