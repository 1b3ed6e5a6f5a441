"""What a rank states before a prefill, and what ranks say that state different things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvr_partition.errors import RankError, named_ranks


class Statement(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What one rank is about to run. Digests are those of `digests`."""

    number: int
    refusal: str = ""
    """Why this rank runs nothing; the rest is then empty."""
    method: str = ""
    model: int = 0
    layers: int = 0
    dtype: str = ""
    device: str = ""
    weights: int = 0
    batch: int = 0
    past: int = 0
    past_held: tuple[float, ...] = ()
    """What the past holds, see `digests.past_fingerprint`; compared as far as rounding lets it."""
    context: int = 0
    prompt: int = 0
    sizes: tuple[int, ...] = ()
    topology: str = ""
    limits: str = ""


# In the order in which they are compared: what comes first explains what follows.
_ITEMS = {
    "number": "which prefill it is",
    "method": "the method",
    "model": "the model's configuration",
    "layers": "the layers that keep KV",
    "dtype": "the dtype",
    "device": "the kind of device",
    "weights": "the weights",
    "batch": "the batch",
    "past": "the past tokens",
    "past_held": "what the past holds",
    "context": "the length of the prompt",
    "prompt": "the prompt",
    "sizes": "the partition",
    "topology": "the topology",
    "limits": "the limits of links",
}
_DIGESTS = frozenset({"model", "layers", "weights", "prompt", "past_held"})


def refused(every: Sequence[Statement]) -> RankError:
    """The error of a prefill that some ranks refuse and others do not."""
    refusing = [rank for rank, each in enumerate(every) if each.refusal]
    return RankError(
        f"{named_ranks(refusing)} refused prefill {every[0].number}, and other ranks did not: "
        f"{every[refusing[0]].refusal}",
        rank=refusing[0] if len(refusing) == 1 else None,
        kind="disagreement",
        phase=f"agreement of prefill {every[0].number}",
    )


def disagreement(every: Sequence[Statement]) -> RankError:
    """The error of ranks that state different things: it names the first item that explains the others."""
    if any(statement.refusal for statement in every):
        return refused(every)
    item = next(item for item in _ITEMS if len({getattr(statement, item) for statement in every}) > 1)
    holders: dict[Any, list[int]] = {}
    for rank, each in enumerate(every):
        holders.setdefault(getattr(each, item), []).append(rank)
    parts = sorted(holders.items(), key=lambda pair: (-len(pair[1]), pair[1]))
    # A majority is taken to be right; of two ranks nobody can tell.
    most = len(parts[0][1])
    minority = [rank for _, ranks in parts[1:] for rank in ranks]
    culprit = minority[0] if len(minority) == 1 and most > 1 else None
    said = ", ".join(
        f"{named_ranks(ranks)} {'have' if len(ranks) > 1 else 'has'} {_shown(value)}" for value, ranks in parts
    )
    if item in _DIGESTS:
        said = f"{named_ranks(sorted(minority))} {'differ' if len(minority) > 1 else 'differs'} from "
        said += named_ranks(parts[0][1])
    return RankError(
        f"ranks disagree about {_ITEMS[item]} of prefill {every[0].number}: {said}; give every rank the same",
        rank=culprit,
        kind="disagreement",
        phase=f"agreement of prefill {every[0].number}",
    )


def _shown(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
