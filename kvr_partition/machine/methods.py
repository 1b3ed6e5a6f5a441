"""When each method is done on a machine: its schedule, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from kvr_partition.errors import UnsupportedError
from kvr_partition.machine.bounds import bounds, gathering_ttft
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.measurement import RankTimes
from kvr_partition.methods import METHODS, check_complete, method_of
from kvr_partition.partition import Partition

_IDLE = RankTimes(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scheduled:
    """What a schedule says of a prefill.

    Attributes:
        ttft_s: seconds to the first token.
        times: of each rank.
        sent_bytes: KV that each rank puts on links.
    """

    ttft_s: float
    times: tuple[RankTimes, ...]
    sent_bytes: tuple[int, ...]


def scheduled(method: str, partition: Partition, ranks: int, machine: Machine) -> Scheduled:
    """A prefill by a method.

    Args:
        ranks: of the group; a method of one rank runs on the last.
        machine: its past is the partition's.

    Raises:
        UnsupportedError: there is no such method, or nothing says what it takes.
    """
    how = _SCHEDULES[method_of(method).name]
    if how is None:
        raise UnsupportedError(METHODS[method].unscheduled)
    return how(method, partition, ranks, machine)


def _alone(_: str, partition: Partition, ranks: int, machine: Machine) -> Scheduled:
    ttft = bounds(partition.context, 1, machine).single_s
    return Scheduled(ttft, (*(_IDLE,) * (ranks - 1), RankTimes(ttft, 0.0, 0.0)), (0,) * ranks)


def _without_waits(_: str, partition: Partition, ranks: int, machine: Machine) -> Scheduled:
    found = bounds(partition.context, ranks, machine, partition).practical_s
    assert found is not None
    return Scheduled(found, (_IDLE,) * ranks, (0,) * ranks)


def _gathering(method: str, partition: Partition, ranks: int, machine: Machine) -> Scheduled:
    ttft = gathering_ttft(method, partition.context, ranks, machine)  # type: ignore[arg-type]
    row = machine.entry_bytes * machine.layers * (ranks - 1)
    return Scheduled(ttft, (_IDLE,) * ranks, tuple(size * row for size in partition.sizes))


def _split(method: str, partition: Partition, ranks: int, machine: Machine) -> Scheduled:
    machine = replace(machine, topology=METHODS[method].topology or machine.topology)
    timeline = simulate(partition, machine)
    row = machine.entry_bytes * machine.layers
    sizes = partition.sizes
    if machine.topology == "chain":
        sent = [sum(sizes[: rank + 1]) * row for rank in range(ranks - 1)]
    else:
        sent = [sizes[rank] * row * (ranks - 1 - rank) for rank in range(ranks - 1)]
    return Scheduled(timeline.ttft_s, tuple(RankTimes.of(rank) for rank in timeline.ranks), (*sent, 0))


_SCHEDULES: dict[str, Callable[[str, Partition, int, Machine], Scheduled] | None] = {
    "stock": None,
    "single": _alone,
    "tsp": _gathering,
    "tsp-causal": _gathering,
    "zigzag": _gathering,
    "tp": None,
    "kvr": _split,
    "kvr-chain": _split,
    "kvr-fanout": _split,
    "bound": _without_waits,
}
check_complete(__name__, _SCHEDULES)
