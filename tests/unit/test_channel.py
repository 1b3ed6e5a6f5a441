"""What ranks tell each other beside KV arrives whole, in order, and says who is missing."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition.errors import RankError
from kvr_partition.frames import Frames, framed
from kvr_partition.runtime import channel as channels
from kvr_partition.runtime import channel_messages, meeting
from kvr_partition.runtime.board import LONGEST, Board
from kvr_partition.runtime.channel import Channel, Doing


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 70), min_size=1, max_size=20))
def test_messages_come_out_of_a_stream_as_they_went_in(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(framed, bodies))
    frames, found, at = Frames(), [], 0
    for turn in range(len(stream) + 1):
        step = cuts[turn % len(cuts)]
        found += frames.feed(stream[at : at + step])
        at += step
    assert found == bodies


def test_a_length_that_no_message_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="a message of"):
        Frames().feed(b"HTTP/1.1 200 OK")


@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=LONGEST)), max_size=60))
def test_each_rank_reads_what_others_wrote_in_their_order(writes: list[tuple[int, bytes]]) -> None:
    path = Board.create(3)
    try:
        boards = [Board(path, rank, 3) for rank in range(3)]
    finally:
        Board.delete(path)
    for writer, message in writes:
        boards[writer].write(message)
        for reader in range(3):
            assert boards[reader].peek(writer)
            assert boards[reader].read(writer) == message
            assert boards[reader].read(writer) is None
            assert not boards[reader].peek(writer)


def test_a_message_that_is_half_written_is_not_there_yet() -> None:
    path = Board.create(2)
    writer, reader = Board(path, 0, 2), Board(path, 1, 2)
    Board.delete(path)
    writer.write(b"whole")
    writer._bytes[64 + 8] ^= 1
    assert reader.peek(0)
    assert reader.read(0) is None
    writer._bytes[64 + 8] ^= 1
    assert reader.read(0) == b"whole"


def connected(ranks: int, board: str | None, timeout_s: float = 20) -> list[Channel]:
    """Channels of ranks that live in this process."""
    peers: list[dict[int, socket.socket]] = [{} for _ in range(ranks)]
    for one, other in combinations(range(ranks), 2):
        peers[one][other], peers[other][one] = socket.socketpair()
    return [
        Channel(rank, peers[rank], timeout_s, None, None if board is None else Board(board, rank, ranks))
        for rank in range(ranks)
    ]


@pytest.fixture(params=["sockets", "board"])
def three(request: pytest.FixtureRequest) -> Iterator[list[Channel]]:
    path = Board.create(3) if request.param == "board" else None
    made = connected(3, path)
    if path is not None:
        Board.delete(path)
    yield made
    for one in made:
        one.leave()


def nothing() -> None:
    return None


def test_statements_reach_all_whatever_their_length_and_whoever_is_late(three: list[Channel]) -> None:
    found: list[list[dict[int, bytes]]] = [[] for _ in three]

    def rank(me: int) -> None:
        for turn in range(30):
            if turn % 5 == me:
                time.sleep(0.01)  # longer than anybody keeps looking
            three[me].state(f"{me} {turn} ".encode() * (1 if turn % 7 else 300))
            found[me].append(three[me].stated([one for one in range(3) if one != me], "a test", nothing))

    threads = [threading.Thread(target=rank, args=(me,)) for me in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for me in range(3):
        others = [one for one in range(3) if one != me]
        for turn in range(30):
            times = 1 if turn % 7 else 300
            assert found[me][turn] == {one: f"{one} {turn} ".encode() * times for one in others}


def test_notes_of_a_topic_wait_until_they_are_heard(three: list[Channel]) -> None:
    three[0].tell("first", b"1", to=2)
    three[0].tell("second", b"2")
    three[1].tell("second", b"3")
    assert three[2].hear("second", "a test") == {0: b"2", 1: b"3"}
    assert three[2].hear("first", "a test", [0]) == {0: b"1"}
    assert three[1].hear_any("second", "a test", [0, 2]) == {0: b"2"}


def test_whoever_is_gone_is_named_and_one_that_said_goodbye_is_told_apart(three: list[Channel]) -> None:
    three[1]._peers[2].shutdown(socket.SHUT_RDWR)
    with pytest.raises(RankError, match=r"rank 1 is gone: its process ended \(a test\)") as caught:
        three[2].stated([0, 1], "a test", nothing)
    assert (caught.value.kind, caught.value.rank, caught.value.phase) == ("lost", 1, "a test")
    three[0].leave()
    with pytest.raises(RankError, match="rank 0 has left"):
        three[2].hear("a topic", "a test", [0])


def test_the_rank_that_all_others_wait_for_is_found_by_asking(
    three: list[Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    three[0].doing = Doing("in layer 3 of prefill 7")
    three[1].doing = Doing("in layer 2 of prefill 7", waits_for=0)
    with pytest.raises(RankError, match=r"rank 0 was waited for 0\.1 s \(a test\); it is in layer 3") as caught:
        three[2].hear("a topic", "a test", [1], timeout_s=0.1)
    assert (caught.value.kind, caught.value.rank) == ("timeout", 0)
    # One that does not even answer.
    monkeypatch.setattr(channels, "ANSWER_S", 0.3)
    monkeypatch.setattr(three[0], "_take", lambda *_: None)
    with pytest.raises(RankError, match=r"rank 0 did not answer within 0\.1 s") as caught:
        three[2].hear("a topic", "a test", [1], timeout_s=0.1)
    assert (caught.value.kind, caught.value.rank) == ("timeout", 0)


def test_strangers_are_not_taken_for_ranks() -> None:
    nonce = os.urandom(16)
    for said in (
        b"GET / HTTP/1.1\r\n\r\n",
        framed(b"\x00"),
        framed(channel_messages.encode(channel_messages.Hello(b"x", 1))),
    ):
        ours, theirs = socket.socketpair()
        theirs.sendall(said)
        theirs.close()
        assert meeting._caller(ours, nonce) is None
        ours.close()
    ours, theirs = socket.socketpair()
    theirs.sendall(framed(channel_messages.encode(channel_messages.Hello(nonce, 5))))
    assert meeting._caller(ours, nonce) == 5
    ours.close()
    theirs.close()


def test_boards_leave_nothing_behind(tmp_path: Path) -> None:
    path = Board.create(2)
    assert Path(path).stat().st_mode & 0o077 == 0
    board = Board(path, 0, 2)
    Board.delete(path)
    Board.delete(path)
    assert not Path(path).exists()
    board.write(b"still works")
    with pytest.raises(OSError, match="No such file"):
        Board(tmp_path / "none", 0, 2)
