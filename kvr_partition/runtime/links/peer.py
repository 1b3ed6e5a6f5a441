"""Rows pushed into the memory of a later rank's GPU by copy engines: no kernel, no SM and no host waits for them.

Each rank has a page of flags that all others have mapped. A writer copies rows and, behind them on the same
stream, a word that counts prefills, into the reader's flag for that layer and chunk. The reader's streams wait for
the flag to become the number of this prefill.

That word is copied from the writer's own page, where it stands for as long as all is well. A rank that stops
waiting for KV that will never come first spoils the word, then fulfils its own waits. Whatever it computes and
sends from then on carries no valid flag, so that no rank takes it for KV.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from kvr_partition.errors import UnsupportedError
from kvr_partition.runtime.agreement import Agreement, Turn
from kvr_partition.runtime.driver import cuda_driver, values
from kvr_partition.runtime.links.memory import DriverAllocator, link_memory
from kvr_partition.runtime.links.plan import Hop, Slot, visible_prefix
from kvr_partition.runtime.links.stream import Streams
from kvr_partition.runtime.links.watch import PeerWatch

_PAGE_BYTES = 2 << 20
_PAGE_WORDS = _PAGE_BYTES // 4
_WORD = 4
_SPOILED = 2**32 - 1
"""No prefill has this number."""

_LOOK_S, _IDLE_LOOK_S = 0.1, 0.5
"""Seconds between two looks of the watchdog, while a prefill runs and while none does."""


class Rows(msgspec.Struct, frozen=True, array_like=True):
    """Where one rank's rows of a prefill are to be written.

    Attributes:
        segments: handles of the memory they lie in.
        places: for each layer that keeps KV, the number of its segment and the offset in it.
        scratch: likewise, of what background traffic is written to; empty without.
    """

    segments: tuple[bytes, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    scratch: tuple[int, int] | None = None


_encode = msgspec.msgpack.Encoder().encode
_rows = msgspec.msgpack.Decoder(Rows).decode


class PeerStreams(Streams):
    """Streams of the driver's own, which nobody else gets; torch hands each of its 32 to many."""

    def __init__(self, driver: Any) -> None:
        super().__init__()
        self._driver = driver

    def to(self, peer: int) -> Any:
        """The stream of what is sent to a peer."""
        if peer not in self._to:
            self._to[peer] = self.new()
        return self._to[peer]

    def new(self) -> Any:
        """A stream that waits for no other."""
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        (handle,) = values(self._driver.cuStreamCreate(flags), "no stream could be made")
        return torch.cuda.ExternalStream(int(handle))

    @property
    def all(self) -> list[Any]:
        """Those that were made."""
        return list(self._to.values())


