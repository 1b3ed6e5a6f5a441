"""How a run is carried out: at once, or recorded to be replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from kvr_partition.runtime.clock import Clock, clock_for


@dataclass(frozen=True)
class Execution:
    """What a recorded run does differently from one that is carried out at once.

    Attributes:
        clock: takes the stamps of the timeline.
        to_host: whether the first token is copied to the host, which waits for the device.
        empty: allocates rows of KV, like ``torch.empty``.
        owns: whether this run can extend the rows of a past cache where they lie.
        room: given the bytes of each layer's rows, returns what allocates them, called once a layer in that order;
            None where `empty` does.
        eager: whether it is carried out while it is enqueued.
    """

    clock: Callable[[torch.device], Clock] = clock_for
    to_host: bool = True
    empty: Callable[..., torch.Tensor] = torch.empty
    owns: Callable[[torch.Tensor], bool] = lambda _: True
    room: Callable[[Sequence[int]], Callable[..., torch.Tensor]] | None = None
    eager: bool = True


EAGER = Execution()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one, and its current stream with it; nothing for others."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
