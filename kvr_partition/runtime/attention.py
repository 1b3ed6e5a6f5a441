"""Own block and prefix attended separately, merged by log-sum-exp; registered with transformers."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from kvr_partition.runtime.kernels import attend, attend_parts, merge_

IMPLEMENTATION = "kv_runahead"
"""Name under which the attention is registered with transformers."""

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
    if window is None or query.shape[2] <= window:
        output, lse = attend(query, key, value, scale=scale, causal=True)
    else:
        output, lse = _attend_own_window(query, key, value, scale=scale, window=window)
    add_prefix_(output, lse, query, prefix(), scale=scale, window=window)
    return output


def add_prefix_(
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    scale: float,
    window: int | None,
) -> None:
    """Fold a prefix into what a chunk made of itself, in place.

    Args:
        output, lse: of causal attention of the chunk to itself, see `kernels.Kernel`.
        prefix: keys and values, those inside the window if there is one; None for none.
    """
    if prefix is None or prefix[0].shape[2] == 0:
        return
    # Within a window only the first rows still see the prefix; a row that sees none of it must not be
    # given to a kernel, whose log-sum-exp of nothing would be NaN.
    rows = query.shape[2]
    seeing = rows if window is None else min(rows, window - 1)
    bias = None if window is None else _band(seeing, prefix[0].shape[2], window, query)
    others = attend_parts(query[:, :, :seeing], *prefix, scale=scale, bias=bias)
    merge_(output[:, :, :seeing], lse[:, :, :seeing], *others)


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
            merge_(output[:, :, :seeing], lse[:, :, :seeing], (other, other_lse))
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
_active: contextvars.ContextVar[Hook | None] = contextvars.ContextVar("kv_runahead", default=None)


class active:  # noqa: N801 - reads as a statement: with active(hook): model(...)
    """While it lasts, attention calls of this thread's models go to ``hook`` instead of stock SDPA.

    The hook gets ``(module, query, key, value, scaling, sliding_window, **kwargs)`` and returns
    ``[batch, tokens, heads, value dim]``.
    """

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __enter__(self) -> None:
        self._token = _active.set(self._hook)

    def __exit__(self, *_: object) -> None:
        _active.reset(self._token)


class sdpa_calls(TorchFunctionMode):  # noqa: N801 - used like a function
    """While it lasts, calls of ``scaled_dot_product_attention`` itself go to ``hook``.

    For models that do not use transformers' attention interface. They are run with `no_mask` as their mask,
    which they hand on as it is. Without a hook attention stays what it is.
    """

    def __init__(self, hook: Hook | None) -> None:
        super().__init__()
        self._hook = hook

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            # A list as an index (Falcon has them) is copied to the device, for which the host waits.
            return func(args[0], _without_lists(args[1]))
        if func is not torch.nn.functional.scaled_dot_product_attention or self._hook is None:
            return func(*args, **(kwargs or {}))
        call = _SDPA.bind(*args, **(kwargs or {})).arguments
        return self._hook(
            None,
            call["query"],
            call["key"],
            call["value"],
            attention_mask=call.get("attn_mask"),
            scaling=call.get("scale"),
            dropout=call.get("dropout_p") or None,
        ).transpose(1, 2)


def _without_lists(index: Any) -> Any:
    """The same index with lists of one number as slices."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, list) and len(part) == 1 and type(part[0]) is int for part in parts):
        return index
    return tuple(
        slice(part[0], part[0] + 1 or None) if isinstance(part, list) and len(part) == 1 else part
        for part in parts
    )


def _sdpa_signature(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None: ...


_SDPA = inspect.signature(_sdpa_signature)


@functools.cache
def no_mask(device: torch.device) -> torch.Tensor:
    """A four-dimensional mask, which models take for a finished one; it masks nothing and is never read."""
    return torch.zeros((1, 1, 1, 1), device=device)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    hook = _active.get()
    if hook is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    return hook(module, query, key, value, attention_mask=attention_mask, **kwargs), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return sdpa_mask(*args, **kwargs) if _active.get() is None else None


class NotedWindows(set[int]):
    """Windows that masks were asked for.

    Attributes:
        asked: whether any mask was asked for.
    """

    asked = False


@contextmanager
def noted_windows(model: Any) -> Iterator[NotedWindows]:
    """While it lasts, note the windows of the masks that a model asks transformers for."""
    noted = NotedWindows()
    name = model.config._attn_implementation
    stock = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if stock is None:
        yield noted
        return

    def noting(*args: Any, local_size: int | None = None, **kwargs: Any) -> Any:
        noted.asked = True
        if local_size is not None:
            noted.add(local_size)
        return stock(*args, local_size=local_size, **kwargs)

    ALL_MASK_ATTENTION_FUNCTIONS.register(name, noting)
    try:
        yield noted
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, stock)


def register() -> None:
    """Make the attention known to transformers; doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