class Peers:
    """One rank's place among those of a group that reach each other's memory.

    Attributes:
        memory: where this rank's rows live.
        streams: where its work is put.
        flags: the handle of its page of flags.
    """

    def __init__(self, agreement: Agreement, device: torch.device) -> None:
        self._agreement = weakref.ref(agreement)
        self._driver = cuda_driver("peer links need")
        self._device = device
        self.memory = link_memory(device)
        self.streams = PeerStreams(self._driver)
        allocator = DriverAllocator(device)
        self._page = allocator.allocate(_PAGE_BYTES)
        self._checked(self._driver.cuMemsetD32(self._page, 0, _PAGE_WORDS))
        torch.cuda.synchronize(device)
        self.flags = allocator.handle(self._page)
        self._pages: dict[int, int] = {}
        self._mapped: dict[bytes, int] = {}
        self._scratch: torch.Tensor | None = None
        # Not to be waited for by anything but itself: it must run when all else waits.
        self._aside = self.streams.new()
        self._change = agreement.change
        self._lock = threading.RLock()
        self._watched: PeerWatch | None = None
        agreement.guarded.append(self)
        threading.Thread(
            target=_watch,
            args=(weakref.ref(self), self._change),
            name=f"kvr-rank{agreement.rank}-watchdog",
            daemon=True,
        ).start()
        weakref.finalize(self, _unmap, self._driver, self._mapped).atexit = False

    # ------------------------------------------------------------------ memory

    def reach(self, peer: int, flags: bytes) -> bool:
        """Map another rank's page of flags; False where its GPU's memory cannot be reached."""
        try:
            self._pages[peer] = self._map(flags)
        except UnsupportedError:
            return False
        return True

    def state_rows(self, turn: Turn, slots: Sequence[Slot], noise: int) -> list[Rows]:
        """Tell all ranks where this one's rows are, and learn where theirs are.

        Args:
            slots: of each layer that keeps KV; empty on a rank that receives nothing.
            noise: bytes of background traffic.
        """
        memory = self.memory
        scratch = None
        if noise:
            if self._scratch is None or self._scratch.nbytes < noise:
                self._scratch = memory.empty((noise,), dtype=torch.uint8)
            scratch = memory.place(self._scratch)
        places = [memory.place(slot.rows) for slot in slots]
        known = tuple(place for place in places if place is not None)
        assert len(known) == len(places), "rows that peers write to must lie in link memory"
        memory.may_be_written([slot.rows for slot in slots], turn.expose())
        # What was under way on these rows, an earlier prompt's decoding for one, must not read what comes now.
        torch.cuda.current_stream().synchronize()
        for segment in memory.segments:
            segment.exported_by.add(self)
        mine = Rows(tuple(segment.handle for segment in memory.segments), known, scratch)
        return [_rows(body) for body in turn.exchange(_encode(mine))]

    def address(self, rows: Rows, place: tuple[int, int]) -> int:
        """Where, in this process, another rank's place lies.

        Raises:
            UnsupportedError: it cannot be mapped.
        """
        segment, offset = place
        return self._map(rows.segments[segment]) + offset

    def forget(self) -> None:
        """Unmap what other ranks' rows live in, so that they can give it back. No prefill may be under way."""
        self._scratch = None
        pages = set(self._pages.values())
        with torch.cuda.device(self._device):
            for handle, pointer in list(self._mapped.items()):
                if pointer not in pages:
                    self._driver.cuIpcCloseMemHandle(pointer)
                    del self._mapped[handle]

    def _map(self, handle: bytes) -> int:
        if handle not in self._mapped:
            made = self._driver.CUipcMemHandle()
            made.reserved = handle
            flags = self._driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            with torch.cuda.device(self._device):
                (pointer,) = values(
                    self._driver.cuIpcOpenMemHandle(made, flags), "another rank's memory cannot be mapped"
                )
            self._mapped[handle] = int(pointer)
        return self._mapped[handle]

    # ----------------------------------------------------------------- streams

    def flag(self, layer: int, chunk: int, chunks: int) -> int:
        """The offset of a flag in a page; the word at 0 is the one that is copied into flags."""
        word = 1 + layer * chunks + chunk
        if word >= _PAGE_WORDS:
            raise UnsupportedError(f"peer links have flags for {_PAGE_WORDS - 1} chunks of layers at most")
        return word * _WORD

    def wait(self, offset: int, number: int, stream: Any) -> None:
        """Have a stream wait until a flag of this rank has the number of a prefill."""
        equal = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        self._checked(self._driver.cuStreamWaitValue32(stream.cuda_stream, self._page + offset, number, equal))

    def push(self, rows: torch.Tensor, to: int, stream: Any) -> None:
        """Copy rows to an address on another device."""
        self._checked(self._driver.cuMemcpyAsync(to, rows.data_ptr(), rows.nbytes, stream.cuda_stream))

    def tell(self, peer: int, offset: int, stream: Any) -> None:
        """Copy the word of this rank's prefill into a flag of another rank, behind what is on the stream."""
        self._checked(
            self._driver.cuMemcpyAsync(self._pages[peer] + offset, self._page, _WORD, stream.cuda_stream)
        )

    # ---------------------------------------------------------------- watchdog

    def begin(self, watch: PeerWatch) -> None:
        """A prefill begins on the current stream.

        Raises:
            RankError: another rank has failed already.
        """
        with self._lock:
            if watch.turn.failure is not None:
                raise watch.turn.failed()
            stream = torch.cuda.current_stream()
            self._checked(self._driver.cuStreamWriteValue32(stream.cuda_stream, self._page, watch.turn.number, 0))
            watch.stream, watch.begun = stream, stream.record_event()
            self._watched = watch

    def end(self, watch: PeerWatch) -> None:
        """A prefill is over.

        Raises:
            RankError: its waits were ended.
        """
        with self._lock:
            if watch.released:
                raise watch.turn.failed()
            self._watched = None

    def release(self) -> None:
        """End all waits of this rank's streams, and have nobody take what they send from now on for KV."""
        with self._lock:
            watch = self._watched
            if watch is None or watch.released:
                return
            with torch.cuda.device(self._device):
                watch.ended_in = watch.waits_in()
                watch.released = True
                stream = self._aside.cuda_stream
                # Else the word might be made whole after it was spoiled.
                self._aside.wait_event(watch.begun)
                self._driver.cuStreamWriteValue32(stream, self._page, _SPOILED, 0)
                self._fulfil(watch)

    def _fulfil(self, watch: PeerWatch) -> None:
        """Set all flags of this rank. A rank that was released, too, may unset some of them again."""
        self._driver.cuMemsetD32Async(
            self._page + _WORD, watch.turn.number, _PAGE_WORDS - 1, self._aside.cuda_stream
        )

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing of the latest prefill is under way on this device; False: it still is."""
        watch = self._watched
        if watch is None:
            return True
        with torch.cuda.device(self._device):
            left = [stream.record_event() for stream in (*self.streams.all, watch.stream, self._aside)]
            until = time.monotonic() + timeout_s
            while not all(event.query() for event in left):
                if time.monotonic() > until:
                    return False
                time.sleep(0.001)
                with self._lock:
                    self._fulfil(watch)
            with self._lock:
                # Flags that are set from here on are those of a later prefill.
                self._watched = None
                self._aside.synchronize()
        return True

    def look(self) -> bool:
        """Release the prefill under way if it cannot come to its end; whether there is one."""
        watch, agreement = self._watched, self._agreement()
        if watch is None or agreement is None:
            return False
        if watch.released:
            with self._lock, torch.cuda.device(self._device):
                if watch is self._watched:
                    self._fulfil(watch)
            return True
        if agreement.failure is None:
            with torch.cuda.device(self._device):
                found = watch.look()
            if found is None or watch is not self._watched:
                return True
            agreement.fail(found, found.phase)
        self.release()
        return True

    def broke(self, error: Exception) -> bool:
        """Looking failed, a driver that refuses for one: nothing can be waited for any more."""
        agreement = self._agreement()
        if agreement is None:
            return False
        watch = self._watched
        agreement.fail(error, "the watch over peer links" if watch is None else watch.turn.phase)
        with contextlib.suppress(Exception):
            self.release()
        return True

    def missing(self, hops: Sequence[Hop], layer: int, number: int, chunks: int) -> list[Hop]:
        """Of the pieces that a layer waits for, those whose flags are not there yet."""
        page = torch.empty(_PAGE_WORDS, dtype=torch.int32)
        with self._lock:
            self._checked(
                self._driver.cuMemcpyDtoHAsync(page.data_ptr(), self._page, _PAGE_BYTES, self._aside.cuda_stream)
            )
            self._aside.synchronize()
        return [hop for hop in hops if int(page[self.flag(layer, hop.piece.chunk, chunks) // _WORD]) != number]

    def _checked(self, result: tuple[Any, ...]) -> None:
        values(result, "the CUDA driver refused a step of a peer link")


class PeerWire:
    """Rows written into one later rank's memory, or by an earlier rank into this one's.

    Args:
        peers: this rank's place.
        peer: the other rank.
        turn: of this prefill.
        chunks: how many chunks it has.
        rows: where the peer's rows are; None for one that is only received from.
        start: of the peer's chunk, in tokens.
        slots: this rank's own, which tell windows.
    """

    def __init__(
        self,
        peers: Peers,
        peer: int,
        turn: Turn,
        chunks: int,
        rows: Rows | None,
        start: int,
        slots: Sequence[Slot],
    ) -> None:
        self._peers = peers
        self._peer = peer
        self._number = turn.number
        self._chunks = chunks
        self._targets: list[tuple[int, int]] = []
        self._scratch = 0
        if rows is not None:
            self._targets = [
                (peers.address(rows, place), start - visible_prefix(start, slot.window))
                for place, slot in zip(rows.places, slots, strict=True)
            ]
            if rows.scratch is not None:
                self._scratch = peers.address(rows, rows.scratch)

    def post(self, layer: int, hop: Hop, slot: Slot) -> Any:
        """Nothing is to be done for rows to come; returns the flag that they come with."""
        return self._peers.flag(layer, hop.piece.chunk, self._chunks)

    def wait(self, posted: Any, stream: Any) -> None:
        """Have a stream wait for rows."""
        self._peers.wait(posted, self._number, stream)

    def send(self, layer: int, hop: Hop, rows: torch.Tensor, stream: Any) -> None:
        """Send rows on a stream."""
        base, first = self._targets[layer]
        at = (hop.piece.start - first) * (rows.nbytes // rows.shape[0])
        self._peers.push(rows, base + at, stream)
        self._peers.tell(self._peer, self._peers.flag(layer, hop.piece.chunk, self._chunks), stream)

    def post_background(self, layer: int, background: torch.Tensor) -> None:
        """Nothing is to be done for what nobody reads."""

    def send_background(self, layer: int, background: torch.Tensor, stream: Any) -> None:
        """Send background traffic on a stream."""
        self._peers.push(background, self._scratch, stream)


def _watch(of: weakref.ref[Peers], change: threading.Condition) -> None:
    """The watchdog of a group: ends when nobody has the group any more."""
    while (peers := of()) is not None:
        try:
            under_way = peers.look()
        except Exception as error:  # told to all ranks; without this thread nobody would end their waits
            under_way = peers.broke(error)
        del peers
        with change:
            change.wait(_LOOK_S if under_way else _IDLE_LOOK_S)


def _unmap(driver: Any, mapped: dict[bytes, int]) -> None:
    for pointer in mapped.values():
        driver.cuIpcCloseMemHandle(pointer)
