"""Background traffic on links: which link it is on, agreed on by seed."""

from __future__ import annotations

import random


def noisy_link(layer: int, ranks: int, noise: int, seed: int) -> int | None:
    """The rank whose link to the next one carries background traffic in a layer; None without noise.

    Args:
        layer: counts the layers that keep KV.
        ranks: of the group.
        noise: bytes of background traffic; 0 for none.
        seed: all ranks must agree on it.
    """
    if not noise or ranks < 2:
        return None
    return random.Random(seed * 1_000_003 + layer).randrange(ranks - 1)
