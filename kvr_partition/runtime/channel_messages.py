"""What ranks say to each other over a channel."""

from __future__ import annotations

import msgspec


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """A rank that calls another one says who it is; the nonce says of which group."""

    nonce: bytes
    rank: int


class Note(msgspec.Struct, frozen=True, tag="note", array_like=True):
    """What a rank tells another one."""

    topic: str
    body: bytes


class Ping(msgspec.Struct, frozen=True, tag="ping", array_like=True):
    """Whether the other one still runs."""

    number: int


class Pong(msgspec.Struct, frozen=True, tag="pong", array_like=True):
    """What it is at, in words that follow "it is", and the rank that it waits for."""

    number: int
    doing: str
    waits_for: int | None


class Wake(msgspec.Struct, frozen=True, tag="wake", array_like=True):
    """There is something on the board."""


class Bye(msgspec.Struct, frozen=True, tag="bye", array_like=True):
    """Nothing more will come, and nothing is wrong."""


encode = msgspec.msgpack.Encoder().encode


decode = msgspec.msgpack.Decoder(Hello | Note | Ping | Pong | Wake | Bye).decode
