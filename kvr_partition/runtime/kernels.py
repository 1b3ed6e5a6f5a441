"""Attention kernels that also return the log-sum-exp, which one does a call, and how results are merged."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Kernel(Protocol):
    """Attention that also returns the log-sum-exp of its scores.

    Shapes: query ``[batch, heads, rows, dim]``; key and value ``[batch, kv_heads, tokens, dim]``, any
    strides; bias None or ``[rows, tokens]`` added to the scores; ``causal`` needs rows == tokens.
    Returns the output ``[batch, heads, rows, value dim]`` and the log-sum-exp ``[batch, heads, rows]``
    in float32.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        causal: bool,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any device, dtype and shape; a few hundred query rows at a time, so the scores stay small."""
    batch, heads, rows, _ = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, rows, -1)
    keys, values = key.float().unsqueeze(2), value.float().unsqueeze(2)
    outputs, sums = [], []
    step = 256
    for low in range(0, rows, step):
        part = grouped[..., low : low + step, :].float()
        scores = part @ keys.transpose(-1, -2) * scale
        if bias is not None:
            scores = scores + bias[low : low + step].float()
        if causal:
            row = torch.arange(low, low + part.shape[-2], device=query.device)
            hidden = torch.arange(tokens, device=query.device)[None, :] > row[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        outputs.append((torch.exp(scores - lse[..., None]) @ values).to(query.dtype))
        sums.append(lse)
    output = torch.cat(outputs, dim=-2).reshape(batch, heads, rows, value.shape[-1])
    return output, torch.cat(sums, dim=-1).reshape(batch, heads, rows)


def _cpu_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's CPU flash kernel. It wants as many KV heads as query heads.

    Grouped heads become a batch of groups that share one KV head with stride 0, so KV is not repeated.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    if groups > 1:
        query = query.reshape(batch * kv_heads, groups, rows, dim)
        key = key.reshape(batch * kv_heads, 1, tokens, dim).expand(-1, groups, -1, -1)
        value = value.reshape(batch * kv_heads, 1, tokens, dim).expand(-1, groups, -1, -1)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        0.0,
        causal,
        attn_mask=None
        if bias is None
        else bias[None, None].expand(query.shape[0], groups, -1, -1)
        if groups > 1
        else bias[None, None],
        scale=scale,
    )
    return output.reshape(batch, heads, rows, dim), lse.reshape(batch, heads, rows)


def _cuda_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention as shipped with torch; takes grouped KV heads as they are."""
    assert bias is None
    if query.shape[2] == 1 and query.shape[1] != key.shape[1]:
        # A single row of grouped heads takes another path inside, whose result does not merge.
        twice = query.expand(-1, -1, 2, -1)
        output, lse = _cuda_flash(twice, key, value, scale=scale, causal=False, bias=None)
        return output[:, :, :1], lse[:, :, :1]
    if not causal and query.shape[0] == 1 and query.shape[2] <= FEW_ROWS and key.shape[2] >= 2 * SPLIT_TOKENS:
        return _few_rows(query, key, value, scale)
    return _flash_call(query, key, value, scale, causal)


def _flash_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return output, lse


FEW_ROWS, SPLIT_TOKENS = 256, 1024
"""So few rows keep only some of the SMs busy unless the tokens are split among the others."""


def _few_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few rows to many tokens: `SPLIT_TOKENS` at a time as if they were a batch, then merged."""
    count = key.shape[2] // SPLIT_TOKENS
    whole = count * SPLIT_TOKENS
    keys, values = (
        one[:, :, :whole].unflatten(2, (count, SPLIT_TOKENS)).squeeze(0).transpose(0, 1) for one in (key, value)
    )
    outputs, sums = _flash_call(query.expand(count, -1, -1, -1), keys, values, scale, False)
    lse = torch.logsumexp(sums, dim=0, keepdim=True)
    weights = torch.exp(sums - lse).unsqueeze(-1)
    output = (outputs * weights).sum(dim=0, keepdim=True).to(query.dtype)
    if whole < key.shape[2]:
        merge_(output, lse, _flash_call(query, key[:, :, whole:], value[:, :, whole:], scale, False))
    return output, lse


def _cuda_cudnn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's fused attention: about twice FlashAttention-2 on Hopper; takes grouped KV heads as they are.

    It builds a plan for every new shape (some 40 ms). See `CudnnPlans` for how a cold shape avoids that.
    """
    assert bias is None
    return _merged(_cudnn_parts(query, key, value, scale, causal))


