"""The kinds of links there are: what messages, provenance and `doctor` say of each, and what they differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LinkKind:
    """A way for KV to get from one rank to another.

    Attributes:
        name: in provenance, logs and messages.
        title: in words, for people.
        needs: what a pair of ranks must have for it.
        topology: what serves a group best that has this kind between all its ranks.
        maps: whether a rank writes to another's memory itself.
    """

    name: str
    title: str
    needs: str
    topology: Literal["chain", "fanout"] = "chain"
    maps: bool = False

    def __str__(self) -> str:
        return self.name


PEER = LinkKind(
    "peer",
    "peer memory: copy engines write into the memory of the later rank's GPU",
    "two processes of one host whose GPUs reach each other's memory (or that share a GPU), and cuda-bindings, "
    "which the [gpu] extra installs",
    topology="fanout",
    maps=True,
)
NCCL = LinkKind("nccl", "NCCL, a communicator for each pair of ranks", "a GPU for each rank")
GLOO = LinkKind("gloo", "gloo, between the hosts' memories", "nothing but a network")
COPIES = LinkKind("copies on the device", "copies within one GPU", "ranks that share a process")

KINDS = (PEER, NCCL, GLOO, COPIES)
BETWEEN_GPUS = (PEER, NCCL)
"""What ranks with a GPU each can have, and ask for by name, the best first."""

_HELD = ", held to "


def described(kind: str, bandwidth: float | None) -> str:
    """What provenance says of links.

    Args:
        kind: of them, in words that name one of `KINDS`.
        bandwidth: bytes per second that they are held to; None for what they can.
    """
    return kind if bandwidth is None else f"{kind}{_HELD}{bandwidth / 1e9:g} GB/s"


def bandwidth_of(link: str) -> float | None:
    """Bytes per second that links were held to, from what provenance says of them."""
    _, held, rate = link.partition(_HELD)
    return float(rate.split()[0]) * 1e9 if held else None


def kind_of(link: str) -> LinkKind:
    """The slowest kind that a provenance's ``link`` names: it sets the pace of a prefill.

    Raises:
        KeyError: it names none.
    """
    found = [kind for kind in KINDS if kind.name in link]
    if not found:
        raise KeyError(link)
    return found[-1]
