"""Machines that differ from what a search is told: landscapes on which samplers and predictors are judged.

A landscape has a machine that was profiled, and a true one. The kinds differ in what the cost model cannot say:

- ``usual``: every term of the cost up to 15% off, a slow rank, a slow link; the model can say all of it.
- ``far``: attention 1.6 times dearer to what lies beyond 65,536 tokens.
- ``range``: chunks of a range of sizes 20 to 35% dearer.
- ``floor``: small chunks take as long as a longer one, since the host sets the pace.
- ``waves``: whole waves of tiles are computed, so that time grows in steps.
- ``window``: attention sees no further than a window.
- ``experts``: weights of experts are read for small chunks as for large ones.
- ``unknown rank``, ``unknown link``: twice as slow, and ten times, and no profile said so.
- ``drift``: the whole machine's speed changes from one measurement to the next, and some samples are outliers.
- ``valley``: TTFT depends on a boundary in a way that no rank's time shows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from kvr_partition.machine.cost import ChunkCost, LinkCost, Parts
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Measurement, RankTimes, Sample
from kvr_partition.partition import Partition
from kvr_partition.search.local_search import descent
from kvr_partition.search.space import default_quantum

LAYERS = 32

COST = ChunkCost(1e-3, 2.2e-5, 2e-9, 1.9e-9, 0.25)
"""The order of a 7B model on one large GPU."""


class TrueCost(ChunkCost, frozen=True):
    """A cost with more than its terms in it."""

    more: Any = None
    """What is done to the parts of chunks, given these, their sizes and their prefixes."""

    def parts(self, chunk: Any, prefix: Any, dense: bool = False) -> Parts:
        """See `ChunkCost.parts`."""
        found = super().parts(chunk, prefix, dense)
        return found if self.more is None else self.more(found, chunk, prefix)


@dataclass(frozen=True)
class Landscape:
    """What a search is told, and what is true.

    Attributes:
        name: with all that it depends on; random numbers come from it.
        kind: what the cost model cannot say.
        fitted: the machine that was profiled.
        truth: the machine that is measured.
        valley: a factor on TTFT, of partitions ``[n, ranks]``.
        drift: standard deviation of the whole machine's speed between measurements, as a share.
    """

    name: str
    kind: str
    context: int
    ranks: int
    fitted: Machine
    truth: Machine
    valley: Callable[[Any], Any] | None = None
    drift: float = 0.0

    @property
    def quantum(self) -> int:
        """What boundaries are multiples of."""
        return default_quantum(self.context, self.ranks)

    @property
    def solved(self) -> Partition:
        """The best split of the machine that was profiled."""
        return best_split(self.context, self.ranks, self.fitted, self.quantum)

    def ttft_s(self, sizes: Any) -> Any:
        """True TTFT in seconds of partitions ``[n, ranks]``."""
        import numpy as np

        from kvr_partition.machine.schedule import ttft

        table = np.asarray(sizes, dtype=float)
        times = ttft(table, self.truth)
        return times if self.valley is None else times * self.valley(table)

    def best_s(self) -> float:
        """TTFT of the best partition that local searches from several places find."""
        import numpy as np

        starts = [
            self.solved,
            best_split(self.context, self.ranks, self.truth, self.quantum),
            Partition.even(self.context, self.ranks, quantum=self.quantum),
        ]
        draw = random.Random(self.name)
        for _ in range(6):
            shares = [size * draw.uniform(0.7, 1.4) for size in self.solved.sizes]
            starts.append(Partition.from_fractions(shares, self.context, quantum=self.quantum))
        found = []
        for start in starts:
            sizes = np.array(start.sizes)
            for times in (16, 4, 1):
                sizes = descent(sizes, self.quantum * times, self.ttft_s)[-1]
            found.append(float(self.ttft_s(sizes[None, :])[0]))
        return min(found)


KINDS = (
    "usual", "far", "range", "floor", "waves", "window", "experts", "unknown rank", "unknown link", "drift",
    "valley",
)  # fmt: skip


def landscapes(kind: str, repeats: int = 1) -> Iterator[Landscape]:
    """All landscapes of a kind: ranks, bandwidths and kinds of attention, contexts in turn."""
    contexts = (131072, 196608, 262144) if kind == "far" else (4096, 8192, 16384, 32768)
    all_ranks = {"far": (4,), "valley": (2, 3)}.get(kind, (2, 3, 4, 6, 8))
    count = 0
    for repeat in range(repeats):
        for ranks in all_ranks:
            for bandwidth in (300e9, 10e9, 1e9) if kind != "far" else (300e9, 100e9, 30e9):
                for attention, entry_bytes in (("mha", 16384), ("gqa", 4096)):
                    context = contexts[(count + repeat) % len(contexts)]
                    count += 1
                    name = f"{ranks} ranks, {bandwidth / 1e9:g} GB/s, {attention}, {context}, {repeat}"
                    yield _landscape(kind, name, context, ranks, bandwidth, entry_bytes)


def _landscape(kind: str, name: str, context: int, ranks: int, bandwidth: float, entry_bytes: int) -> Landscape:
    fitted = Machine(COST, LAYERS, entry_bytes, link=LinkCost.of(bandwidth, 2e-5))
    if kind == "usual":
        return Landscape(name, kind, context, ranks, fitted, _usual(name, fitted, ranks, bandwidth))
    name = f"{kind}: {name}"
    draw = random.Random(name)
    even = context / ranks
    truth, valley, drift = fitted, None, 0.0
    if kind == "unknown rank":
        slow = [1.0] * ranks
        slow[draw.randrange(ranks)] = 0.5
        truth = replace(fitted, speeds=tuple(slow))
    elif kind == "unknown link":
        links = [LinkCost.of(bandwidth, 2e-5)] * (ranks - 1)
        links[draw.randrange(ranks - 1)] = LinkCost.of(bandwidth / 10, 2e-5)
        truth = replace(fitted, link=tuple(links))
    elif kind == "drift":
        truth, drift = _usual(name, fitted, ranks, bandwidth), 0.03
    elif kind == "valley":
        middle, width, depth = even * draw.uniform(0.6, 1.4), even * 0.3, draw.uniform(0.1, 0.25)

        def valley(sizes: Any) -> Any:
            import numpy as np

            return 1 - depth * np.exp(-(((sizes[:, 0] - middle) / width) ** 2))
    else:
        more = _MORE[kind](draw, even)
        truth = replace(fitted, cost=TrueCost(*COST.terms, more=more))
    return Landscape(name, kind, context, ranks, fitted, truth, valley, drift)


def _usual(name: str, fitted: Machine, ranks: int, bandwidth: float) -> Machine:
    draw = random.Random(name)

    def off(share: float = 0.15) -> float:
        return 1 + draw.uniform(-share, share)

    cost = ChunkCost.of_terms(term * off() for term in fitted.cost.terms)
    speeds = [off(0.03) for _ in range(ranks)]
    speeds[draw.randrange(ranks)] *= 0.85
    rates = [bandwidth * off() for _ in range(ranks - 1)]
    rates[draw.randrange(ranks - 1)] *= 0.7
    links = tuple(LinkCost.of(rate, 2e-5 * off()) for rate in rates)
    return replace(fitted, cost=cost, speeds=tuple(speeds), link=links)


def _far(draw: random.Random, even: float) -> Any:
    """Attention to tokens beyond a point is dearer."""

    def more(parts: Parts, chunk: Any, prefix: Any) -> Parts:
        import numpy as np

        # Pairs of a query and what lies more than so many tokens before it.
        beyond = np.maximum(prefix + chunk - 65536.0, 0.0)
        share = np.minimum(beyond, chunk) / chunk
        return Parts(parts.tokens, parts.own * (1 + 0.6 * share), parts.prefix * (1 + 0.6 * share))

    return more


def _range(draw: random.Random, even: float) -> Any:
    """Chunks of a range of sizes take longer."""
    low = even * draw.uniform(0.5, 1.1)
    high, dearer = low * draw.uniform(1.3, 1.9), draw.uniform(0.2, 0.35)

    def more(parts: Parts, chunk: Any, prefix: Any) -> Parts:
        factor = 1 + dearer * ((low <= chunk) & (chunk <= high))
        return Parts(*(part * factor for part in parts))

    return more


def _floor(draw: random.Random, even: float) -> Any:
    """No chunk takes less than one of a certain size would."""
    least = even * draw.uniform(0.7, 1.0)

    def more(parts: Parts, chunk: Any, prefix: Any) -> Parts:
        import numpy as np

        tokens = np.maximum(parts.tokens, COST.fixed_s + COST.per_token_s * least)
        return Parts(tokens, parts.own, parts.prefix)

    return more


def _waves(draw: random.Random, even: float) -> Any:
    """Time per token grows in steps of whole waves of tiles."""
    wave = max(16, 2 ** round(math.log2(even / draw.uniform(5, 12))))

    def more(parts: Parts, chunk: Any, prefix: Any) -> Parts:
        import numpy as np

        factor = np.ceil(chunk / wave) * wave / chunk
        return Parts(parts.tokens * factor, parts.own, parts.prefix)

    return more


def _window(draw: random.Random, even: float) -> Any:
    """Queries see no further back than a window."""
    window = even * draw.uniform(0.4, 1.5)

    def more(parts: Parts, chunk: Any, prefix: Any) -> Parts:
        import numpy as np

        inside = np.minimum(chunk, window)
        own = COST.per_own_pair_s * (inside * inside / 2 + (chunk - inside) * window)
        ahead = np.minimum(prefix, window)
        before = COST.per_prefix_pair_s * np.minimum(chunk * ahead, ahead * ahead / 2 + ahead * (window - ahead))
        return Parts(parts.tokens, own, before)

    return more


def _experts(draw: random.Random, even: float) -> Any:
    """Half of what tokens take is weights, read in full once a chunk has a token for most experts."""
    enough = even * draw.uniform(0.3, 1.0)

    def more(parts: Parts, chunk: Any, prefix: Any) -> Parts:
        import numpy as np

        weights = 0.5 * COST.per_token_s * enough * (1 - np.exp(-chunk / (enough / 3)))
        return Parts(parts.tokens * 0.6 + weights, parts.own, parts.prefix)

    return more


_MORE: dict[str, Callable[[random.Random, float], Any]] = {
    "far": _far, "range": _range, "floor": _floor, "waves": _waves, "window": _window, "experts": _experts,
}  # fmt: skip


class Measured:
    """The truth, measured with noise.

    Args:
        landscape: whose truth.
        seed: of the noise.
        noise: standard deviation of a sample, as a share.
        samples: of each measurement.
    """

    def __init__(self, landscape: Landscape, seed: int, noise: float = 0.02, samples: int = 1) -> None:
        self._landscape, self._noise, self._samples = landscape, noise, samples
        self._random = random.Random(f"{landscape.name} {seed}")
        self.asked: list[Measurement] = []

    def __call__(self, partition: Partition) -> Measurement:
        landscape = self._landscape
        timeline = simulate(partition, landscape.truth)
        ttft_s = float(landscape.ttft_s([partition.sizes])[0])
        pace = math.exp(self._random.gauss(0.0, landscape.drift)) if landscape.drift else 1.0

        def noisy(seconds: float) -> float:
            outlier = 1.5 if landscape.drift and self._random.random() < 0.03 else 1.0
            return seconds * pace * outlier * max(0.5, self._random.gauss(1.0, self._noise))

        def sample() -> Sample:
            ranks = tuple(
                RankTimes(noisy(rank.compute_s), noisy(rank.wait_s), noisy(rank.transfer_s))
                for rank in timeline.ranks
            )
            return Sample(noisy(ttft_s), ranks, 0)

        samples = tuple(sample() for _ in range(self._samples))
        self.asked.append(Measurement("kvr", partition.sizes, samples, "cap"))
        return self.asked[-1]
