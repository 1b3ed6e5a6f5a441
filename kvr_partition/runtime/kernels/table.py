"""The kernels there are, and which one does a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kvr_partition.runtime.kernels.cudnn import cuda_cudnn, cudnn_parts, cudnn_takes
from kvr_partition.runtime.kernels.flash import cpu_flash, cuda_flash
from kvr_partition.runtime.kernels.merging import merged
from kvr_partition.runtime.kernels.plain import plain


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
            and (self.kernel is not cuda_cudnn or cudnn_takes(query, key))
        )


KERNELS: list[KernelChoice] = [
    KernelChoice("cuda-cudnn", cuda_cudnn, "cuda", (torch.float16, torch.bfloat16), 128, False, least_rows=64),
    KernelChoice("cuda-flash", cuda_flash, "cuda", (torch.float16, torch.bfloat16), 256, False),
    KernelChoice("cpu-flash", cpu_flash, "cpu", (torch.float32, torch.float16, torch.bfloat16), 1024, True),
    KernelChoice("plain", plain, None, (), 0, True),
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
    return merged(attend_parts(query, key, value, scale=scale, causal=causal, bias=bias))


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
    if choice.kernel is cuda_cudnn:
        return cudnn_parts(query, key, value, scale, causal)
    return [choice.kernel(query, key, value, scale=scale, causal=causal, bias=bias)]
