"""Prompts that are padded on the left: masks and positions of each row, and whether a model keeps to them."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from kvr_partition.errors import PartitionError, UnsupportedError
from kvr_partition.runtime.positions import text_config
from kvr_partition.runtime.support import Depth, forward


@dataclass(frozen=True)
class Padding:
    """Which tokens of a batch are padding.

    Attributes:
        mask: ``[batch, past + context]``, 0 for padding, 1 for tokens.
        positions: of each token in its own prompt, ``[batch, past + context]``; None for models that take none.
    """

    mask: torch.Tensor
    positions: torch.Tensor | None

    def of_chunk(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """What a model is given for the tokens from ``start`` to ``end``, past included."""
        given = {"attention_mask": self.mask[:, :end]}
        if self.positions is not None:
            given["position_ids"] = self.positions[:, start:end]
        return given


def read_padding(
    model: Any, attention_mask: torch.Tensor | None, batch: int, past: int, context: int, depth: Depth
) -> Padding | None:
    """The padding that a mask tells of; None where there is none.

    Args:
        attention_mask: ``[batch, context]`` or ``[batch, past + context]``.

    Raises:
        PartitionError: a mask of another shape, or with padding elsewhere than on the left.
        UnsupportedError: a model that is not exact in pieces with padding, or attention depth.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise PartitionError("attention_mask must be a tensor [batch, context] of 0 for padding and 1 for tokens")
    if attention_mask.shape[0] != batch or attention_mask.shape[1] not in (context, past + context):
        raise PartitionError(
            f"attention_mask must be [{batch}, {context}]"
            + (f" or [{batch}, {past + context}]" if past else "")
            + f"; got {list(attention_mask.shape)}"
        )
    mask = (attention_mask != 0).long()
    if mask.shape[1] == context and past:
        mask = torch.cat([mask.new_ones((batch, past)), mask], dim=1)
    if bool(mask.all()):
        return None
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        raise PartitionError(
            "attention_mask has padding behind tokens, or a prompt of nothing else; pad prompts on the left only"
        )
    if depth == "attention":
        raise UnsupportedError("attention depth knows no padding; use depth='auto' or 'cache'")
    _check_exact(model)
    return Padding(mask, _positions(model, mask))


def _positions(model: Any, mask: torch.Tensor) -> torch.Tensor | None:
    """As ``generate`` counts them: padding counts for nothing."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    return (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)


@torch.no_grad()
def _check_exact(model: Any) -> None:
    """Run a few padded tokens whole and in pieces; the answer is remembered for as long as the model lives.

    Raises:
        UnsupportedError: the two differ, or the model does not run so.
    """
    reason = _checked.get(model)
    if reason is None:
        reason = _checked[model] = _why_not_exact(model)
    if reason:
        raise UnsupportedError(
            f"{type(model).__name__} {reason}; read prompts of one length, without attention_mask"
        )


_checked: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _why_not_exact(model: Any) -> str:
    device = next(model.parameters()).device
    tokens, padded = 24, 5
    # The same tokens everywhere but in the padding: what padding holds must not matter.
    ids = torch.arange(tokens, device=device)[None].repeat(3, 1) % min(97, text_config(model).vocab_size)
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    mask[2, : tokens // 2 + 1] = 0
    padding = Padding(mask, _positions(model, mask))
    try:
        whole = forward(model, ids, DynamicCache(config=model.config), **padding.of_chunk(0, tokens)).logits[:, -1]
        cache = DynamicCache(config=model.config)
        pieces = whole
        for start, end in ((0, 7), (7, 15), (15, tokens)):
            pieces = forward(model, ids[:, start:end], cache, **padding.of_chunk(start, end)).logits[:, -1]
    except Exception as error:  # whatever it is, this model cannot be given such prompts
        return f"does not run padded prompts in pieces ({type(error).__name__})"
    distance = torch.linalg.vector_norm((pieces - whole).double()) / torch.linalg.vector_norm(whole.double())
    if not float(distance) <= 30 * torch.finfo(model.dtype).eps:
        return "reads padded prompts otherwise in pieces than whole"
    return ""
