"""Which method on how many ranks is worth it for a context, predicted from a profile.

Each method on every number of ranks up to the profile's, the best split of each solved for. What a table has
measured for a context is shown beside. Fewer ranks are advised where more of them gain next to nothing.

Example:
  kvr-partition advise --profile profile.json --contexts 2048,16384 --bandwidth 10GB/s
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvr_partition.cli.options import add_output, parse_contexts, parse_rate
from kvr_partition.methods import method_of

if TYPE_CHECKING:
    from kvr_partition.machine.advice import Advice, Option
    from kvr_partition.machine.profile import Profile
    from kvr_partition.table import PartitionTable


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``advise``."""
    group = parser.add_argument_group("advise")
    group.add_argument("--profile", metavar="FILE", required=True, help="a profile.json of the machine")
    group.add_argument("--contexts", required=True, help="prompt lengths: 4096,8192 or start:stop:step")
    group.add_argument("--bandwidth", metavar="RATE", help="as if every link were held to this rate, like 10GB/s")
    group.add_argument("--table", metavar="FILE", help="a table.json of the same machine, for measured TTFT")
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Predict and print."""
    from kvr_partition.cli.show import print_json
    from kvr_partition.loading import load_table
    from kvr_partition.machine.advice import advise
    from kvr_partition.machine.profile import load_profile
    from kvr_partition.table import PartitionTable

    contexts = parse_contexts(options.contexts)
    profile = load_profile(options.profile)
    machine = profile.machine(bandwidth=None if options.bandwidth is None else parse_rate(options.bandwidth))
    table = load_table(options.table) if options.table else PartitionTable([])
    found = [advise(machine, context, profile.provenance.ranks) for context in contexts]
    if options.format == "json":
        print_json([_as_data(advice, profile, table) for advice in found])
    else:
        _show(found, profile, table)


def _measured(table: PartitionTable, context: int, option: Option) -> float | None:
    """Seconds that a search measured of what an option predicts; None where none did."""
    topology = method_of(option.method).topology
    if topology is None or table.provenance is None or table.provenance.topology != topology:
        return None
    return next(
        (entry.ttft_s for entry in table.entries if (entry.context, entry.ranks) == (context, option.ranks)), None
    )


def _as_data(advice: Advice, profile: Profile, table: PartitionTable) -> dict[str, Any]:
    return {
        "context": advice.context,
        "method": advice.chosen.method,
        "ranks": advice.chosen.ranks,
        "reason": advice.reason,
        "beyond_profile": advice.context > profile.context,
        "options": [
            {
                "method": option.method,
                "ranks": option.ranks,
                "predicted_ttft_s": option.ttft_s,
                "measured_ttft_s": _measured(table, advice.context, option),
                "sizes": None if option.partition is None else option.partition.sizes,
            }
            for option in advice.options
        ],
    }


def _show(found: Sequence[Advice], profile: Profile, table: PartitionTable) -> None:
    from kvr_partition.cli.show import print_table, seconds

    where = profile.provenance
    print(
        f"{where.model.name} on up to {where.ranks} ranks of {where.device}, {where.dtype}; "
        "predicted from a profile\n"
    )
    rows = []
    for advice in found:
        for at, one in enumerate(advice.options):
            known = _measured(table, advice.context, one)
            rows.append(
                [
                    str(advice.context) if at == 0 else "",
                    one.method,
                    str(one.ranks),
                    seconds(one.ttft_s),
                    "" if known is None else seconds(known),
                    "" if one.partition is None else str(one.partition),
                    "<-" if one is advice.chosen else "",
                ]
            )
    print_table(["context", "method", "ranks", "predicted", "measured", "chunks", ""], rows, left=2)
    print()
    for advice in found:
        chosen = advice.chosen
        how = "one rank alone" if chosen.ranks == 1 else f"{chosen.method} on {chosen.ranks} ranks"
        beyond = f"; the profile ends at {profile.context}" if advice.context > profile.context else ""
        print(f"{advice.context} tokens: {how} ({advice.reason}{beyond})")
