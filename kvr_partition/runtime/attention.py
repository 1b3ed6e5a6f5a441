"""Own block and prefix attended separately, merged by log-sum-exp; and which kernel does it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import AttentionInterface

IMPLEMENTATION = "kv_runahead"
"""Name under which the attention is registered with transformers."""

# ------------------------------------------------------------------------------------------- kernels


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
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return output, lse


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """One line of the kernel table: a kernel and what it can take."""

    name: str
    kernel: Kernel
    device: str | None
    dtypes: tuple[torch.dtype, ...]
    max_dim: int
    takes_bias: bool

    def fits(self, query: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether this kernel can do the call."""
        return (
            self.device in (None, query.device.type)
            and (not self.dtypes or query.dtype in self.dtypes)
            and (self.device is None or query.shape[-1] == value.shape[-1] <= self.max_dim)
            and (self.takes_bias or bias is None)
        )


KERNELS: list[KernelChoice] = [
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
    choice = next(choice for choice in KERNELS if choice.fits(query, value, bias))
    return choice.kernel(query, key, value, scale=scale, causal=causal, bias=bias)


def merge_(output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Fold attention over other keys into ``output``, in place, as if both had been one softmax.

    With ``w = sigmoid(other_lse − lse)`` the joint result is ``(1 − w)·output + w·other``: exact, and
    without the overflow of exponentials. ``lse`` is not updated; merge once.
    """
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1).to(output.dtype)
    output.lerp_(other, weight)


# ----------------------------------------------------------------------------- a chunk and its prefix


def attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: Callable[[], tuple[torch.Tensor, torch.Tensor] | None],
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of a chunk to itself and to the prefix before it.

    Args:
        query, key, value: the chunk's own, ``[batch, heads, tokens, dim]``.
        prefix: waits until the prefix has arrived and returns its keys and values (those inside the
            window, if there is one), or None when there is no prefix. Called once, after everything
            that can be computed without it.
        window: tokens a query sees, itself included; None for all.

    Returns:
        ``[batch, heads, tokens, value dim]``.
    """
    rows = query.shape[2]
    if window is None or rows <= window:
        output, lse = attend(query, key, value, scale=scale, causal=True)
    else:
        output, lse = _attend_own_window(query, key, value, scale=scale, window=window)
    before = prefix()
    if before is None or before[0].shape[2] == 0:
        return output
    # Within a window only the first rows still see the prefix; a row that sees none of it must not be
    # given to a kernel, whose log-sum-exp of nothing would be NaN.
    seeing = rows if window is None else min(rows, window - 1)
    bias = None if window is None else _band(seeing, before[0].shape[2], window, query)
    other, other_lse = attend(query[:, :, :seeing], *before, scale=scale, bias=bias)
    merge_(output[:, :, :seeing], lse[:, :, :seeing], other, other_lse)
    return output


def _attend_own_window(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windowed causal attention of a chunk to itself alone, window-sized blocks of rows at a time.

    A block no longer than the window needs no mask against itself, and sees at most ``window − 1`` tokens
    before it, so the work is linear in the chunk.
    """
    outputs, sums = [], []
    for low in range(0, query.shape[2], window):
        high = min(low + window, query.shape[2])
        block = query[:, :, low:high]
        output, lse = attend(block, key[:, :, low:high], value[:, :, low:high], scale=scale, causal=True)
        seeing = min(high - low, window - 1)
        if low > 0 and seeing > 0:
            first = low - (window - 1)
            bias = _band(seeing, window - 1, window, query)
            other, other_lse = attend(
                block[:, :, :seeing], key[:, :, first:low], value[:, :, first:low], scale=scale, bias=bias
            )
            merge_(output[:, :, :seeing], lse[:, :, :seeing], other, other_lse)
        outputs.append(output)
        sums.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _band(rows: int, tokens: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask of ``rows`` queries against the ``tokens`` right before them, inside the window."""
    row = torch.arange(rows, device=like.device)[:, None]
    token = torch.arange(tokens, device=like.device)[None, :]
    mask = torch.zeros((rows, tokens), dtype=like.dtype, device=like.device)
    return mask.masked_fill_(token < row - (window - 1 - tokens), -torch.inf)


# ------------------------------------------------------------------------- the hook into transformers

Hook = Callable[..., torch.Tensor]
_active = threading.local()


class active:  # noqa: N801 - reads as a statement: with active(hook): model(...)
    """While it lasts, attention calls of this thread's models go to ``hook`` instead of stock SDPA.

    The hook gets ``(module, query, key, value, scaling, sliding_window, **kwargs)`` and returns
    ``[batch, tokens, heads, value dim]``.
    """

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __enter__(self) -> None:
        self._before = getattr(_active, "hook", None)
        _active.hook = self._hook

    def __exit__(self, *_: object) -> None:
        _active.hook = self._before


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    hook = getattr(_active, "hook", None)
    if hook is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    return hook(module, query, key, value, attention_mask=attention_mask, **kwargs), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return sdpa_mask(*args, **kwargs) if getattr(_active, "hook", None) is None else None


def register() -> None:
    """Make the attention known to transformers; doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
