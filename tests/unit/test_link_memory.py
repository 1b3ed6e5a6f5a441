"""Memory that peers write to: nobody's rows overlap, and none is reused while somebody may still write to it."""

from __future__ import annotations

import ctypes
import gc
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition.runtime.links.memory import Allocator, LinkMemory

CPU = torch.device("cpu")
GRAIN = 2 << 20


class HostAllocator(Allocator):
    """Memory of the host in place of a device's, of which there is so much."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.held: dict[int, Any] = {}
        self.limit = limit

    def allocate(self, nbytes: int) -> int:
        if sum(len(one) for one in self.held.values()) + nbytes > self.limit:
            raise torch.OutOfMemoryError("full")
        memory = (ctypes.c_uint8 * nbytes)()
        self.held[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, pointer: int) -> None:
        del self.held[pointer]

    def handle(self, pointer: int) -> bytes:
        return pointer.to_bytes(8, "little")

    def tensor(self, owner: Any) -> torch.Tensor:
        told = owner.__cuda_array_interface__
        memory: Any = (ctypes.c_uint8 * told["shape"][0]).from_address(told["data"][0])
        memory.owner = owner
        return torch.frombuffer(memory, dtype=torch.uint8)


def memory_of(limit: int = 1 << 40) -> tuple[LinkMemory, HostAllocator]:
    allocator = HostAllocator(limit)
    return LinkMemory(CPU, allocator), allocator


def rows(memory: LinkMemory, nbytes: int) -> torch.Tensor:
    return memory.empty((nbytes,), dtype=torch.uint8)


@given(st.lists(st.tuples(st.integers(1, 3 << 20), st.booleans(), st.integers(0, 8)), max_size=25))
def test_rows_that_are_alive_never_overlap(steps: list[tuple[int, bool, int]]) -> None:
    memory, allocator = memory_of()
    alive: list[torch.Tensor] = []
    for nbytes, drops, which in steps:
        alive.append(rows(memory, nbytes))
        if drops and alive:
            del alive[which % len(alive)]
        spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in alive)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        for one in alive:
            place = memory.place(one)
            assert place is not None
            assert memory.segments[place[0]].pointer + place[1] == one.data_ptr()
    assert memory.use.used_bytes >= sum(one.nbytes for one in alive)
    alive.clear()
    one = None
    assert memory.use.used_bytes == 0
    reserved = memory.use.reserved_bytes
    assert memory.release() == reserved
    assert memory.use.reserved_bytes == 0
    assert not allocator.held


def test_what_one_prompt_no_longer_needs_the_next_one_takes() -> None:
    memory, _ = memory_of()
    memory.make_room([GRAIN] * 4)
    reserved = memory.use.reserved_bytes
    assert reserved == 4 * GRAIN
    assert len(memory.segments) == 1
    for _ in range(5):
        held = [rows(memory, GRAIN) for _ in range(4)]
        assert memory.use.used_bytes == 4 * GRAIN
        del held
        gc.collect()
    assert memory.use.reserved_bytes == reserved
    # A longer prompt takes what is missing, not all of it again.
    memory.make_room([GRAIN] * 6)
    assert memory.use.reserved_bytes == 6 * GRAIN
    held = [rows(memory, GRAIN) for _ in range(6)]
    assert memory.use.reserved_bytes == 6 * GRAIN
    assert len({one.data_ptr() for one in held}) == 6


def test_rows_to_which_a_peer_may_still_write_go_to_nobody_else() -> None:
    memory, _ = memory_of()
    under_way = True
    first = rows(memory, GRAIN)
    where = first.data_ptr()
    memory.may_be_written([first], lambda: under_way)
    del first
    gc.collect()
    assert memory.use.used_bytes == GRAIN
    assert rows(memory, GRAIN).data_ptr() != where
    gc.collect()
    assert memory.release() == GRAIN  # of the other one
    under_way = False
    assert rows(memory, GRAIN).data_ptr() == where


def test_rows_of_all_layers_are_one_block_where_there_is_one() -> None:
    memory, allocator = memory_of()
    sizes = [(3, 700), (0, 700), (5, 700), (2, 64)]
    empty = memory.room([rows * width * 2 for rows, width in sizes])
    made = len(allocator.held)
    tensors = [empty(shape, dtype=torch.float16) for shape in sizes]
    assert len(allocator.held) == made == 1
    assert [tuple(one.shape) for one in tensors] == sizes
    spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors if one.nbytes)
    assert all(
        end <= start and (start - spans[0][0]) % 512 == 0 for (_, end), (start, _) in itertools.pairwise(spans)
    )
    assert len(memory._blocks) == 1
    # All of it is kept as long as any of it may be read or written.
    under_way = True
    memory.may_be_written(tensors[2:3], lambda: under_way)
    del tensors
    del empty
    gc.collect()
    assert memory.use.used_bytes > 0
    under_way = False
    assert memory.use.used_bytes == 0
    assert not memory._parts


def test_rows_that_fit_into_holes_only_are_taken_one_by_one() -> None:
    memory, _ = memory_of()
    memory.make_room([GRAIN] * 4)
    held = [rows(memory, GRAIN) for _ in range(4)]
    del held[0], held[1]
    gc.collect()
    empty = memory.room([GRAIN, GRAIN])
    found = [empty((GRAIN,), dtype=torch.uint8) for _ in range(2)]
    assert memory.use.reserved_bytes == 4 * GRAIN
    assert len({one.data_ptr() for one in [*held, *found]}) == 4


def test_memory_that_others_were_told_of_is_given_back_by_who_told_them() -> None:
    class Teller:
        pass

    memory, allocator = memory_of()
    mine, other = Teller(), Teller()
    del_me = rows(memory, GRAIN)
    memory.segments[0].exported_by.add(mine)
    memory.segments[0].exported_by.add(other)
    del del_me
    gc.collect()
    assert memory.release(mine) == 0
    del other
    gc.collect()
    assert memory.release(mine) == GRAIN
    assert not allocator.held


def test_a_full_device_says_so_and_stays_as_it_was() -> None:
    memory, _ = memory_of(limit=3 * GRAIN)
    held = rows(memory, GRAIN)
    with pytest.raises(torch.OutOfMemoryError):
        memory.make_room([GRAIN] * 4)
    assert memory.use.reserved_bytes == GRAIN
    assert rows(memory, 2 * GRAIN).data_ptr() != held.data_ptr()


def test_rows_have_the_shape_and_dtype_asked_for() -> None:
    memory, _ = memory_of()
    one = memory.empty((7, 33), dtype=torch.bfloat16)
    assert (one.shape, one.dtype, one.is_contiguous()) == ((7, 33), torch.bfloat16, True)
    one.fill_(2.0)
    assert memory.empty((0, 33), dtype=torch.float16).shape == (0, 33)
    assert memory.place(torch.empty(3)) is None
