"""What a chunk and a message take: one formula, its fit to timed chunks, and its form in files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvr_partition.errors import KVRError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MAX_CONDITION = 100.0
MAX_RESIDUAL = 0.25
MAX_STANDARD_ERROR = 0.05

LEAST_STEP = 32
"""Tokens of a quantum below which chunk sizes differ by less than the tiles of any kernel."""


class FitError(KVRError):
    """The timed chunks do not determine a cost model; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class TimedChunk:
    """``seconds`` for a chunk of ``chunk`` tokens behind ``prefix`` tokens.

    ``first_kv_s`` is the part of it until the KV of the first of ``layers`` layers was ready, if known.
    """

    chunk: int
    prefix: int
    seconds: float
    first_kv_s: float | None = None
    layers: int = 1


class LinkCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Time of a message on one directed link: ``latency_s + bytes · seconds_per_byte``."""

    latency_s: float = 0.0
    seconds_per_byte: float = 0.0

    @classmethod
    def of(cls, bandwidth: float, latency_s: float = 0.0) -> LinkCost:
        """A link of so many bytes per second."""
        return cls(latency_s, 1.0 / bandwidth)

    @classmethod
    def fit(cls, timed: Sequence[tuple[int, float]]) -> LinkCost:
        """The link that best explains ``(bytes, seconds)`` of messages: non-negative, on relative errors.

        Raises:
            FitError: messages of one size only, or times that do not grow with it.
        """
        import numpy as np

        sizes = {nbytes for nbytes, _ in timed}
        if len(sizes) < 2 or max(sizes) < 4 * min(sizes):
            raise FitError("a link's latency and bandwidth need messages of two sizes at least 4x apart")
        terms = np.array([[1.0, nbytes] for nbytes, _ in timed]) / np.array([[seconds] for _, seconds in timed])
        latency, per_byte = _prices(terms)
        if per_byte == 0:
            raise FitError("messages take equally long whatever their size; send larger ones")
        return cls(float(latency), float(per_byte))

    def seconds(self, nbytes: float) -> float:
        """Time in seconds from the first byte leaving to the last one arriving."""
        return self.latency_s + nbytes * self.seconds_per_byte


class Parts(NamedTuple):
    """Seconds of a chunk: what its tokens take, attention to itself, and attention to the prefix."""

    tokens: Any
    own: Any
    prefix: Any


class ChunkCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Time of a chunk with causal attention: own block half a square, prefix a rectangle.

    ``seconds(c, s) = fixed + per_token·c + per_own_pair·c²/2 + per_prefix_pair·c·s``, every term ≥ 0, times the
    size effect of ``c``, where it has one. Files keep it as it is, size effects under the name ``steps``.
    """

    fixed_s: float
    per_token_s: float
    per_own_pair_s: float
    per_prefix_pair_s: float
    # A default that files show all the same.
    kv_share: float = msgspec.field(default_factory=float)
    """Share of the fixed and per-token time that a layer spends before its KV is ready to be sent."""
    size_effects: tuple[tuple[int, float], ...] = msgspec.field(default=(), name="steps")
    """Chunks of exactly so many tokens, in order, and how many times as long as the terms say they take.

    Kernels cut rows into tiles and tiles into waves, which fits some sizes better than their neighbours.
    """

    @property
    def terms(self) -> tuple[float, float, float, float, float]:
        """The four terms in seconds, and ``kv_share``."""
        return self.fixed_s, self.per_token_s, self.per_own_pair_s, self.per_prefix_pair_s, self.kv_share

    @classmethod
    def of_terms(cls, terms: Iterable[float]) -> ChunkCost:
        """A cost of such `terms`, without size effects."""
        fixed, token, own_pair, prefix_pair, kv_share = map(float, terms)
        return cls(fixed, token, own_pair, prefix_pair, kv_share)

    @property
    def smooth(self) -> ChunkCost:
        """The same without size effects."""
        return msgspec.structs.replace(self, size_effects=())

    @property
    def plain(self) -> ChunkCost:
        """Its terms alone, as files keep them."""
        return ChunkCost.of_terms(self.terms)

    @property
    def wrong(self) -> str | None:
        """Why no chunk can cost that, or None."""
        terms = (self.fixed_s, self.per_token_s, self.per_own_pair_s, self.per_prefix_pair_s)
        sizes = [size for size, _ in self.size_effects]
        if sizes != sorted(set(sizes)) or any(size < 1 or factor <= 0 for size, factor in self.size_effects):
            return "steps need sizes that grow, and factors above 0"
        if min(terms) < 0 or max(terms[1:]) == 0 or not 0 <= self.kv_share < 1:
            return "its cost must not be negative, must grow with the chunk, and kv_share lies in [0, 1)"
        return None

    def parts(self, chunk: Any, prefix: Any, dense: bool = False) -> Parts:
        """Seconds of the three parts of a chunk; of many at once where these are arrays.

        Args:
            chunk, prefix: tokens of the chunk and before it.
            dense: whether every pair of the own block is computed and masked, rather than the causal ones.
        """
        effect = self.size_effect(chunk)
        return Parts(
            (self.fixed_s + self.per_token_s * chunk) * effect,
            self.per_own_pair_s * chunk * chunk * (1.0 if dense else 0.5) * effect,
            self.per_prefix_pair_s * chunk * prefix * effect,
        )

    def seconds(self, chunk: float, prefix: float, dense: bool = False) -> float:
        """Time in seconds of ``chunk`` tokens behind ``prefix`` tokens; see `parts`."""
        return float(sum(self.parts(chunk, prefix, dense)))

    def size_effect(self, chunk: Any) -> Any:
        """What the terms are multiplied by for a chunk of so many tokens, or for each of an array."""
        if not hasattr(chunk, "shape"):
            return next((factor for size, factor in self.size_effects if size == chunk), 1.0)
        import numpy as np

        if not self.size_effects:
            return np.ones_like(chunk)
        sizes, factors = (np.array(column) for column in zip(*self.size_effects, strict=True))
        at = np.searchsorted(sizes, chunk).clip(max=len(sizes) - 1)
        return np.where(sizes[at] == chunk, factors[at], 1.0)

    def chunk_for(self, seconds: float, prefix: float) -> float:
        """The largest chunk, in tokens, not rounded, that its terms say takes at most ``seconds``."""
        spare = seconds - self.fixed_s
        if spare <= 0:
            return 0.0
        linear = self.per_token_s + self.per_prefix_pair_s * prefix
        if self.per_own_pair_s == 0:
            return spare / linear if linear > 0 else math.inf
        # The positive root, written so that it stays exact where the quadratic term is tiny.
        root = math.sqrt(linear * linear + 2 * self.per_own_pair_s * spare)
        return 2 * spare / (linear + root)

    @classmethod
    def fit(cls, timed: Sequence[TimedChunk]) -> ChunkCost:
        """Fit by non-negative least squares on relative errors.

        Raises:
            FitError: too few or too similar chunks (longest at least 4 × the shortest, with and without
                prefix), or times that no such cost explains.
        """
        import numpy as np
        from scipy.optimize import nnls

        if len(timed) < 5:
            raise FitError(f"{len(timed)} timed chunks cannot fix four costs; time at least 5")
        chunks = [point.chunk for point in timed]
        if max(chunks) < 4 * min(chunks):
            raise FitError(
                f"chunks of {min(chunks)} to {max(chunks)} tokens are too alike to tell costs apart; "
                f"add one of {4 * min(chunks)} tokens or more"
            )
        if len({point.prefix for point in timed}) < 2:
            raise FitError("every chunk was timed behind the same prefix; add one behind another prefix")
        seconds = np.array([point.seconds for point in timed])
        terms = multiples(np.array(chunks, dtype=float), np.array([point.prefix for point in timed], dtype=float))
        weighted = terms / seconds[:, None]
        scale = np.linalg.norm(weighted, axis=0)
        scaled = weighted / scale
        condition = float(np.linalg.cond(scaled))
        if condition > MAX_CONDITION:
            raise FitError(
                f"these chunks leave the costs undetermined (condition {condition:.0f} > {MAX_CONDITION:.0f}); "
                "spread chunk and prefix sizes wider"
            )
        solution, _ = nnls(scaled, np.ones(len(timed)))
        residual = np.abs(scaled @ solution - 1)
        if residual.max() > MAX_RESIDUAL:
            worst = timed[int(residual.argmax())]
            raise FitError(
                f"{worst.chunk} tokens behind {worst.prefix} took {worst.seconds:.4g} s, "
                f"{residual.max():.0%} off what the other chunks imply; time it again on a quieter machine"
            )
        freedom = max(1, len(timed) - int((solution > 0).sum()))
        variance = float((residual**2).sum()) / freedom
        used = scaled[:, solution > 0]
        leverage = np.einsum("ij,jk,ik->i", used, np.linalg.pinv(used.T @ used), used)
        error = float(np.sqrt(variance * leverage.max()))
        if error > MAX_STANDARD_ERROR:
            raise FitError(
                f"the fitted costs are only good to {error:.0%} (at most {MAX_STANDARD_ERROR:.0%} is useful); "
                "take more samples of each chunk"
            )
        fixed, token, own, prefix = (float(value) for value in solution / scale)
        longest = max(chunks)
        if token * longest + own * longest * longest / 2 <= 1e-6 * fixed:
            raise FitError(
                "these chunks take equally long whatever their size; add longer ones, or a longer context"
            )
        return cls(fixed, token, own, prefix, _kv_share(timed, fixed, token))