def _cudnn_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same, unmerged."""
    query, key, value = (_plain_batch_stride(one) for one in (query, key, value))
    plans = CudnnPlans.here()
    pattern = _Pattern.of(query, key, value)
    rows, tokens = query.shape[2], key.shape[2]
    if plans.use(pattern, rows, tokens, causal):
        return [_cudnn_call(query, key, value, scale, causal)]
    return _attend_in_pieces(query, key, value, scale, causal, plans.ahead(pattern))


def _cudnn_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return output, lse.reshape(lse.shape[:3])  # newer versions give it a trailing axis of one


def _plain_batch_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The same view; with a batch of one, with the batch stride that follows from the shape.

    A plan is kept by shape and strides, and a slice of a longer tensor would otherwise count as another.
    """
    if tensor.shape[0] != 1:
        return tensor
    return tensor.as_strided(tensor.shape, (tensor.shape[2] * tensor.stride(2), *tensor.stride()[1:]))


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What of a call, besides its lengths, decides on a plan."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    dim: int
    strides: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> _Pattern:
        # Strides of batch and heads may depend on the length; then each length is a pattern of its own.
        return cls(
            query.device,
            query.dtype,
            query.shape[0],
            query.shape[1],
            key.shape[1],
            query.shape[3],
            tuple(one.stride()[1:] if one.shape[0] == 1 else one.stride() for one in (query, key, value)),
        )

    def tensor(self, which: int, tokens: int) -> torch.Tensor:
        """Random data of this pattern, for query (0), key (1) or value (2)."""
        heads = self.heads if which == 0 else self.kv_heads
        shape = (1, heads, tokens, self.dim)
        strides = (tokens * self.strides[which][1], *self.strides[which])
        data = torch.randn(_span(shape, strides), device=self.device, dtype=self.dtype)
        return data.as_strided(shape, strides)

    def merge_parts(self) -> None:
        """Merge any number of parts: each is a kernel to be compiled."""
        for others in range(1, MOST_MERGED):
            part = self.tensor(0, SHORTEST)
            lse = part.new_zeros(part.shape[:3], dtype=torch.float32)
            merge_(part, lse, *((part.clone(), lse) for _ in range(others)))


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a strided tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


SHORTEST, LEAST_PADDED = 256, 128
"""The fewest rows of a plan, and the fewest worth padding to it; fewer go to FlashAttention, which has none."""

SHORTEST_PIECE = 512
"""The fewest tokens of a plan for a rectangle; fewer go to FlashAttention."""


def row_lengths(most: int) -> list[int]:
    """Rows of the plans that are built ahead, up to the first that has ``most``; from 8192 on a 32nd apart."""
    lengths = [SHORTEST]
    while lengths[-1] < most:
        lengths.append(lengths[-1] + _step(lengths[-1]))
    return lengths


