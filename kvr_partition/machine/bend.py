"""What the terms of a cost misstate smoothly, as searches find it; in memory only, files have no such costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from kvr_partition.machine.cost import ChunkCost, Parts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


class Bend(msgspec.Struct, frozen=True):
    """A smooth factor on the time of chunks, for what the terms of a cost misstate over a range of sizes.

    Its logarithm is a sum of bumps, ``Σ weight·exp(−½·d²)``, and fades away from where chunks were measured.
    Distances are between the logarithms of chunks' sizes, and of the tokens that one of theirs sees on average.

    Attributes:
        scales: what counts as far, of both logarithms.
        places: of the bumps: both logarithms, divided by the scales.
        weights: of the bumps.
    """

    scales: tuple[float, float]
    places: tuple[tuple[float, float], ...]
    weights: tuple[float, ...]

    def factor(self, chunk: Any, prefix: Any) -> Array:
        """The factor for chunks behind prefixes."""
        import numpy as np

        heights = bumps(bend_places(chunk, prefix, self.scales), np.array(self.places))
        factors: Array = np.exp(heights @ np.array(self.weights))
        return factors


class BentCost(ChunkCost, frozen=True):
    """A cost that is off by a smooth factor."""

    bend: Bend | None = None

    def parts(self, chunk: Any, prefix: Any, dense: bool = False) -> Parts:
        """See `ChunkCost.parts`."""
        found = super().parts(chunk, prefix, dense)
        if self.bend is None:
            return found
        factor = self.bend.factor(chunk, prefix)
        return Parts(found.tokens * factor, found.own * factor, found.prefix * factor)


def bend_places(chunk: Any, prefix: Any, scales: tuple[float, float]) -> Array:
    """Where chunks behind prefixes lie for a `Bend`, ``[..., 2]``."""
    import numpy as np

    chunk = np.maximum(np.asarray(chunk, dtype=float), 1.0)
    seen = np.asarray(prefix, dtype=float) + chunk / 2
    found: Array = np.stack([np.log(chunk), np.log(seen)], axis=-1) / np.array(scales)
    return found


def bumps(at: Array, places: Array) -> Array:
    """Height at some places ``[..., 2]`` of the bumps at others ``[n, 2]``, ``[..., n]``."""
    import numpy as np

    # |a − b|² as |a|² + |b|² − 2ab, without all differences in memory.
    squares = (at * at).sum(-1)[..., None] + (places * places).sum(-1) - 2 * at @ places.T
    heights: Array = np.exp(-0.5 * np.maximum(squares, 0.0))
    return heights
