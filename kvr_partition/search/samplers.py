"""The samplers a search can use."""

from __future__ import annotations

import warnings

import optuna

from kvr_partition.errors import UnsupportedError
from kvr_partition.machine.machine import Machine
from kvr_partition.search.informed import HierarchicalGridSampler, InformedSampler
from kvr_partition.search.space import Space

SAMPLERS = ("informed", "hierarchical", "gp", "tpe", "cmaes")


def make_sampler(
    name: str, *, seed: int, seeds: int, space: Space, machine: Machine | None = None
) -> optuna.samplers.BaseSampler:
    """An Optuna sampler that begins where the seeds end.

    Args:
        name: one of `SAMPLERS`.
        seed: of its random numbers.
        seeds: how many seed partitions the study measures before it asks the sampler.
        space: of the study.
        machine: what a prefill costs, as far as it is known; ``"informed"`` needs it.

    Raises:
        UnsupportedError: an unknown name, or ``"informed"`` without a machine.
    """
    check_sampler(name)
    if name == "informed":
        if machine is None:
            raise UnsupportedError("sampler 'informed' needs a machine to start from; use another sampler")
        return InformedSampler(space, machine, seed=seed)
    if name == "hierarchical":
        return HierarchicalGridSampler(space, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match name:
            case "gp":
                # TTFT is noisy: do not take a single lucky sample for the truth.
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=seeds, deterministic_objective=False)
            case "tpe":
                return optuna.samplers.TPESampler(seed=seed, n_startup_trials=seeds)
            case "cmaes":
                # It begins at the middle of the space, which is the best informed seed.
                return optuna.samplers.CmaEsSampler(n_startup_trials=seeds, seed=seed)
    raise AssertionError("check_sampler lets no other name through")


def check_sampler(name: str) -> None:
    """Refuse an unknown sampler.

    Raises:
        UnsupportedError: it is not one of `SAMPLERS`.
    """
    if name not in SAMPLERS:
        raise UnsupportedError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")
