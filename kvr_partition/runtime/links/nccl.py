"""Rows over NCCL, for GPUs that do not reach each other's memory."""

from __future__ import annotations

from typing import Any

import torch

from kvr_partition.runtime.links.messages import Messages
from kvr_partition.runtime.links.plan import Hop, Slot


class NcclWire:
    """Messages over NCCL, on a communicator of this pair of ranks alone.

    Receives are posted on a stream of their own, so that none of them holds up anything but the next one from the
    same rank.

    Args:
        peer: the other rank.
        messages: of this prefill.
    """

    def __init__(self, peer: int, messages: Messages) -> None:
        self._peer = peer
        self._messages = messages
        self._stream: torch.cuda.Stream | None = None

    def post(self, layer: int, hop: Hop, slot: Slot) -> Any:
        """Have rows received in their place in a slot; returns what `wait` takes."""
        rows = slot.at(hop.piece)
        with torch.cuda.stream(self._receiving()):
            rows.record_stream(torch.cuda.current_stream())
            return self._messages.receive(layer, hop, rows)

    def wait(self, posted: Any, stream: torch.cuda.Stream) -> None:
        """Have a stream wait for rows."""
        with torch.cuda.stream(stream):
            posted.wait()

    def send(self, layer: int, hop: Hop, rows: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Send rows on a stream."""
        with torch.cuda.stream(stream):
            rows.record_stream(stream)
            self._messages.send(layer, hop, rows).wait()

    def post_background(self, layer: int, background: torch.Tensor) -> None:
        """Have background traffic received, as large as ``background``."""
        with torch.cuda.stream(self._receiving()):
            self._messages.receive_background(layer, self._peer, background)

    def send_background(self, layer: int, background: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Send background traffic on a stream."""
        with torch.cuda.stream(stream):
            self._messages.send_background(layer, self._peer, background).wait()

    def _receiving(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            # The rows were allocated on the compute stream; nothing may be written to them before that.
            self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream
