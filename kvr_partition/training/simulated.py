"""Simulated searches: rows whose truth differs from their prior, on machines and models of many kinds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from kvr_partition.machine.cost import ChunkCost, LinkCost
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.schedule import simulate
from kvr_partition.machine.solve import best_split
from kvr_partition.measurement import Measurement, RankTimes, Sample
from kvr_partition.partition import Partition
from kvr_partition.search.beliefs import Beliefs
from kvr_partition.search.informed import InformedSampler
from kvr_partition.search.space import Seed, Space, default_quantum
from kvr_partition.search.study import WIDE
from kvr_partition.training.dataset import Row

NOISE = 0.02
"""Standard deviation of a simulated measurement."""

PROFILED = 30
"""Samples of each rank in a profile, ten points with three each, which its speeds are estimated from."""

HARDWARE_OFF, MODEL_OFF, LINK_OFF = 0.12, 0.03, 0.15
"""Largest deviations of the truth from the prior, as shares: of cost terms by hardware and by model, and of links.

All models of one hardware share its deviations. Cost terms are up to 15% off in all.
"""


@dataclass(frozen=True)
class Shape:
    """A model as far as its prefill's time goes: parameters in billions, and what its attention keeps."""

    name: str
    billions: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = (
    Shape("1B GQA", 1.2, 16, 32, 8, 64),
    Shape("7B MQA", 7.0, 32, 71, 1, 64),
    Shape("7B MHA", 6.7, 32, 32, 32, 128),
    Shape("8B GQA", 8.0, 32, 32, 8, 128),
    Shape("13B MHA", 13.0, 40, 40, 40, 128),
    Shape("70B GQA", 70.0, 80, 64, 8, 128),
)

RATES = {"fast GPU": 6e14, "slow GPU": 1.2e14}
"""Operations per second of a rank."""

BANDWIDTHS = (300e9, 10e9, 1e9)

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Landscape:
    """One model on one machine: its prior and its truth."""

    hardware: str
    model: str
    bandwidth: float
    ranks: int
    prior: Machine
    truth: Machine


def landscapes(ranks: Sequence[int] = (2, 3, 4, 6, 8), each: int = 1, seed: int = 0) -> list[Landscape]:
    """Every shape on every hardware and bandwidth, each on ``each`` of the rank counts in turn."""
    found = []
    counts = itertools.cycle(ranks)
    for shape, hardware, bandwidth in itertools.product(SHAPES, RATES, BANDWIDTHS):
        for _ in range(each):
            found.append(_landscape(shape, hardware, bandwidth, next(counts), seed))
    return found


def _landscape(shape: Shape, hardware: str, bandwidth: float, ranks: int, seed: int) -> Landscape:
    draw = random.Random(f"{shape.name} {hardware} {bandwidth} {ranks} {seed}")

    def off(share: float, of: random.Random = draw) -> float:
        return 1 + of.uniform(-share, share)

    by_hardware = random.Random(f"{hardware} {seed}")
    by_model = random.Random(f"{hardware} {shape.name} {seed}")
    by_link = random.Random(f"{hardware} {bandwidth} {seed}")
    rate = RATES[hardware]
    pair = 4 * shape.layers * shape.heads * shape.head_dim / rate / 0.8
    share = 0.12 + 0.16 * shape.kv_heads / shape.heads
    cost = ChunkCost(1e-3, 2e9 * shape.billions / rate, pair, pair, share)
    # Ranks are alike but for one that is slow, and so are links; a profile has timed both.
    speeds = [off(0.03) for _ in range(ranks)]
    speeds[draw.randrange(ranks)] *= 0.85
    rates = [bandwidth * off(0.05) for _ in range(ranks - 1)]
    rates[draw.randrange(ranks - 1)] *= 0.7
    link_off = off(LINK_OFF, by_link)
    truth = Machine(
        ChunkCost.of_terms(
            term * off(HARDWARE_OFF, by_hardware) * off(MODEL_OFF, by_model) for term in cost.terms
        ),
        shape.layers,
        4 * shape.kv_heads * shape.head_dim,
        tuple(LinkCost.of(one * link_off, 2e-5 * link_off) for one in rates),
        tuple(speeds),
    )
    prior = replace(
        truth,
        cost=cost,
        link=tuple(LinkCost.of(one, 2e-5) for one in rates),
        speeds=tuple(speed * draw.gauss(1.0, NOISE / math.sqrt(PROFILED)) for speed in speeds),
    )
    return Landscape(hardware, shape.name, bandwidth, ranks, prior, truth)


def searched_row(land: Landscape, context: int, past: int = 0, budget: int = 8, seed: int = 0) -> Row:
    """A search of one context on a landscape, measured with noise, and the row it makes."""
    draw = random.Random(f"{land.hardware} {land.model} {land.bandwidth} {land.ranks} {context} {past} {seed}")
    prior, truth = replace(land.prior, past=past), replace(land.truth, past=past)
    quantum = default_quantum(context, land.ranks)
    even = Partition.even(context, land.ranks, past=past)
    sampler = InformedSampler(Space.around([Seed("even", even)], quantum, WIDE), prior, seed=seed)
    trials: list[Measurement] = []
    while len(trials) < budget:
        partition = sampler.next(trials)
        if partition is None:
            break
        trials.append(_measured(partition, truth, draw))
    best = Beliefs.after(prior, context, trials).ranked()[0].partition
    solved = best_split(context, land.ranks, truth)
    return Row(
        origin="simulated",
        hardware=land.hardware,
        model=land.model,
        bandwidth=land.bandwidth,
        topology="chain",
        ranks=land.ranks,
        context=context,
        past=past,
        prior=prior.filed(land.ranks),
        sizes=best.sizes,
        trials=tuple(trials),
        truth=truth.filed(land.ranks),
        best_s=min(simulate(split, truth).ttft_s for split in (best, solved)),
    )


def _measured(partition: Partition, truth: Machine, draw: random.Random) -> Measurement:
    timeline = simulate(partition, truth)

    def noisy(seconds: float) -> float:
        return seconds * max(0.5, draw.gauss(1.0, NOISE))

    ranks = tuple(
        RankTimes(noisy(rank.compute_s), noisy(rank.wait_s), noisy(rank.transfer_s)) for rank in timeline.ranks
    )
    sample = Sample(noisy(timeline.ttft_s), ranks, 0)
    return Measurement("kvr", partition.sizes, (sample,), "cap", past=partition.past)


def simulated_rows(
    lands: Sequence[Landscape],
    contexts: Sequence[int] = CONTEXTS,
    past_shares: Sequence[float] = (0.0,),
    budget: int = 8,
    jobs: int = 1,
) -> list[Row]:
    """A search of every context and past share on every landscape."""
    from joblib import Parallel, delayed

    work = [
        (land, context, round(share / (1 - share) * context))
        for land in lands
        for context in contexts
        for share in past_shares
    ]
    return list(
        Parallel(n_jobs=jobs)(delayed(searched_row)(land, context, past, budget) for land, context, past in work)
    )
