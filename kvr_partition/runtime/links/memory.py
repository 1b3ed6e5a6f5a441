"""Device memory that other processes can map: the rows into which they push KV live in it.

Torch's own allocator gives memory that other processes may not map for good: it is cut up, moved to other tensors
and given back without asking them. So rows that peers write to come from segments of their own, which stay until
`LinkMemory.release`; what one prompt no longer needs, the next one takes.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvr_partition.runtime.driver import cuda_driver, values

_GRAIN = 2 << 20
"""Bytes of a page of device memory: a segment that shared one with another would be mapped with it."""

_ALIGN = 512

_TOGETHER = 2 << 30
"""Bytes of rows that are taken as one block. A tensor with a block of its own takes tens of microseconds, and
each layer has one. With more bytes that is nothing, and rows that grow while decoding go back one by one."""

HANDLE_BYTES = 64


@dataclass(eq=False)
class Segment:
    """One allocation of the driver, mapped by peers as a whole.

    Attributes:
        pointer: where it begins on this device.
        nbytes: how long it is.
        handle: what another process needs to map it.
        free: parts that nobody has, as ``[start, end)``, in order, no two of them touching.
    """

    pointer: int
    nbytes: int
    handle: bytes
    free: list[tuple[int, int]] = field(default_factory=list)
    exported_by: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    """The `Peers` that gave other processes its handle."""

    def take(self, nbytes: int) -> int | None:
        """The offset of so many bytes that are free; None when there are none."""
        for at, (start, end) in enumerate(self.free):
            if end - start >= nbytes:
                rest = (start + nbytes, end)
                self.free[at : at + 1] = [rest] if rest[0] < rest[1] else []
                return start
        return None

    def give(self, start: int, nbytes: int) -> None:
        """Bytes that `take` gave are free again."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self.free, (start, start + nbytes)]):
            if merged and merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        self.free = merged

    @property
    def is_free(self) -> bool:
        """Whether nobody has any of it."""
        return self.free == [(0, self.nbytes)]


@dataclass(eq=False)
class _Block:
    """Bytes of a segment that a tensor has.

    ``written`` tells whether a peer may still write there, though the tensor is gone.
    """

    segment: Segment
    start: int
    nbytes: int
    written: Callable[[], bool] = lambda: False
    tensors: list[int] = field(default_factory=list)
    """Where the tensors begin that were cut of it."""


