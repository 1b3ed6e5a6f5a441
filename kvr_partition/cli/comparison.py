"""Methods side by side: what each number in a comparison means, as rows and as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvr_partition.cli.show import seconds
from kvr_partition.measurement import Measurement
from kvr_partition.methods import BASELINES, method_of
from kvr_partition.work import attention_dot_products


@dataclass(frozen=True)
class Comparison:
    """Methods timed in one interleaved run on one context.

    Attributes:
        named: what each method is shown as, and its measurement.
        noisy: the same under background traffic, where that was timed.
        ranks: of the group.
        shared: whether the ranks share one GPU, so that all of them together are what single has alone.
        windows: of each layer that keeps KV.
        depth: how far the runtime reaches into the model.
    """

    named: Sequence[tuple[str, Measurement]]
    noisy: Sequence[tuple[str, Measurement]] = ()
    ranks: int = 1
    shared: bool = False
    windows: Sequence[int | None] = field(default=())
    depth: str = "attention"

    def _ttft(self, *methods: str) -> float | None:
        times = [found.ttft_s for _, found in self.named if found.method in methods and found.ok]
        return min(times, default=None)

    def facts(self) -> list[dict[str, Any]]:
        """One record per method; times in seconds, None for what is not known."""
        tsp, best, single = self._ttft("tsp"), self._ttft(*BASELINES), self._ttft("single")
        bound = self._ttft("bound")
        several = sum(found.method in BASELINES and found.ok for _, found in self.named) > 1
        noisy = dict(self.noisy)
        records = []
        for name, found in self.named:
            ttft = found.ttft_s if found.ok else None
            method = method_of(found.method)
            disturbed = noisy.get(name)
            records.append(
                {
                    "method": name,
                    "sizes": found.sizes,
                    "ttft_s": ttft,
                    "interval_s": found.interval_s if found.ok else None,
                    "speedup_over_tsp": _ratio(tsp, ttft),
                    "speedup_over_best_baseline": _ratio(best, ttft) if several else None,
                    "efficiency": _ratio(single, ttft, 1.0 if self.shared else 1.0 / self.ranks)
                    if not method.alone
                    else None,
                    "over_bound": _excess(ttft, bound) if method.splits else None,
                    "kv_bytes": found.samples[-1].kv_bytes if found.ok else None,
                    "attention_dot_products": attention_dot_products(
                        found.method, found.partition, self.windows, self.depth
                    )
                    if self.windows
                    else None,
                    "noise_bytes": disturbed.noise if disturbed is not None else None,
                    "loss_under_noise": _excess(disturbed.ttft_s, ttft)
                    if disturbed is not None and disturbed.ok
                    else None,
                    "samples": len(found.samples),
                    "stopped": found.stopped,
                    "failure": found.failure.message if found.failure is not None else None,
                }
            )
        return records

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text, without the columns that nobody has a value in."""
        records = self.facts()
        cells = [[cell(record) for _, cell in _COLUMNS] for record in records]
        kept = [at for at in range(len(_COLUMNS)) if any(row[at] for row in cells)]
        return [_COLUMNS[at][0] for at in kept], [[row[at] for at in kept] for row in cells]


def together(comparisons: Sequence[tuple[str, Comparison]]) -> tuple[list[str], list[list[str]]]:
    """Several comparisons as one table, each under its label."""
    tables = [(label, *comparison.table()) for label, comparison in comparisons]
    names = [name for name, _ in _COLUMNS if any(name in header for _, header, _ in tables)]
    rows = []
    for label, header, body in tables:
        for at, row in enumerate(body):
            values = dict(zip(header, row, strict=True))
            rows.append([label if at == 0 else "", *(values.get(name, "") for name in names)])
    return ["context", *names], rows


def _ratio(above: float | None, below: float | None, scale: float = 1.0) -> float | None:
    return None if above is None or below is None else scale * above / below


def _excess(value: float | None, base: float | None) -> float | None:
    ratio = _ratio(value, base)
    return None if ratio is None else ratio - 1


def _text(field_: str, form: Callable[[Any], str]) -> Callable[[dict[str, Any]], str]:
    return lambda record: "" if record[field_] is None else form(record[field_])


def _percent(value: float) -> str:
    return f"{value * 100:+.1f}%"


def _large(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _chunks(record: dict[str, Any]) -> str:
    sizes = "/".join(str(size) for size in record["sizes"])
    return f"{sizes}  {record['failure']}" if record["failure"] else sizes


_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("method", lambda record: str(record["method"])),
    ("TTFT", lambda record: "failed" if record["ttft_s"] is None else seconds(record["ttft_s"])),
    ("95% interval", _text("interval_s", lambda pair: f"{seconds(pair[0])} – {seconds(pair[1])}")),
    ("vs TSP", _text("speedup_over_tsp", "{:.2f}×".format)),
    ("vs best baseline", _text("speedup_over_best_baseline", "{:.2f}×".format)),
    ("efficiency", _text("efficiency", "{:.2f}".format)),
    ("over TTFT(p)", _text("over_bound", _percent)),
    ("under noise", _text("loss_under_noise", _percent)),
    ("KV sent", _text("kv_bytes", lambda value: f"{_large(value)}B" if value else "")),
    ("dot products", _text("attention_dot_products", lambda value: _large(value).rstrip())),
    ("chunks", _chunks),
]
