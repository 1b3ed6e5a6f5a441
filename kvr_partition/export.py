"""A partition table in the formats other programs and people read."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from kvr_partition.table import PartitionTable

FORMATS = ("json", "csv", "markdown")


def export(table: PartitionTable, format_: str) -> str:
    """The table as text.

    ``json`` is the file format itself, which `kvr_partition.load` reads back. ``csv`` has one row per
    entry, sizes separated by ``/``, times in seconds. ``markdown`` is for reading.

    Raises:
        ValueError: an unknown format.
    """
    match format_:
        case "json":
            return table.to_json().decode()
        case "csv":
            return _csv(table)
        case "markdown":
            return _markdown(table)
    raise ValueError(f"unknown format {format_!r}; there are {', '.join(FORMATS)}")


def _csv(table: PartitionTable) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ranks", "past", "context", "sizes", "ttft_s", "ttft_low_s", "ttft_high_s", "measured"])
    for entry in table.entries:
        low, high = entry.interval_s or (None, None)
        sizes = "/".join(str(size) for size in entry.sizes)
        writer.writerow([entry.ranks, entry.past, entry.context, sizes, entry.ttft_s, low, high, entry.measured])
    return text.getvalue()


def _markdown(table: PartitionTable) -> str:
    lines = []
    origin = table.provenance
    if origin is not None:
        lines += [
            f"Searched partitions of {origin.model.name}, {origin.dtype}, on {origin.backend} "
            f"({origin.device}, {origin.link}).",
            "",
        ]
    header = ["ranks", "context", "past", "chunk sizes", "fractions", "TTFT [ms]", "95% interval [ms]", "measured"]
    lines += [_row(header), "|---:|---:|---:|---|---|---:|---:|---:|"]
    for entry in table.entries:
        lines.append(
            _row(
                [
                    entry.ranks,
                    entry.context,
                    entry.past,
                    " / ".join(str(size) for size in entry.sizes),
                    " / ".join(f"{share:.3f}" for share in entry.partition.fractions),
                    "" if entry.ttft_s is None else f"{entry.ttft_s * 1e3:.1f}",
                    ""
                    if entry.interval_s is None
                    else " to ".join(f"{end * 1e3:.1f}" for end in entry.interval_s),
                    "" if entry.measured is None else entry.measured,
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
