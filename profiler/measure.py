"""The timing protocol: warm up, interleave candidates, repeat until sure or capped, keep every sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kvr_partition.errors import RankError
from kvr_partition.measurement import Failure, Measurement, Sample, interval_is_sure, median, median_interval
from kvr_partition.partition import Partition
from profiler.store import MeasurementLine, MeasurementLog, SampleLine


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is timed: a method, the chunks it runs with, and bytes of background traffic in each layer."""

    method: str
    partition: Partition
    noise: int = 0

    @classmethod
    def single(cls, context: int, past: int = 0) -> Candidate:
        """The whole prompt on one rank, as KV-Runahead would run it there."""
        return cls("single", Partition((context,), past))

    @classmethod
    def stock(cls, context: int, past: int = 0) -> Candidate:
        """The whole prompt on one rank, as transformers reads it."""
        return cls("stock", Partition((context,), past))

    @classmethod
    def tsp(cls, context: int, ranks: int) -> Candidate:
        """The paper's baseline: even chunks."""
        return cls.even("tsp", context, ranks)

    @classmethod
    def even(cls, method: str, context: int, ranks: int, past: int = 0) -> Candidate:
        """A method that knows no other chunks than even ones, or KV-Runahead with them."""
        return cls(method, Partition.even(context, ranks, past=past))


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """When a median is known well enough.

    Attributes:
        warmup: samples of each candidate that are taken first and not used.
        least, most: samples taken at least and at most.
        tolerance: half the width of the median's 95% interval, as a share of the median, that is enough.
        patience_s: seconds of prefills, warm-ups included, after which a candidate gets no more samples if it has
            one. What takes long is timed no less precisely: it has more to average over.
    """

    warmup: int = 1
    least: int = 6
    most: int = 20
    tolerance: float = 0.05
    patience_s: float = math.inf

    @classmethod
    def for_backend(cls, backend: str) -> SamplingPlan:
        """On GPUs within 1%, or three seconds of samples; on CPUs, which are shared, within 5%."""
        return cls() if backend == "cpu" else cls(tolerance=0.01, most=40, patience_s=3.0)

    @classmethod
    def at_most(cls, samples: int | None, backend: str) -> SamplingPlan:
        """The same with at most so many samples, and no limit of time; None: 8 on a CPU, as usual elsewhere."""
        plan = cls.for_backend(backend)
        most = samples or (8 if backend == "cpu" else plan.most)
        patience_s = plan.patience_s if samples is None else math.inf
        return replace(plan, most=most, least=min(plan.least, most), patience_s=patience_s)

    @property
    def turns(self) -> int:
        """Warm-ups and samples of a candidate, to estimate work: the most, or the least where time ends it."""
        return self.warmup + (self.most if math.isinf(self.patience_s) else self.least)

    def precise(self, seconds: Sequence[float]) -> bool:
        """Whether these samples are enough."""
        if len(seconds) < self.least or not interval_is_sure(len(seconds)):
            return False
        low, high = median_interval(seconds)
        return (high - low) / 2 <= self.tolerance * median(seconds)


@dataclass
class _Series:
    candidate: Candidate
    samples: list[Sample] = field(default_factory=list)
    spent_s: float = 0.0
    failure: Failure | None = None

    @property
    def seconds(self) -> list[float]:
        return [sample.ttft_s for sample in self.samples]

    def outlasts(self, plan: SamplingPlan) -> bool:
        """Whether it has had its share of time."""
        return bool(self.samples) and self.spent_s >= plan.patience_s

    def finished(self, run: str, plan: SamplingPlan) -> Measurement:
        stopped = "failed" if self.failure else "precise" if plan.precise(self.seconds) else "cap"
        partition, noise = self.candidate.partition, self.candidate.noise
        return Measurement(
            self.candidate.method,
            partition.sizes,
            tuple(self.samples),
            stopped,
            run,
            self.failure,
            noise,
            partition.past,
        )

    def sample_line(self, run: str, purpose: str, sample: Sample, warmup: bool) -> SampleLine:
        of, partition = self.candidate, self.candidate.partition
        return SampleLine(run, purpose, of.method, partition.sizes, warmup, sample, of.noise, partition.past)

    def closing_line(self, run: str, purpose: str, found: Measurement) -> MeasurementLine:
        count = len(found.samples)
        return MeasurementLine(
            run, purpose, found.method, found.sizes, count, found.stopped, found.failure, found.noise, found.past
        )


def measure_interleaved(
    candidates: Sequence[Candidate],
    take: Callable[[Candidate], Sample],
    plan: SamplingPlan,
    *,
    log: MeasurementLog | None = None,
    run: str = "",
    purpose: str = "measure",
    on_sample: Callable[[Candidate, Sample, bool], None] | None = None,
) -> list[Measurement]:
    """Time candidates side by side: one sample of each in turn, so that drift hits all of them alike.

    Sampling ends for all at once, when every candidate that still runs is known precisely or the cap is
    reached; only one that has had its share of time sits out before that. A candidate that fails is a result
    too; the others go on. One given twice is timed once.

    Args:
        take: times one prefill; raises `RankError` when that fails.
        log: where each sample is written at once, and where finished measurements of the same purpose, under the
            conditions of the same run, are found: if it has all of these candidates, nothing is measured.
        run: of the log, which samples belong to.
        on_sample: told of each sample, and whether it was a warm-up.
    """
    if log is not None:
        before = log.of_run(run)
        known = [before.finished(purpose, asked.method, asked.partition, asked.noise) for asked in candidates]
        found = [measurement for measurement in known if measurement is not None]
        if len(found) == len(candidates):
            return found
    # Methods often agree on a partition (the best split may be the even one): it is timed once for all.
    all_series = [_Series(candidate) for candidate in dict.fromkeys(candidates)]
    for turn in range(plan.warmup + plan.most):
        warmup = turn < plan.warmup
        running = [each for each in all_series if each.failure is None and not each.outlasts(plan)]
        if not running or (not warmup and all(plan.precise(series.seconds) for series in running)):
            break
        # Back and forth, so that drift within a turn hits the first and the last alike.
        for series in running if turn % 2 == 0 else reversed(running):
            candidate = series.candidate
            try:
                sample = take(candidate)
            except RankError as error:
                series.failure = Failure(error.kind, str(error), error.traceback)
                continue
            if log is not None:
                log.append(series.sample_line(run, purpose, sample, warmup))
            series.spent_s += sample.ttft_s
            if not warmup:
                series.samples.append(sample)
            if on_sample is not None:
                on_sample(candidate, sample, warmup)
    measurements: dict[Candidate, Measurement] = {}
    for series in all_series:
        measurement = measurements[series.candidate] = series.finished(run, plan)
        if log is not None:
            log.append(series.closing_line(run, purpose, measurement))
    return [measurements[candidate] for candidate in candidates]
