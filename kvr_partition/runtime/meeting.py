"""How the ranks of a group meet: who listens where, and a board for those of one host."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch.distributed as dist

from kvr_partition.errors import RankError
from kvr_partition.frames import Frames, framed
from kvr_partition.runtime.board import Board
from kvr_partition.runtime.channel import Channel
from kvr_partition.runtime.channel_messages import Hello, decode, encode


def meet(group: dist.ProcessGroup, timeout_s: float) -> Channel:
    """Open a channel among all ranks of a process group. All of them call this.

    Ranks of one host meet over loopback. Several hosts use the address from which each reaches ``MASTER_ADDR``,
    or else the one its name stands for.

    Raises:
        RankError: a rank cannot be reached.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    try:
        hosts = _everyones(group, (host_name(), os.urandom(16)))
        nonce = hosts[0][1]
        one_host = len({host for host, _ in hosts}) == 1
        server = socket.create_server(("127.0.0.1" if one_host else "", 0), backlog=ranks)
        with server:
            server.settimeout(timeout_s)
            port = server.getsockname()[1]
            mine = ["127.0.0.1"] if one_host else _addresses()
            store = None
            if rank == 0:
                store = _store(mine[0], 0, timeout_s, leads=True)
            path = _new_board(ranks) if rank == 0 and one_host else None
            where = _everyones(group, (mine, port, 0 if store is None else store.port, path))
            if store is None:
                store = _store(where[0][0][0], where[0][2], timeout_s, leads=False)
            board = _shared_board(group, where[0][3], rank, ranks)
            peers = {}
            for peer in range(rank):
                peers[peer] = _connect(peer, where[peer][0], where[peer][1], timeout_s)
                peers[peer].sendall(framed(encode(Hello(nonce, rank))))
            while len(peers) < ranks - 1:
                caller, _ = server.accept()
                who = _caller(caller, nonce)
                if who is None:
                    caller.close()
                else:
                    peers[who] = caller
    except Exception as error:
        # What torch and the system say of this names no rank; all that is known is that not all came.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RankError(
            f"the {ranks} ranks of the group did not all meet: {first}", kind="start", phase="start"
        ) from error
    for connection in peers.values():
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Channel(rank, peers, timeout_s, store, board)


def _new_board(ranks: int) -> str | None:
    with contextlib.suppress(OSError):
        return Board.create(ranks)
    return None


def _shared_board(group: dist.ProcessGroup, path: str | None, rank: int, ranks: int) -> Board | None:
    """The board of all ranks, if each of them can map it; otherwise sockets do."""
    if path is None:
        return None
    board = None
    with contextlib.suppress(OSError, ValueError):
        board = Board(path, rank, ranks)
    all_have = all(_everyones(group, board is not None))
    if rank == 0:
        Board.delete(path)
    return board if all_have else None


def _store(host: str, port: int, timeout_s: float, leads: bool) -> Any:
    timeout = timedelta(seconds=timeout_s)
    # It has a name in torch.distributed, but not one that it exports.
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=leads, timeout=timeout, wait_for_workers=False
    )


_T = TypeVar("_T")


def _everyones(group: dist.ProcessGroup, mine: _T) -> list[_T]:
    found: list[_T] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def host_name() -> str:
    """What ranks have in common that reach each other over loopback: a running system and its network."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/net").stat().st_ino))
    return "/".join(parts)


def _addresses() -> list[str]:
    found = []
    master = os.environ.get("MASTER_ADDR")
    if master:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: connecting makes the system choose the address.
            probe.connect((master, 9))
            found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")] or [
        socket.gethostname()
    ]


def _connect(peer: int, addresses: Sequence[str], port: int, timeout_s: float) -> socket.socket:
    for address in addresses:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=min(timeout_s, 30.0))
    raise OSError(f"rank {peer} cannot be reached at {', '.join(addresses) or 'any address'}, port {port}")


def _caller(connection: socket.socket, nonce: bytes) -> int | None:
    """The rank of whoever connected; None for a stranger."""
    connection.settimeout(30.0)
    frames = Frames()
    try:
        while True:
            data = connection.recv(1)
            if not data:
                return None
            for body in frames.feed(data):
                hello = decode(body)
                return hello.rank if isinstance(hello, Hello) and hello.nonce == nonce else None
    except (OSError, ValueError, msgspec.MsgspecError):
        return None