def multiples(chunk: Array, prefix: Array, dense: bool = False) -> Array:
    """What the four terms count of chunks behind prefixes, ``[..., 4]``: once, tokens, own and prefix pairs."""
    import numpy as np

    own = chunk * chunk * (1.0 if dense else 0.5)
    return np.stack([np.ones_like(chunk), chunk, own, chunk * prefix], axis=-1)


def size_effects_of(timed: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """`ChunkCost.size_effects` from what chunks of several sizes take behind the same prefix.

    Args:
        timed: ``(tokens, seconds)`` of each size, of the whole model or of some layers.

    Returns:
        Each size, in order, and how many times as long it takes as a smooth cost fitted to all of them says.
    """
    import numpy as np

    ordered = sorted(timed)
    seconds = np.array([taken for _, taken in ordered])
    terms = np.array([[1.0, size, size * size / 2] for size, _ in ordered]) / seconds[:, None]
    expected = terms @ _prices(terms)
    return tuple((size, float(1 / share)) for (size, _), share in zip(ordered, expected, strict=True))


def _prices(terms: Array) -> Array:
    """What a unit of each term takes, never less than nothing; terms ``[times, n]`` are divided by their time."""
    import numpy as np
    from scipy.optimize import nnls

    scale = np.linalg.norm(terms, axis=0)
    prices: Array = nnls(terms / scale, np.ones(len(terms)))[0] / scale
    return prices


def _kv_share(timed: Sequence[TimedChunk], fixed: float, token: float) -> float:
    """Share of a layer's fixed and per-token time before its KV is ready; 0 where that was not timed."""
    shares = sorted(
        point.first_kv_s * point.layers / (fixed + token * point.chunk)
        for point in timed
        if point.first_kv_s is not None and fixed + token * point.chunk > 0
    )
    # The first layer's KV comes after the embedding as well, so its time can only be too long.
    return min(0.95, shares[len(shares) // 2]) if shares else 0.0
