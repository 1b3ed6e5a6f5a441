"""Stamps inside a prefill: host clock on the CPU, events of the compute stream on CUDA."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Clock(Protocol):
    """Takes stamps without holding anything up; tells the seconds between them afterwards."""

    def stamp(self) -> int:
        """Take a stamp; returns its index."""

    def seconds(self) -> list[float]:
        """All stamps as seconds since the first one. May wait for the device."""


class HostClock:
    """Stamps of the monotonic host clock, which all processes of a host share."""

    def __init__(self) -> None:
        self._stamps: list[float] = []

    def stamp(self) -> int:
        self._stamps.append(time.perf_counter())
        return len(self._stamps) - 1

    def seconds(self) -> list[float]:
        return [stamp - self._stamps[0] for stamp in self._stamps]


class StreamClock:
    """Events recorded on the CUDA stream that is current at the first: what the device did, not the host."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self._stream: torch.cuda.Stream | None = None

    def stamp(self) -> int:
        if self._stream is None:
            # Asking for it takes longer than recording an event, and there are three a layer.
            self._stream = torch.cuda.current_stream()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._events.append(event)
        return len(self._events) - 1

    def seconds(self) -> list[float]:
        if self._events:
            self._events[-1].synchronize()
        return [self._events[0].elapsed_time(event) / 1e3 for event in self._events]


def clock_for(device: torch.device) -> Clock:
    """The clock that tells what a device did."""
    return StreamClock() if device.type == "cuda" else HostClock()