class _Owner:
    """What torch takes for an array on the device; a tensor made of it keeps it for as long as it lives."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


@dataclass(frozen=True, slots=True)
class LinkMemoryUse:
    """What links keep of a device's memory.

    Attributes:
        reserved_bytes: taken from the device.
        used_bytes: of those, held by caches that are alive, or that a failed prefill may still write to.
    """

    reserved_bytes: int
    used_bytes: int


class LinkMemory:
    """Segments of one device, of which rows are cut.

    Args:
        device: a CUDA device.
        allocator: takes memory from it, and gives it back; the driver's when None.
    """

    def __init__(self, device: torch.device, allocator: Allocator | None = None) -> None:
        self.device = device
        self.segments: list[Segment] = []
        self._allocator = DriverAllocator(device) if allocator is None else allocator
        self._lock = threading.RLock()
        self._blocks: dict[int, _Block] = {}
        self._parts: dict[int, _Block] = {}
        # Tensors die wherever the interpreter collects garbage: in the middle of an allocation, too.
        self._dropped: deque[int] = deque()
        self._limbo: list[_Block] = []

    def empty(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | None = None
    ) -> torch.Tensor:
        """Like ``torch.empty``, in memory that peers can map.

        Raises:
            OutOfMemoryError: the device is full.
        """
        nbytes = _aligned(torch.Size(shape).numel() * dtype.itemsize)
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        with self._lock:
            block = self._taken(nbytes)
            if block is None:
                self._grow(nbytes)
                block = self._taken(nbytes)
            assert block is not None
            pointer = block.segment.pointer + block.start
            self._blocks[pointer] = self._parts[pointer] = block
            block.tensors.append(pointer)
        owner = _Owner(pointer, nbytes)
        weakref.finalize(owner, self._dropped.append, pointer).atexit = False
        flat = self._allocator.tensor(owner)
        length = torch.Size(shape).numel() * dtype.itemsize
        return flat[:length].view(dtype).view(tuple(shape))

    def make_room(self, sizes: Sequence[int]) -> None:
        """Have blocks of so many bytes fit, all at once; memory is taken for those that do not.

        Raises:
            OutOfMemoryError: the device is full.
        """
        with self._lock:
            self._collect()
            taken: list[tuple[Segment, int, int]] = []
            missing = 0
            for size in map(_aligned, sizes):
                for segment in self.segments:
                    if (start := segment.take(size)) is not None:
                        taken.append((segment, start, size))
                        break
                else:
                    missing += size
            for segment, start, size in taken:
                segment.give(start, size)
            if missing:
                self._grow(missing)

    def room(self, sizes: Sequence[int]) -> Callable[..., torch.Tensor]:
        """Like `make_room`; returns what gives these pieces, in this order, called like `empty`.

        Raises:
            OutOfMemoryError: the device is full.
        """
        with self._lock:
            total = sum(map(_aligned, sizes))
            together = 0 < total <= _TOGETHER
            if not together or total > self._longest():
                self.make_room(sizes)
            if not together or total > self._longest():
                return self.empty
            whole = self.empty((total,), dtype=torch.uint8)
            block = self._blocks[whole.data_ptr()]
        parts = iter(whole.split([_aligned(size) for size in sizes if size]))

        def piece(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            if nbytes == 0:
                return self.empty(shape, dtype=dtype)
            part: torch.Tensor = next(parts)
            # Each step on a tensor takes microseconds, for each layer, while the device has nothing to do.
            part = (part if part.shape[0] == nbytes else part[:nbytes]).view(dtype).view(tuple(shape))
            pointer = part.data_ptr()
            with self._lock:
                self._parts[pointer] = block
                block.tensors.append(pointer)
            return part

        return piece

    def place(self, rows: torch.Tensor) -> tuple[int, int] | None:
        """The number of the segment in which a tensor lies, and its offset there; None for other memory."""
        pointer = rows.data_ptr()
        for number, segment in enumerate(self.segments):
            if segment.pointer <= pointer < segment.pointer + segment.nbytes:
                return number, pointer - segment.pointer
        return None

    def may_be_written(self, rows: Sequence[torch.Tensor], written: Callable[[], bool]) -> None:
        """Keep rows from being taken for something else for as long as ``written`` says that a peer may write."""
        with self._lock:
            for row in rows:
                # Rows that were gone on with in place begin where they did, too.
                block = self._parts.get(row.data_ptr())
                if block is not None:
                    block.written = written

    def release(self, owner: Any = None) -> int:
        """Give segments back that are not used, and that nobody but ``owner`` exported.

        Args:
            owner: its peers must have unmapped them.

        Returns:
            The bytes given back.
        """
        with self._lock:
            self._collect()
            unused = [one for one in self.segments if one.is_free and not set(one.exported_by) - {owner}]
            self.segments = [segment for segment in self.segments if segment not in unused]
            for segment in unused:
                self._allocator.free(segment.pointer)
            return sum(segment.nbytes for segment in unused)

    @property
    def use(self) -> LinkMemoryUse:
        """What is reserved, and what of it is used."""
        with self._lock:
            self._collect()
            reserved = sum(segment.nbytes for segment in self.segments)
            free = sum(end - start for segment in self.segments for start, end in segment.free)
            return LinkMemoryUse(reserved, reserved - free)

    def _longest(self) -> int:
        """Bytes of the longest part that nobody has."""
        self._collect()
        return max((end - start for segment in self.segments for start, end in segment.free), default=0)

    def _taken(self, nbytes: int) -> _Block | None:
        self._collect()
        for segment in self.segments:
            if (start := segment.take(nbytes)) is not None:
                return _Block(segment, start, nbytes)
        return None

    def _grow(self, nbytes: int) -> None:
        nbytes = -(-nbytes // _GRAIN) * _GRAIN
        pointer = self._allocator.allocate(nbytes)
        self.segments.append(Segment(pointer, nbytes, self._allocator.handle(pointer), [(0, nbytes)]))

    def _collect(self) -> None:
        """Take back what tensors that are gone have had, unless a peer may still write there."""
        while self._dropped:
            block = self._blocks.pop(self._dropped.popleft())
            for pointer in block.tensors:
                self._parts.pop(pointer, None)
            self._limbo.append(block)
        kept = []
        for block in self._limbo:
            if block.written():
                kept.append(block)
            else:
                block.segment.give(block.start, block.nbytes)
        self._limbo = kept


class Allocator:
    """Takes memory from a device in pieces that other processes can map."""

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes.

        Raises:
            OutOfMemoryError: there are not as many.
        """
        raise NotImplementedError

    def free(self, pointer: int) -> None:
        """Give them back."""
        raise NotImplementedError

    def handle(self, pointer: int) -> bytes:
        """What another process needs to map them."""
        raise NotImplementedError

    def tensor(self, owner: Any) -> torch.Tensor:
        """The bytes that an owner has, as a tensor which keeps it."""
        raise NotImplementedError


class DriverAllocator(Allocator):
    """``cuMemAlloc``, which alone gives memory for the handles of CUDA IPC."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver = cuda_driver("peer links need")

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes; see `Allocator.allocate`."""
        with torch.cuda.device(self._device):
            error, pointer = self._driver.cuMemAlloc(nbytes)
            if int(error):
                # Torch keeps what its tensors no longer need.
                torch.cuda.empty_cache()
                error, pointer = self._driver.cuMemAlloc(nbytes)
        if int(error):
            raise torch.OutOfMemoryError(
                f"the rows that peers write to take {nbytes / 2**30:.2f} GiB of {self._device}, which has "
                f"{torch.cuda.mem_get_info(self._device)[0] / 2**30:.2f} GiB free"
            )
        return int(pointer)

    def free(self, pointer: int) -> None:
        """Give them back."""
        with torch.cuda.device(self._device), contextlib.suppress(Exception):
            self._driver.cuMemFree(pointer)

    def handle(self, pointer: int) -> bytes:
        """What another process needs to map them."""
        (handle,) = values(self._driver.cuIpcGetMemHandle(pointer), "this memory cannot be shared")
        return bytes(handle.reserved)

    def tensor(self, owner: Any) -> torch.Tensor:
        """The bytes that an owner has, as a tensor which keeps it."""
        return torch.as_tensor(owner, device=self._device)


def link_memory(device: torch.device) -> LinkMemory:
    """The link memory of a device of this process; made at the first call.

    Raises:
        UnsupportedError: no cuda-bindings, or no driver.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with _making:
        if index not in _memories:
            _memories[index] = LinkMemory(torch.device("cuda", index))
        return _memories[index]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


_memories: dict[int, LinkMemory] = {}
_making = threading.Lock()