def rows_planned(rows: int) -> int:
    """The fewest of `row_lengths` that hold so many rows."""
    step = _step(max(rows, SHORTEST) - 1)
    return max(SHORTEST, -(-rows // step) * step)


def query_rows(rows: int) -> int:
    """How many rows to allocate for so many queries, so that none are copied to be padded."""
    return rows if rows < LEAST_PADDED else rows_planned(rows)


def _step(length: int) -> int:
    return max(SHORTEST, 1 << max(0, length.bit_length() - 6))


def piece_lengths(most: int) -> list[int]:
    """Tokens of the rectangles whose plans are built ahead, longest first.

    Powers of two and half as much again: three of them come within `SHORTEST_PIECE` of any length up to 16k, and
    every piece more costs its output being written and read once.
    """
    powers = [SHORTEST_PIECE << power for power in range(max(0, (most // SHORTEST_PIECE).bit_length()))]
    return sorted({*powers, *(3 * power for power in powers if 3 * power <= most)}, reverse=True)


def planned_shapes(most: int) -> list[tuple[int, int, bool]]:
    """Rows, tokens and whether causal, of all plans for up to ``most`` tokens of a chunk and its prefix."""
    lengths, pieces = row_lengths(most), piece_lengths(most)
    shapes = [(length, length, True) for length in lengths]
    # Some of the rows may be padding, so what is just too long has a plan too.
    for rows in lengths:
        shapes += [(rows, tokens, False) for tokens in pieces if rows + tokens < most + _step(rows)]
    return shapes


class CudnnPlans:
    """Which cuDNN plans this thread has, since cuDNN keeps them per thread and does not tell.

    After `build_ahead`, a call of an unknown shape is padded and put together from pieces whose plans are
    there, a few percent slower than a plan of its own, and builds nothing. For longer ones, and inside `planning`,
    the plan of the exact shape is built.
    """

    _threads = threading.local()

    def __init__(self) -> None:
        self._known: set[tuple[_Pattern, int, int, bool]] = set()
        self._ahead: dict[_Pattern, int] = {}
        self._seen: dict[_Pattern, None] = {}
        self.exact = False

    @classmethod
    def here(cls) -> CudnnPlans:
        """Those of this thread."""
        plans: CudnnPlans | None = getattr(cls._threads, "plans", None)
        if plans is None:
            plans = cls._threads.plans = cls()
        return plans

    def use(self, pattern: _Pattern, rows: int, tokens: int, causal: bool) -> bool:
        """Whether to do this call as it is; False when to do it in pieces."""
        self._seen[pattern] = None
        if (pattern, rows, tokens, causal) in self._known:
            return True
        # What is longer than all plans would take many pieces: for that a plan of its own pays.
        if not self.exact and rows + (0 if causal else tokens) <= self.ahead(pattern):
            return False
        self._known.add((pattern, rows, tokens, causal))
        return True

    def ahead(self, pattern: _Pattern) -> int:
        """Up to how many tokens `build_ahead` has built plans of this pattern."""
        return self._ahead.get(pattern, 0)

    def build_ahead(self, most: int) -> int:
        """Build the plans of `planned_shapes` for every pattern this thread has seen.

        Args:
            most: tokens of a chunk and its prefix together.

        Returns:
            How many were built.
        """
        built = 0
        for pattern in list(self._seen):
            if pattern.batch != 1 or self.ahead(pattern) >= most:
                continue
            pattern.merge_parts()
            for rows, tokens, causal in planned_shapes(most):
                if (pattern, rows, tokens, causal) not in self._known:
                    query, key, value = (pattern.tensor(at, n) for at, n in enumerate((rows, tokens, tokens)))
                    _cudnn_call(query, key, value, 1.0, causal)
                    self._known.add((pattern, rows, tokens, causal))
                    built += 1
            self._ahead[pattern] = most
        return built


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """While it lasts, kernels of this thread build the plan of every exact shape they meet."""
    plans = CudnnPlans.here()
    before, plans.exact = plans.exact, True
    try:
        yield
    finally:
        plans.exact = before


_without_plans = threading.Lock()
_decoding = 0
_cudnn_was = False


@contextlib.contextmanager
def kernels_without_plans() -> Iterator[None]:
    """While it lasts, torch's own SDPA leaves cuDNN alone.

    On Hopper it takes cuDNN first, which builds a plan for each length, and while decoding every token has another
    one. The switch is the process's: of several that decode at once, the last one out turns it back.
    """
    global _decoding, _cudnn_was
    with _without_plans:
        if _decoding == 0:
            _cudnn_was = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _decoding += 1
    try:
        yield
    finally:
        with _without_plans:
            _decoding -= 1
            if _decoding == 0:
                torch.backends.cuda.enable_cudnn_sdp(_cudnn_was)


def split_length(length: int, most: int) -> tuple[list[tuple[int, int]], int]:
    """Runs ``(start, end)`` of `piece_lengths` up to ``most`` that fill a length, and where they end."""
    runs, at = [], 0
    for size in piece_lengths(most):
        while length - at >= size:
            runs.append((at, at + size))
            at += size
    return runs, at


def _attend_in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool, most: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention from plans that exist; what is too short for any of them goes to FlashAttention.

    Rows are padded to a length that has a plan: leaving some over would read all tokens once more for them, and
    put the parts of the output together.

    Returns:
        Attention to some tokens after the other, to be merged.
    """
    if causal:
        return [_own(query, key, value, scale)]
    return _rectangle(query, key, value, scale, most)


def _own(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention; no row sees the padding behind it."""
    rows = query.shape[2]
    if rows < LEAST_PADDED:
        return _cuda_flash(query, key, value, scale=scale, causal=True, bias=None)
    planned = rows_planned(rows)
    key, value = (_padded(one, planned) for one in (key, value))
    output, lse = _cudnn_call(_padded_query(query, planned), key, value, scale, True)
    return output[:, :, :rows], lse[:, :, :rows]


def _rectangle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, most: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention of all rows to all tokens, some tokens after the other."""
    rows, tokens = query.shape[2], key.shape[2]
    if rows < LEAST_PADDED:
        return [_cuda_flash(query, key, value, scale=scale, causal=False, bias=None)]
    planned = rows_planned(rows)
    padded = _padded_query(query, planned)
    runs, end = split_length(tokens, most + _step(planned) - 1 - planned)
    parts = []
    for low, high in runs:
        some, their = (_plain_batch_stride(one[:, :, low:high]) for one in (key, value))
        parts.append(_cudnn_call(padded, some, their, scale, False))
    if end < tokens:
        rest = key[:, :, end:], value[:, :, end:]
        parts.append(_cuda_flash(query, *rest, scale=scale, causal=False, bias=None))
    return [(output[:, :, :rows], lse[:, :, :rows]) for output, lse in parts]


def _padded_query(query: torch.Tensor, rows: int) -> torch.Tensor:
    """Queries and as many rows more as are missing, whatever is in them: what comes of those is left out.

    Where there is memory behind them nothing is copied; see `query_rows`.
    """
    shape, strides = _shape_of(query, rows)
    # Of several prompts, rows of the next one lie behind those of one.
    behind = (query.untyped_storage().nbytes() // query.itemsize - query.storage_offset()) * (query.shape[0] == 1)
    return query.as_strided(shape, strides) if _span(shape, strides) <= behind else _padded(query, rows)


def _shape_of(given: torch.Tensor, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of so many rows, as plans are made for."""
    batch, heads, _, dim = given.shape
    return (batch, heads, rows, dim), (rows * given.stride(2), *given.stride()[1:])


def _padded(given: torch.Tensor, rows: int) -> torch.Tensor:
    """The same rows and as many zeros as are missing, with the strides that plans are made for."""
    tokens = given.shape[2]
    if tokens == rows:
        return _plain_batch_stride(given)
    shape, strides = _shape_of(given, rows)
    whole = given.new_empty(_span(shape, strides)).as_strided(shape, strides)
    whole[:, :, :tokens] = given
    whole[:, :, tokens:] = 0
    return whole


@functools.cache
def _cudnn_fits(device_index: int) -> bool:
    """Whether a GPU and the cuDNN that is there have the fused attention (Ampere or newer)."""
    return (
        torch.backends.cudnn.is_available()
        and torch.backends.cudnn.version() >= 90000
        and torch.cuda.get_device_capability(device_index) >= (8, 0)
        and hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention")
    )


def _cudnn_takes(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.shape[-1] % 8 == 0 and key.shape[2] >= 64 and _cudnn_fits(query.get_device())


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """One line of the kernel table: a kernel and what it can take."""

    name: str
    kernel: Kernel
    device: str | None
    dtypes: tuple[torch.dtype, ...]
    max_dim: int
    takes_bias: bool
    least_rows: int = 1

    def fits(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether this kernel can do the call."""
        return (
            self.device in (None, query.device.type)
            and (not self.dtypes or query.dtype in self.dtypes)
            and (self.device is None or query.shape[-1] == value.shape[-1] <= self.max_dim)
            and (self.takes_bias or bias is None)
            and query.shape[2] >= self.least_rows
            and (self.kernel is not _cuda_cudnn or _cudnn_takes(query, key))
        )


KERNELS: list[KernelChoice] = [
    KernelChoice("cuda-cudnn", _cuda_cudnn, "cuda", (torch.float16, torch.bfloat16), 128, False, least_rows=64),
    KernelChoice("cuda-flash", _cuda_flash, "cuda", (torch.float16, torch.bfloat16), 256, False),
    KernelChoice("cpu-flash", _cpu_flash, "cpu", (torch.float32, torch.float16, torch.bfloat16), 1024, True),
    KernelChoice("plain", _plain, None, (), 0, True),
]
"""Kernels in order of preference: the first line that fits is used. Add a line to add a kernel."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log-sum-exp of its scores by the first kernel of `KERNELS` that fits; see `Kernel`."""
    return _merged(attend_parts(query, key, value, scale=scale, causal=causal, bias=bias))


def attend_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same as a kernel makes it, which may be in parts, so that all are merged at once with something else."""
    choice = next(choice for choice in KERNELS if choice.fits(query, key, value, bias))
    if choice.kernel is _cuda_cudnn:
        return _cudnn_parts(query, key, value, scale, causal)
    return [choice.kernel(query, key, value, scale=scale, causal=causal, bias=bias)]


def _merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All parts in the first one."""
    first, *others = parts
    if others:
        merge_(*first, *others)
    return first


MOST_MERGED = 8
"""Results that the fused kernel takes together; each number of them is to be compiled once."""


def merge_(output: torch.Tensor, lse: torch.Tensor, *others: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fold attention over other keys into ``output`` and ``lse``, in place, as if all had been one softmax.

    With ``w = sigmoid(other_lse − lse)`` the joint result of two is ``(1 − w)·output + w·other``: exact, and
    without the overflow of exponentials. One fused kernel for all on CUDA, where Triton is there.

    Args:
        output: ``[batch, heads, rows, dim]``.
        lse: ``[batch, heads, rows]``, float32.
        others: further outputs with their log-sum-exps, of the same shapes.
    """
    fused = _fused_merge() if output.is_cuda else None
    if fused is not None:
        for first in range(0, len(others), MOST_MERGED - 1):
            fused(output, lse, others[first : first + MOST_MERGED - 1])
        return
    for other, other_lse in others:
        weight = torch.sigmoid(other_lse - lse).unsqueeze(-1).to(output.dtype)
        output.lerp_(other, weight)
        torch.logaddexp(lse, other_lse, out=lse)


@functools.cache
def _fused_merge() -> Any:
    try:
        from kvr_partition.runtime.triton_kernels import merge
    except ImportError:
        return None
    return merge
