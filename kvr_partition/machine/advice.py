"""Which method on how many ranks a context is worth, from a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from kvr_partition.errors import PartitionError
from kvr_partition.machine.bounds import bounds, gathering_ttft
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.methods import GATHERING, METHODS
from kvr_partition.partition import Partition

WORTH_A_RANK = 0.03
"""Share of TTFT that a larger number of ranks has to save to be worth them."""


@dataclass(frozen=True)
class Option:
    """One way to run a prefill: predicted TTFT in seconds; ``partition`` for KV-Runahead."""

    method: str
    ranks: int
    ttft_s: float
    partition: Partition | None = None


@dataclass(frozen=True)
class Advice:
    """What to run a context with.

    Attributes:
        context: tokens of the prompt.
        options: every method on every number of ranks, by ranks.
        chosen: the fastest, or one on fewer ranks that is nearly as fast.
        reason: why, in one line.
    """

    context: int
    options: tuple[Option, ...]
    chosen: Option
    reason: str


def first_ranks(machine: Machine, ranks: int) -> Machine:
    """The same machine with only its first ranks."""
    link = machine.link
    return replace(
        machine,
        speeds=machine.speeds[:ranks],
        link=link[: ranks - 1] if isinstance(link, tuple) else link,
        # What sharing costs was timed with all of them at work.
        solo_speedup=machine.solo_speedup if ranks == len(machine.speeds) else 1.0,
    )


def advise(machine: Machine, context: int, ranks: int, quantum: int = 1) -> Advice:
    """Compare every method on 1 to ``ranks`` ranks.

    Raises:
        PartitionError: a context too short for a single rank.
    """
    if context < 1:
        raise PartitionError(f"a context has at least 1 token; got {context}")
    fastest = min(machine.slowness(rank) for rank in range(ranks))
    options = [Option("single", 1, bounds(context, 1, machine).single_s * fastest)]
    for count in range(2, ranks + 1):
        if context < count * quantum:
            break
        few = first_ranks(machine, count)
        options += [Option(name, count, gathering_ttft(name, context, count, few)) for name in GATHERING]
        for method in METHODS.values():
            if method.topology is not None:
                over = replace(few, topology=method.topology)
                split = best_split(context, count, over, quantum=quantum)
                options.append(Option(method.name, count, simulate(split, over).ttft_s, split))
    return Advice(context, tuple(options), *_choose(options))


def _choose(options: Sequence[Option]) -> tuple[Option, str]:
    fastest = min(options, key=lambda one: one.ttft_s)
    enough = [option for option in options if option.ttft_s <= fastest.ttft_s * (1 + WORTH_A_RANK)]
    fewest = min(option.ranks for option in enough)
    chosen = min((option for option in enough if option.ranks == fewest), key=lambda one: one.ttft_s)
    most = max(option.ranks for option in options)
    if most == 1:
        return chosen, "there is one rank"
    best_on_most = min((option for option in options if option.ranks == most), key=lambda one: one.ttft_s)
    if chosen.ranks == 1:
        change = best_on_most.ttft_s / chosen.ttft_s - 1
        return chosen, f"more ranks are not worth it: on {most}, TTFT changes by {change:+.0%} at best"
    single = next(option for option in options if option.ranks == 1)
    gain = f"{single.ttft_s / chosen.ttft_s:.2f}x one rank"
    if chosen.ranks < most:
        change = best_on_most.ttft_s / chosen.ttft_s - 1
        return chosen, f"{gain}; {most} ranks are not worth it, TTFT changes by {change:+.0%}"
    return chosen, gain
