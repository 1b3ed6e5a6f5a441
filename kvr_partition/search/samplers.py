"""The samplers a search can use, a record of each: how it is made, and what it goes by."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import optuna

from kvr_partition.errors import UnsupportedError
from kvr_partition.machine.machine import Machine
from kvr_partition.search.informed import HierarchicalGridSampler, InformedSampler
from kvr_partition.search.space import Space


@dataclass(frozen=True, slots=True)
class Start:
    """What a sampler begins with.

    Attributes:
        seed: of its random numbers.
        seeds: how many seed partitions the study measures before it asks the sampler.
        space: of the study.
        machine: what a prefill costs, as far as it is known.
    """

    seed: int
    seeds: int
    space: Space
    machine: Machine | None = None


@dataclass(frozen=True, slots=True)
class SamplerKind:
    """A kind of sampler.

    Attributes:
        title: in one line, for people.
        make: the Optuna sampler.
        corrects: whether it needs a machine, which measurements correct. It then proposes nothing more once
            nothing can be expected to win, and what it has learnt has a say in the end.
        whole: whether it proposes whole partitions, wherever they are; others move within ranges around the seeds.
        seeded: whether it begins at seeds: what a table interpolates, what a machine solves to.
    """

    title: str
    make: Callable[[Start], optuna.samplers.BaseSampler]
    corrects: bool = False
    whole: bool = False
    seeded: bool = True


def _informed(start: Start) -> optuna.samplers.BaseSampler:
    if start.machine is None:
        raise UnsupportedError("sampler 'informed' needs a machine to start from; use another sampler")
    return InformedSampler(start.space, start.machine, seed=start.seed)


def _gaussian_process(start: Start) -> optuna.samplers.BaseSampler:
    # TTFT is noisy: do not take a single lucky sample for the truth.
    return optuna.samplers.GPSampler(seed=start.seed, n_startup_trials=start.seeds, deterministic_objective=False)


SAMPLERS: dict[str, SamplerKind] = {
    "informed": SamplerKind("corrects a cost model", _informed, corrects=True, whole=True),
    "hierarchical": SamplerKind(
        "the paper's grid",
        lambda start: HierarchicalGridSampler(start.space, seed=start.seed),
        whole=True,
        seeded=False,
    ),
    "gp": SamplerKind("a Gaussian process", _gaussian_process),
    "tpe": SamplerKind(
        "tree-structured Parzen estimators",
        lambda start: optuna.samplers.TPESampler(seed=start.seed, n_startup_trials=start.seeds),
    ),
    # It begins at the middle of the space, which is the best informed seed.
    "cmaes": SamplerKind(
        "CMA-ES",
        lambda start: optuna.samplers.CmaEsSampler(n_startup_trials=start.seeds, seed=start.seed),
    ),
}
"""By name. A new one is a line here; the tests of searches run every one."""

WITHOUT_MACHINE = "gp"
"""What is taken where there is no machine to correct."""


def make_sampler(name: str, start: Start) -> optuna.samplers.BaseSampler:
    """An Optuna sampler that begins where the seeds end.

    Raises:
        UnsupportedError: an unknown name, or a sampler that corrects a machine without one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return check_sampler(name).make(start)


def check_sampler(name: str) -> SamplerKind:
    """The kind of sampler of a name.

    Raises:
        UnsupportedError: it is not one of `SAMPLERS`.
    """
    if name not in SAMPLERS:
        raise UnsupportedError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
