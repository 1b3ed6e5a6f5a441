"""What a prefill returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvr_partition.timeline import RankTimeline


@dataclass(frozen=True)
class PrefillResult:
    """What a rank has after a prefill.

    Attributes:
        rank, ranks: which rank this is, of how many.
        first_token: greedy first token of each prompt under ``model.generation_config``, ``[batch, 1]`` int64 on
            the host; None except on the last rank.
        logits: logits of the prompt's last position, ``[batch, vocabulary]``; None except on the last rank.
        cache: this rank's KV; on the last rank that of the whole prompt, for `decode`.
        kv_bytes: bytes of KV this rank put on the wire.
        context, past: tokens of the prompt, and of the cache before it.
        attention_mask: of prompts that were padded, ``[batch, past + context]``; else None.
    """

    rank: int
    ranks: int
    first_token: torch.Tensor | None
    logits: torch.Tensor | None
    cache: Any
    kv_bytes: int
    _timeline: Callable[[], RankTimeline]
    context: int = 0
    past: int = 0
    attention_mask: torch.Tensor | None = None

    @property
    def is_last(self) -> bool:
        """Whether this is the rank that decodes on."""
        return self.rank == self.ranks - 1

    @property
    def timeline(self) -> RankTimeline:
        """Where this rank's time went, layer by layer."""
        return self._timeline()
