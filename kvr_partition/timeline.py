"""Timeline: when each layer of a prefill computed, waited for KV and sent KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """One layer of one rank, in seconds.

    A layer begins when the KV of the layer before it was handed over (the first one: when the prefill
    began) and ends when its own KV has been handed over and any prefix it needs has arrived.

    Attributes:
        compute_s: spent computing between those two moments.
        wait_s: spent waiting for the prefix of this layer.
        transfer_s: the KV sent on from this layer was on the wire; overlaps with the other two.
    """

    compute_s: float
    wait_s: float
    transfer_s: float


@dataclass(frozen=True, slots=True)
class RankTimeline:
    """One rank of a prefill, in seconds.

    Attributes:
        layers: one entry per layer that keeps KV.
        tail_s: computing after the last layer's KV was complete: its attention, MLP and the logits.
        first_kv_s: from the beginning until the first layer's KV was handed over, None where none is.
    """

    layers: tuple[LayerTimes, ...]
    tail_s: float
    first_kv_s: float | None = None

    @classmethod
    def of_stamps(cls, seconds: Sequence[float], transfer_s: Sequence[float]) -> RankTimeline:
        """From a clock's stamps: the start, for each layer its KV ready, its wait begun and over, and the end.

        Args:
            seconds: one each, ``2 + 3 · layers``.
            transfer_s: of each layer.
        """
        layers = []
        last = seconds[0]
        for position, sent in enumerate(transfer_s):
            wait_begins, wait_ends = seconds[2 + 3 * position], seconds[3 + 3 * position]
            layers.append(LayerTimes(wait_begins - last, wait_ends - wait_begins, sent))
            last = wait_ends
        return cls(tuple(layers), seconds[-1] - last, seconds[1] - seconds[0])

    @property
    def compute_s(self) -> float:
        """Seconds spent computing, tail included."""
        return sum(layer.compute_s for layer in self.layers) + self.tail_s

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for KV."""
        return sum(layer.wait_s for layer in self.layers)

    @property
    def transfer_s(self) -> float:
        """Seconds during which KV sent by this rank was on the wire."""
        return sum(layer.transfer_s for layer in self.layers)
