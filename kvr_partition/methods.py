"""The methods there are. What any other part says or decides about one is written here.

Two parts have something of each method: `profiler.runners` runs it on a rank, and `kvr_partition.machine.methods`
schedules it. Both refuse to be imported when they lack one that is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kvr_partition.errors import UnsupportedError

GatheringMethod = Literal["tsp", "tsp-causal", "zigzag"]
"""TSP as published, TSP with causal kernels, and zigzag context parallelism: all gather the KV of all ranks."""

SplitMethod = Literal["kvr", "kvr-chain", "kvr-fanout"]
"""KV-Runahead, by the topology of its group or by a certain one."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to prefill a prompt.

    Attributes:
        name: in commands, logs and messages.
        title: in tables.
        summary: in one line, for people.
        chunks: which partitions it runs: ``"any"``, ``"even"`` ones, or the ``"whole"`` prompt on one rank.
        gathers: whether every rank gathers the KV of all ranks in every layer.
        topology: how KV travels, where that is the method's and not the group's.
        our_attention: whether it runs the attention of this runtime, where a model has a way into its own.
        dense: whether it attends to everything it is given under a mask; None: at cache depth.
        limited: whether its KV goes over links that can be held to a bandwidth and disturbed.
        takes_past: whether it goes on with KV of tokens before the prompt.
        in_order: whether the rows of KV that it leaves are in the order of tokens, so that each can be compared.
        verifiable: whether what it reads can be compared with one rank; not what others are compared with.
        baseline: whether KV-Runahead is compared with it as another way to use all ranks.
        unscheduled: why no schedule says what it takes; empty where one does.
    """

    name: str
    title: str
    summary: str
    chunks: Literal["any", "even", "whole"]
    gathers: bool = False
    topology: Literal["chain", "fanout"] | None = None
    our_attention: bool = True
    dense: bool | None = None
    limited: bool = True
    takes_past: bool = True
    in_order: bool = True
    verifiable: bool = True
    baseline: bool = False
    unscheduled: str = ""

    @property
    def splits(self) -> bool:
        """Whether it is KV-Runahead: chunks of any size, KV from rank to rank."""
        return self.name in get_args(SplitMethod)

    @property
    def alone(self) -> bool:
        """Whether one rank reads the whole prompt."""
        return self.chunks == "whole"

    def attends_densely(self, depth: str) -> bool:
        """Whether a chunk computes every pair with what it is given, own block included, at a depth."""
        return depth == "cache" if self.dense is None else self.dense


_ALL = (
    Method(
        "stock",
        "stock",
        "the whole prompt on one rank, as transformers reads it",
        chunks="whole",
        our_attention=False,
        dense=False,
        limited=False,
        in_order=False,
        verifiable=False,
        unscheduled="a profile does not say what transformers takes without this runtime",
    ),
    Method(
        "single",
        "single",
        "the whole prompt on one rank, with the layers and attention that KV-Runahead runs",
        chunks="whole",
        dense=False,
        limited=False,
    ),
    Method(
        "tsp",
        "TSP",
        "even chunks, all-gather of KV in every layer, dense masked attention",
        chunks="even",
        gathers=True,
        our_attention=False,
        dense=True,
        takes_past=False,
        in_order=False,
        baseline=True,
    ),
    Method(
        "tsp-causal",
        "TSP causal",
        "the same with causal kernels",
        chunks="even",
        gathers=True,
        dense=False,
        takes_past=False,
        in_order=False,
        baseline=True,
    ),
    Method(
        "zigzag",
        "zigzag",
        "even chunks dealt from both ends, all-gather of KV, causal kernels",
        chunks="even",
        gathers=True,
        dense=False,
        takes_past=False,
        in_order=False,
        baseline=True,
    ),
    Method(
        "tp",
        "tensor parallel",
        "tensor parallelism as transformers ships it",
        chunks="even",
        our_attention=False,
        dense=False,
        limited=False,
        takes_past=False,
        in_order=False,
        baseline=True,
        unscheduled="there is no schedule of tensor parallelism to simulate",
    ),
    Method("kvr", "KVR", "KV-Runahead over the group's topology", chunks="any"),
    Method(
        "kvr-chain",
        "KVR chain",
        "KV-Runahead, each rank handing everything on to the next",
        chunks="any",
        topology="chain",
    ),
    Method(
        "kvr-fanout",
        "KVR fan-out",
        "KV-Runahead, each rank sending its own chunk to all later ones",
        chunks="any",
        topology="fanout",
    ),
    Method(
        "bound",
        "TTFT(p)",
        "TTFT(p): KV-Runahead with every wait and transfer removed",
        chunks="any",
        limited=False,
        verifiable=False,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""All of them, by name."""

GATHERING: tuple[GatheringMethod, ...] = get_args(GatheringMethod)
BASELINES = tuple(method.name for method in _ALL if method.baseline)
"""Names of what KV-Runahead is compared with on the same ranks."""


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
        UnsupportedError: there is none.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UnsupportedError(f"unknown method {name!r}; there are {', '.join(METHODS)}") from None


def check_complete(what: str, names: object) -> None:
    """Refuse a part that lacks a method, or has one that is not here: nobody would notice before it is used.

    Args:
        what: the part, for the message.
        names: those it has.

    Raises:
        ImportError: they are not the names of `METHODS`.
    """
    differing = set(METHODS) ^ set(names)  # type: ignore[call-overload]
    if differing:
        raise ImportError(f"{what} and kvr_partition.methods differ in {', '.join(sorted(differing))}")
