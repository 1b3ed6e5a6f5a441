"""Tables and predictors in the formats that other programs and people read."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from kvr_partition import jsonfile
from kvr_partition.errors import OutOfRangeError, UnsupportedError
from kvr_partition.predictor import PartitionPredictor
from kvr_partition.table import PartitionTable

FORMATS = ("json", "csv", "markdown", "vllm", "router")

ROUTER_SCHEMA = "kvr-partition/router/1"


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to cut one context, for programs that read nothing but plain JSON.

    ``cuts`` are the inner boundaries as shares of the context; between two routes of the same ranks and past they
    are interpolated linearly in the context, and outside them there is no answer. Chunks are whole multiples
    of the smaller ``quantum`` of the two, in tokens, dealt out as ``examples/read_table.js`` does.
    """

    ranks: int
    past: int
    context: int
    cuts: tuple[float, ...]
    quantum: int


class RouterTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to cut every context, for a router in any language.

    Attributes:
        model, hardware: what it is for, as far as known.
        routes: by ranks, past and context, ascending.
    """

    schema: str
    model: str | None
    hardware: str | None
    routes: tuple[Route, ...]


def export(
    source: PartitionTable | PartitionPredictor,
    format_: str,
    *,
    ranks: int | None = None,
    context: int | None = None,
) -> str:
    """The source as text.

    ``json`` is the file format itself, which `kvr_partition.load` reads back. ``csv`` has one row per entry, sizes
    separated by ``/``, times in seconds. ``markdown`` is for reading. ``vllm`` is for ``--additional-config``, see
    `vllm_config`. ``router`` is a `RouterTable`.

    Args:
        ranks: of ``vllm``, where the source has several.
        context: of ``vllm``: whose weights.

    Raises:
        OutOfRangeError: no such ranks or context.
        UnsupportedError: an unknown format, or one that this kind of source has not.
    """
    match format_:
        case "json":
            return source.to_json().decode()
        case "vllm":
            return _line(vllm_config(source, ranks=ranks, context=context))
        case "router":
            return jsonfile.encode(router_table(source)).decode()
        case "csv" | "markdown":
            if not isinstance(source, PartitionTable):
                raise UnsupportedError(f"{format_} shows what was searched; export a table, not a predictor")
            return _csv(source) if format_ == "csv" else _markdown(source)
    raise UnsupportedError(f"unknown format {format_!r}; there are {', '.join(FORMATS)}")


def vllm_config(
    source: PartitionTable | PartitionPredictor, *, ranks: int | None = None, context: int | None = None
) -> dict[str, object]:
    """For vLLM's ``--additional-config``.

    The community's KV-Runahead branch reads ``pcp_partition_weights``, one positive share a rank. Without
    ``context`` those are of the longest one, and ``pcp_partition_weights_by_context`` has all, for a branch
    that chooses by the prompt's length; others ignore it.

    Raises:
        OutOfRangeError: no such ranks or context.
    """
    if context is not None:
        if isinstance(source, PartitionPredictor):
            found = source.predict(context, ranks=ranks)
        else:
            found = source.lookup(context, ranks=ranks)
        return {"pcp_partition_weights": list(found.partition.fractions)}
    routes = [route for route in router_table(source).routes if route.past == 0 and ranks in (None, route.ranks)]
    counts = sorted({route.ranks for route in routes})
    if not counts:
        raise OutOfRangeError(f"nothing{_for(ranks)} was searched without cached tokens; vLLM takes no other")
    if len(counts) != 1:
        raise OutOfRangeError(
            f"there are partitions for {', '.join(map(str, counts))} ranks; say which with ranks="
        )
    weights = {route.context: _shares(route.cuts) for route in routes}
    return {
        "pcp_partition_weights": weights[max(weights)],
        "pcp_partition_weights_by_context": [[context, weights[context]] for context in sorted(weights)],
    }


def router_table(source: PartitionTable | PartitionPredictor) -> RouterTable:
    """Every searched context of a table, or every node of a predictor without past tokens inside its range.

    Raises:
        OutOfRangeError: a predictor of prompts behind cached tokens only.
    """
    origin = source.provenance
    if isinstance(source, PartitionPredictor):
        routes = [
            Route(grid.ranks, 0, context, cuts, grid.quantum)
            for grid in source.grids
            if grid.past_shares[0] == 0
            for context, cuts in zip(grid.contexts, grid.boundaries[0], strict=True)
            if source.hull(grid.ranks).holds(context, 0)
        ]
        if not routes:
            raise OutOfRangeError(
                "this predictor answers behind cached tokens only; export the table, which has these"
            )
    else:
        routes = [
            Route(
                entry.ranks,
                entry.past,
                entry.context,
                tuple(boundary / entry.context for boundary in entry.partition.boundaries[1:-1]),
                entry.quantum,
            )
            for entry in source.entries
        ]
    return RouterTable(
        ROUTER_SCHEMA,
        None if origin is None else origin.model.name,
        None if origin is None else f"{origin.device}, {origin.backend}",
        tuple(routes),
    )


def _for(ranks: int | None) -> str:
    return "" if ranks is None else f" on {ranks} ranks"


def _shares(cuts: Sequence[float]) -> list[float]:
    edges = (0.0, *cuts, 1.0)
    return [after - before for before, after in pairwise(edges)]


def _line(document: object) -> str:
    return msgspec.json.encode(document).decode() + "\n"


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
