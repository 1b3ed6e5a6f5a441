"""Models whose parts are told apart, and their logits."""

from __future__ import annotations

from typing import Any

import torch

from kvr_partition import Partition
from kvr_partition.runtime import prefill
from tests.models import build

CONTEXT = 47


ALL_PARTS = "fused(norm, rotary, activation, residual)"


def prompt(batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 257, (batch, CONTEXT), generator=torch.Generator().manual_seed(2))


def trained(name: str, **changes: Any) -> Any:
    """A model whose norms and biases are no ones and zeros."""
    model = build(name, **changes)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def read(model: Any, **options: Any) -> torch.Tensor:
    logits = prefill(model, prompt(), Partition((CONTEXT,)), **options).logits
    assert logits is not None
    return logits
